"""``config.toml`` as typed, validated settings. Every key is documented here and in the file itself."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.wire import CAMERA_ID

Name = Annotated[str, Field(pattern=rf"^{CAMERA_ID.pattern}$")]
Side = Annotated[int, Field(ge=0, le=16384)]
RecipeName = Annotated[str, Field(min_length=1, max_length=128)]
EngineName = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value and what is allowed."""


class Section(BaseModel):
    """A table of the config: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Line(Section):
    """The line as a whole."""

    name: Name = Field("line1", description="Name of this line, part of every Redis key.")
    drain_timeout_s: float = Field(
        5.0, ge=0, le=60, description="Seconds that a stop waits for open parts before they become UNKNOWN."
    )


class Socket(Section):
    """One ZeroMQ socket that frames arrive on."""

    address: str = Field("tcp://127.0.0.1:5555", min_length=4, description="ZeroMQ address: tcp:// or ipc://.")
    kind: Literal["pull", "sub", "rep"] = Field("pull", description="pull (PUSH), sub (PUB) or rep (REQ).")
    protocol: Literal["dmdd", "imagezmq"] = Field("dmdd", description="Message format of the senders.")
    mode: Literal["bind", "connect"] = Field("bind", description="Whether the line binds or connects.")

    @model_validator(mode="after")
    def _rep_is_imagezmq(self) -> Socket:
        if self.kind == "rep" and self.protocol != "imagezmq":
            msg = "kind = 'rep' is for protocol = 'imagezmq' only; dmdd cameras PUSH to 'pull' or PUB to 'sub'"
            raise ValueError(msg)
        return self


class Limits(Section):
    """What a peer can make the line hold."""

    max_frame_bytes: int = Field(
        32 << 20, ge=1024, le=512 << 20, description="Largest message part in bytes; a larger one is cut off unread."
    )
    queue_parts: int = Field(64, ge=1, le=100_000, description="Most waiting parts a camera; the oldest gives way.")
    queue_bytes: int = Field(
        256 << 20, ge=1 << 20, le=64 << 30, description="Most waiting bytes of frames of one engine."
    )
    receive_queue: int = Field(16, ge=1, le=10_000, description="Frames that ZeroMQ holds for each sender.")


class EngineSettings(Section):
    """How engines run."""

    store: Path = Field(Path("store"), description="Folder of the engine store, relative to the config file.")
    name: str = Field("demo", min_length=1, description="Engine of every camera that names none: name[@version].")
    target: Literal["openvino", "tensorrt"] = Field("openvino", description="openvino (CPU) or tensorrt (NVIDIA).")
    precision: Literal["fp32", "bf16", "fp16", "int8"] = Field(
        "fp32", description="Arithmetic: fp32, bf16 or int8 on the CPU; fp32, fp16 or int8 on a GPU."
    )
    cache: str = Field("", description="Folder of rewritten graphs and GPU plans; empty: the service's cache folder.")
    lanes: int = Field(2, ge=1, le=32, description="Independent execution slots of an engine.")
    max_batch: int = Field(8, ge=1, le=256, description="Largest batch of a lane.")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of an engine's lanes together; 0 takes all cores.")
    timeout_ms: int = Field(2000, ge=10, le=60_000, description="A batch that takes longer is a fault of its lane.")
    memory_mib: int = Field(
        0, ge=0, le=1 << 20, description="Most MiB that the engines in memory may take, about; 0 for no limit."
    )
    require_signature: bool = Field(False, description="Whether an engine that nobody signed is refused.")
    trusted_keys: Path | None = Field(
        None, description="Folder of public keys (*.pub), relative to the config file; only their engines are run."
    )

    @model_validator(mode="after")
    def _signatures_can_be_checked(self) -> EngineSettings:
        if self.require_signature and self.trusted_keys is None:
            msg = "require_signature = true needs trusted_keys: the folder of the public keys to check signatures with"
            raise ValueError(msg)
        return self


class Swap(Section):
    """Changing an engine while the line runs."""

    watch_s: float = Field(1.0, ge=0.05, le=60, description="Seconds between looks at the store and at commands.")
    probation_batches: int = Field(
        1000, ge=0, le=10_000_000, description="Batches after which a new engine is trusted; 0 trusts it at once."
    )
    probation_s: float = Field(
        60.0, ge=0, le=86400, description="Seconds since its first batch after which a new engine is trusted."
    )
    commands: bool = Field(False, description="Whether commands are taken from Redis; protect them by an ACL.")


class Redis(Section):
    """Where verdicts go."""

    url: str = Field(
        "redis://127.0.0.1:6379/0", pattern=r"^(rediss?|unix)://", description="redis://, rediss:// or unix:// address."
    )
    timeout_ms: int = Field(50, ge=5, le=5000, description="Longest wait for Redis; then the spool takes over.")
    startup_timeout_s: float = Field(30.0, ge=0, le=600, description="How long a start waits for Redis.")
    verdicts_maxlen: int = Field(100_000, ge=100, description="Records kept a camera, about.")
    rejects_maxlen: int = Field(10_000, ge=100, description="Rejects kept, about.")
    heatmaps: Literal["never", "rejects", "all"] = Field("rejects", description="Which parts get a heatmap.")
    frames: Literal["never", "rejects"] = Field("rejects", description="Which parts get their image stored.")
    blob_ttl_s: int = Field(3600, ge=1, le=30 * 86400, description="Lifetime of heatmaps and images in seconds.")
    heartbeat_ms: int = Field(500, ge=50, le=10_000, description="Period of the heartbeat; it lapses after four.")


class Spool(Section):
    """Where records wait that Redis could not take."""

    path: Path = Field(Path("spool"), description="Folder of the spool, relative to the config file.")
    max_bytes: int = Field(1 << 30, ge=1 << 20, le=1 << 40, description="Largest spool; beyond it records are lost.")
    fsync: bool = Field(False, description="Whether every write also survives a power cut (slower).")


class Logging(Section):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    format: Literal["json", "console"] = Field("json", description="json, or console for people.")


class Camera(Section):
    """One camera, as ``[cameras.NAME]``."""

    engine: str = Field("", description="Engine of this camera, name[@version]; empty for engine.name.")
    deadline_ms: float = Field(500.0, gt=0, le=60_000, description="From a frame's arrival to its verdict.")
    max_gap: int = Field(
        1000, ge=0, le=1_000_000, description="Most missing sequence numbers that are answered one by one."
    )
    first_seq: int = Field(
        0, ge=-1, le=1, description="First sequence number of a session; -1 takes whatever comes first."
    )
    roi: tuple[Side, Side, Side, Side] | None = Field(
        None, description="Region of interest x, y, width, height in pixels."
    )
    rotate: Literal[0, 90, 180, 270] = Field(0, description="Degrees clockwise, after the region of interest.")
    recipes: dict[RecipeName, EngineName] | None = Field(
        None, description="Engine of each product: recipe in the frame header = name[@version]."
    )

    @model_validator(mode="after")
    def _roi_is_not_empty(self) -> Camera:
        if self.roi is not None and 0 in self.roi[2:]:
            msg = f"roi = {list(self.roi)}: width and height must be at least 1"
            raise ValueError(msg)
        return self


class Config(Section):
    """The whole file."""

    line: Line = Line()
    sockets: tuple[Socket, ...] = Field((Socket(),), min_length=1)
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    swap: Swap = Swap()
    redis: Redis = Redis()
    spool: Spool = Spool()
    logging: Logging = Logging()
    cameras: dict[Name, Camera] = Field(min_length=1)

    def engine_of(self, camera: str) -> str:
        """The engine that a camera's parts go to."""
        return self.cameras[camera].engine or self.engine.name

    def engines(self) -> list[str]:
        """Every engine that a camera or a recipe names, once."""
        recipes = (engine for camera in self.cameras.values() for engine in (camera.recipes or {}).values())
        return sorted({*map(self.engine_of, self.cameras), *recipes})


def load(path: Path) -> Config:
    """Read a config file; relative paths in it are relative to the file.

    Raises:
        ConfigError: naming each wrong key, its value and what is allowed.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        msg = f"{path}: {error.strerror}; give the config file with --config"
        raise ConfigError(msg) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path}: not valid TOML: {error}"
        raise ConfigError(msg) from error
    config = parse(raw, str(path))
    base = path.resolve().parent
    keys = config.engine.trusted_keys
    engine = config.engine.model_copy(
        update={"store": base / config.engine.store, "trusted_keys": None if keys is None else base / keys}
    )
    spool = config.spool.model_copy(update={"path": base / config.spool.path})
    return config.model_copy(update={"engine": engine, "spool": spool})


def parse(raw: dict[str, Any], source: str = "config") -> Config:
    """Validate a decoded config.

    Raises:
        ConfigError: naming each wrong key, its value and what is allowed.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        items = error.errors()
        # An error of a table that follows from one inside it, as "too short" without its wrong item, only confuses.
        inner = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
        lines = [_explain(dict(item)) for item in items if item["loc"] not in inner]
        raise ConfigError(f"{source}: {len(lines)} error(s)\n  " + "\n  ".join(lines)) from error


def _explain(item: dict[str, Any]) -> str:
    key = ".".join(str(step) for step in item["loc"] if step != "[key]")
    if item["type"] == "missing":
        return f"{key}: missing; at least one [cameras.NAME] table is needed" if key == "cameras" else f"{key}: missing"
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    value = item["input"]
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    return f"{key}{shown}: {item['msg'][:1].lower()}{item['msg'][1:]}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Config
    for step in location:
        field = section.model_fields.get(str(step))
        if field is None:
            continue
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        section = next((t for t in inner if issubclass(t, BaseModel)), section)
    return list(section.model_fields)
