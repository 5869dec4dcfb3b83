"""``dmdd plc``: bridges from the line's verdicts in Redis to a PLC."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import MissingExtraError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.plc.bridge import Driver
    from pipeline.plc.settings import Plc

plc = typer.Typer(no_args_is_help=True, help="Drive a PLC from the line's verdicts.", rich_markup_mode=None)
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The config file of the line.")]


@plc.command()
def modbus(config: ConfigOption = Path("config.toml")) -> None:
    """Modbus TCP: serve verdicts in holding registers that the PLC polls, or write them to the PLC.

    Settings: [plc] and [plc.modbus] of the config; registers: docs/plc.md. Example:

      dmdd plc modbus --config config.toml
    """

    def make(settings: Plc) -> Driver:
        from pipeline.plc.modbus import driver

        return driver(settings.modbus, settings.cameras)

    _run(config, "pymodbus", make)


@plc.command()
def opcua(config: ConfigOption = Path("config.toml")) -> None:
    """OPC UA: serve verdicts as nodes that are named after OPC 40100, machine vision.

    Settings: [plc] and [plc.opcua] of the config; nodes: docs/plc.md. Example:

      dmdd plc opcua --config config.toml
    """

    def make(settings: Plc) -> Driver:
        from pipeline.plc.opcua import Server, read_password

        own = settings.opcua
        password = read_password(own.password_file, os.environ.get("CREDENTIALS_DIRECTORY", "")) if own.user else ""
        return Server(own, settings.cameras, password)

    _run(config, "asyncua", make)


def _run(path: Path, package: str, make: Callable[[Plc], Driver]) -> None:
    from pipeline import config as settings
    from pipeline import logs

    if find_spec(package) is None:
        raise MissingExtraError("plc", package)
    config = settings.load(path)
    logs.configure(config.logging)
    asyncio.run(_serve(config, make))


async def _serve(config: Config, make: Callable[[Plc], Driver]) -> None:
    from pipeline.plc.bridge import Bridge
    from pipeline.plc.source import Source
    from pipeline.records import Keys
    from pipeline.redis_client import connect

    plc = config.plc.of(tuple(config.cameras))
    source = Source(lambda: connect(config.redis, config.line.name), Keys(config.line.name), plc.cameras)
    bridge = Bridge(plc, source, make(plc))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, bridge.stop)
    await bridge.run()
