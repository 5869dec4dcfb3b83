"""``config.toml`` as a whole: read, validated, its mistakes explained. Its tables: ``config_tables.py``."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.config_tables import (
    MOST_PARTS,
    REDIS_FILES,
    Camera,
    Curve,
    Drift,
    DropPolicy,
    EngineSettings,
    Health,
    Limits,
    Line,
    Logging,
    Metrics,
    Name,
    Redis,
    Section,
    Socket,
    Spool,
    Swap,
)
from pipeline.plc.settings import Plc

__all__ = [
    "MOST_PARTS",
    "Camera",
    "Config",
    "ConfigError",
    "Drift",
    "DropPolicy",
    "Health",
    "Limits",
    "Logging",
    "Redis",
    "Socket",
    "Spool",
    "Swap",
    "load",
    "parse",
]


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value and what is allowed."""


class Config(Section):
    """The whole file."""

    line: Line = Line()
    sockets: tuple[Socket, ...] = Field((Socket(),), min_length=1)
    curve: Curve = Curve()
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    swap: Swap = Swap()
    redis: Redis = Redis()
    spool: Spool = Spool()
    health: Health = Health()
    drift: Drift = Drift()
    metrics: Metrics = Metrics()
    plc: Plc = Plc()
    logging: Logging = Logging()
    cameras: dict[Name, Camera] = Field(min_length=1)

    def engine_of(self, camera: str) -> str:
        """The engine that a camera's parts go to."""
        return self.cameras[camera].engine or self.engine.name

    def engines(self) -> list[str]:
        """Every engine that a camera or a recipe names, once."""
        recipes = (engine for camera in self.cameras.values() for engine in (camera.recipes or {}).values())
        return sorted({*map(self.engine_of, self.cameras), *recipes})

    @model_validator(mode="after")
    def _plc_cameras_exist(self) -> Config:
        strange = {*self.plc.cameras, *self.plc.gates} - set(self.cameras)
        if strange:
            msg = f"plc: no camera {', '.join(sorted(strange))} in [cameras]"
            raise ValueError(msg)
        return self


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
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, numbers without end
        msg = f"{path}: not valid TOML: {error}"
        raise ConfigError(msg) from error
    return _resolved(parse(raw, str(path)), path.resolve().parent)


def _resolved(config: Config, base: Path) -> Config:
    """The config with every path relative to its file."""
    keys = config.engine.trusted_keys
    engine = config.engine.model_copy(
        update={"store": base / config.engine.store, "trusted_keys": None if keys is None else base / keys}
    )
    spool = config.spool.model_copy(update={"path": base / config.spool.path})
    curve = config.curve.model_copy(update={"keys": base / config.curve.keys})
    files = {name: str(base / value) for name in REDIS_FILES if (value := getattr(config.redis, name))}
    redis = config.redis.model_copy(update=files)
    return config.model_copy(update={"engine": engine, "curve": curve, "redis": redis, "spool": spool})


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
