"""The tables of ``config.toml``, one class each. Every key is documented here and in the file itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.wire import CAMERA_ID

Name = Annotated[str, Field(pattern=rf"^{CAMERA_ID.pattern}$")]
Side = Annotated[int, Field(ge=0, le=16384)]
RecipeName = Annotated[str, Field(min_length=1, max_length=128)]
EngineName = Annotated[str, Field(min_length=1)]
BatchSize = Annotated[int, Field(ge=1, le=256)]
Address = Annotated[str, Field(pattern=r"^.+:[0-9]{1,5}$")]
DropPolicy = Literal["wait", "drop_oldest", "drop_newest", "sample"]

MOST_PARTS = 100_000
"""Most waiting parts of a camera, whatever its limits and its drop policy."""


REDIS_FILES = ("password_file", "sentinel_password_file", "tls_ca", "tls_cert", "tls_key")
"""Keys of ``[redis]`` that name files."""


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
    curve: bool = Field(False, description="Whether only cameras with a key of [curve] may send, encrypted.")

    @model_validator(mode="after")
    def _rep_is_imagezmq(self) -> Socket:
        if self.kind == "rep" and self.protocol != "imagezmq":
            msg = "kind = 'rep' is for protocol = 'imagezmq' only; dmdd cameras PUSH to 'pull' or PUB to 'sub'"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _imagezmq_has_no_keys(self) -> Socket:
        if self.curve and self.protocol == "imagezmq":
            msg = "curve = true: imagezmq senders have no keys; use protocol = 'dmdd', or a network of their own"
            raise ValueError(msg)
        return self


class Curve(Section):
    """Keys of the sockets with ``curve``."""

    keys: Path = Field(Path("keys"), description="Folder of keys, relative to the config file; see dmdd keys.")


class Limits(Section):
    """What a peer can make the line hold."""

    max_frame_bytes: int = Field(
        32 << 20, ge=1024, le=512 << 20, description="Largest message part in bytes; a larger one is cut off unread."
    )
    queue_parts: int = Field(
        64, ge=1, le=MOST_PARTS, description="Most waiting parts a camera; drop_policy says which gives way."
    )
    queue_bytes: int = Field(
        256 << 20, ge=1 << 20, le=64 << 30, description="Most waiting bytes of frames of one engine."
    )
    queue_age_ms: float = Field(0.0, ge=0, le=60_000, description="Longest wait of a part for a lane; 0 for no limit.")
    receive_queue: int = Field(16, ge=1, le=10_000, description="Frames that ZeroMQ holds for each sender.")
    connections: int = Field(256, ge=1, le=10_000, description="Most connections of a socket; others are cut.")
    handshake_ms: int = Field(
        5000, ge=100, le=60_000, description="Time in which a connection must say who it is; then it is cut."
    )


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
    batch_wait_ms: float = Field(
        0.0, ge=0, le=100, description="Longest that an idle lane waits to fill a batch; 0 takes what waits."
    )
    exact_batches: tuple[BatchSize, ...] = Field(
        (1,), max_length=16, description="Batch sizes that TensorRT optimises for on their own, beside max_batch."
    )
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
    def _batches_are_possible(self) -> EngineSettings:
        over = [size for size in self.exact_batches if size > self.max_batch]
        if over:
            msg = f"exact_batches: no batch is larger than max_batch = {self.max_batch}; raise it, or take out {over}"
            raise ValueError(msg)
        return self

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
    mode: Literal["standalone", "sentinel", "cluster"] = Field(
        "standalone", description="One server, one that Sentinels name, or a cluster."
    )
    sentinels: tuple[Address, ...] | None = Field(None, description="host:port of each Sentinel, for mode sentinel.")
    master: str = Field("", max_length=128, description="Name of the master at the Sentinels.")
    nodes: tuple[Address, ...] | None = Field(None, description="host:port of more servers of the cluster to ask.")
    username: str = Field("", max_length=128, description="ACL user; empty for the one in the url, or the default.")
    password_file: str = Field("", max_length=4096, description="File with the password alone.")
    credential: str = Field(
        "", pattern=r"^[A-Za-z0-9_.-]{0,128}$", description="Name of the systemd credential with the password."
    )
    sentinel_password_file: str = Field("", max_length=4096, description="The same of the Sentinels.")
    tls_ca: str = Field("", max_length=4096, description="File of certificates that vouch for a rediss:// server.")
    tls_cert: str = Field("", max_length=4096, description="The line's certificate, where the server asks for one.")
    tls_key: str = Field("", max_length=4096, description="File of its key.")
    timeout_ms: int = Field(50, ge=5, le=5000, description="Longest wait for Redis; then the spool takes over.")
    startup_timeout_s: float = Field(30.0, ge=0, le=600, description="How long a start waits for Redis.")
    verdicts_maxlen: int = Field(100_000, ge=100, description="Records kept a camera, about.")
    rejects_maxlen: int = Field(10_000, ge=100, description="Rejects kept, about.")
    heatmaps: Literal["never", "rejects", "sampled", "all"] = Field("rejects", description="Which parts get a heatmap.")
    frames: Literal["never", "rejects", "sampled"] = Field("rejects", description="Which parts get their image stored.")
    blob_ttl_s: int = Field(3600, ge=1, le=30 * 86400, description="Lifetime of heatmaps and images in seconds.")
    heartbeat_ms: int = Field(500, ge=50, le=10_000, description="Period of the heartbeat; it lapses after four.")
    resend_records: int = Field(
        5000, ge=0, le=1_000_000, description="Records kept in memory to send again what a failover has lost."
    )

    @model_validator(mode="after")
    def _whole(self) -> Redis:
        if wrong := _contradiction(self):
            raise ValueError(wrong)
        return self


def _contradiction(redis: Redis) -> str:
    """What in ``[redis]`` does not go together; empty if all does."""
    if redis.mode == "sentinel" and not (redis.sentinels and redis.master):
        return "mode = 'sentinel' needs sentinels, a list of host:port, and master, its name there"
    if redis.mode != "standalone" and redis.url.startswith("unix:"):
        return f"mode = {redis.mode!r} does not go with a unix:// address"
    if redis.credential and redis.password_file:
        return "credential and password_file: give one of them"
    if redis.tls_key and not redis.tls_cert:
        return "tls_key needs tls_cert, its certificate"
    if (redis.tls_ca or redis.tls_cert) and not redis.url.startswith("rediss:"):
        return "tls_ca and tls_cert need a rediss:// address; without it nothing is encrypted"
    return ""


class Spool(Section):
    """Where records wait that Redis could not take."""

    path: Path = Field(Path("spool"), description="Folder of the spool, relative to the config file.")
    max_bytes: int = Field(1 << 30, ge=1 << 20, le=1 << 40, description="Largest spool; beyond it records are lost.")
    picture_bytes: int = Field(
        256 << 20, ge=0, le=1 << 40, description="Most heatmaps and images that wait; the oldest give way; 0 for none."
    )
    memory_bytes: int = Field(
        32 << 20, ge=0, le=4 << 30, description="Most records that wait in memory where the disk takes no more."
    )
    fsync: Literal["never", "interval", "always"] = Field(
        "interval", description="When the disk is made to keep what is written."
    )
    fsync_interval_s: float = Field(1.0, ge=0.05, le=60, description="Seconds between two times, for interval.")


class Health(Section):
    """When the line calls itself degraded."""

    camera_silent_s: float = Field(
        60.0, ge=0, le=86400, description="Seconds without a part after which a camera is silent; 0 for never."
    )
    spool_high: float = Field(
        0.5, gt=0, le=1, description="Share of its half of spool.max_bytes from which on the spool is high."
    )
    hold_s: float = Field(
        10.0, ge=0.1, le=3600, description="Seconds that a condition lasts after the last event that showed it."
    )


class Drift(Section):
    """Whether what the cameras see, and the scores, are still what they were."""

    baseline_parts: int = Field(
        500, ge=100, le=1_000_000, description="Good parts after start that a baseline is learned from."
    )
    window_parts: int = Field(
        256, ge=32, le=100_000, description="Judged parts whose scores are compared with the reference at a time."
    )
    limit: float = Field(6.0, ge=3, le=20, description="Control limit of the charts, in standard deviations.")


class Metrics(Section):
    """Figures for Prometheus, and traces of single parts."""

    address: str = Field(
        "", pattern=r"^$|^.+:[0-9]{1,5}$", description="host:port that Prometheus reads from; empty serves nothing."
    )
    trace_every: int = Field(
        0, ge=0, le=1_000_000_000, description="Every so manieth part's times are logged; 0 for none."
    )


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
    seq_bits: Literal[16, 32, 64] = Field(64, description="Width of the camera's counter, where it wraps: 16 or 32.")
    reorder_window: int = Field(
        0, ge=0, le=1000, description="Most later numbers that may come before a frame; 0 takes ascending ones only."
    )
    expected: Literal["none", "seq", "part"] = Field(
        "none", description="Whether the PLC lists the parts in Redis, and by what they are matched: seq or part."
    )
    unexpected: Literal["accept", "unknown"] = Field(
        "accept", description="What becomes of a frame without a trigger: it is inspected, or UNKNOWN."
    )
    roi: tuple[Side, Side, Side, Side] | None = Field(
        None, description="Region of interest x, y, width, height in pixels."
    )
    rotate: Literal[0, 90, 180, 270] = Field(0, description="Degrees clockwise, after the region of interest.")
    drift_every: int = Field(
        7, ge=0, le=1_000_000, description="Every so manieth part is looked at for drift; 0 for no watch."
    )
    weight: float = Field(
        1.0, ge=0.001, le=1000, description="Share of the engine's time, and of queue_bytes, under overload."
    )
    priority: int = Field(0, ge=0, le=9, description="Under overload the higher goes first, within the shares.")
    drop_policy: DropPolicy = Field(
        "drop_oldest", description="Who gives way in a full queue: wait, drop_oldest, drop_newest or sample."
    )
    sample_every: int = Field(
        10, ge=2, le=1000, description="With drop_policy = 'sample': one of so many parts is inspected under overload."
    )
    queue_age_ms: float | None = Field(
        None, ge=0, le=60_000, description="Longest wait of a part for a lane, 0 for no limit; else that of limits."
    )
    recipes: dict[RecipeName, EngineName] | None = Field(
        None, description="Engine of each product: recipe in the frame header = name[@version]."
    )

    @model_validator(mode="after")
    def _roi_is_not_empty(self) -> Camera:
        if self.roi is not None and 0 in self.roi[2:]:
            msg = f"roi = {list(self.roi)}: width and height must be at least 1"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _sequence_keys_agree(self) -> Camera:
        if self.reorder_window > self.max_gap:
            msg = f"reorder_window = {self.reorder_window}: at most max_gap, which is {self.max_gap}; raise that, too"
            raise ValueError(msg)
        if self.unexpected == "unknown" and self.expected == "none":
            msg = "unexpected = 'unknown' needs expected = 'seq' or 'part': without triggers every frame is unexpected"
            raise ValueError(msg)
        return self
