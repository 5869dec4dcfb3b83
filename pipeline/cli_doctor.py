"""``dmdd doctor``: the checks of ``pipeline/doctor.py``, printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.checks import Check

COLOURS = {"OK": typer.colors.GREEN, "WARN": typer.colors.YELLOW, "FAIL": typer.colors.RED}


def doctor(
    config: Annotated[Path, typer.Option("--config", "-c", help="The config file.")] = Path("config.toml"),
    json: Annotated[Path | None, typer.Option("--json", help="Write the findings to this file as JSON.")] = None,
) -> None:
    """Check whether this box can run the line: driver, libraries, Redis, sockets, disk, clock, rights, engines.

    Run it as the line's user. Exit code 1 if a check failed; warnings alone are 0.
    """
    import msgspec

    from pipeline.doctor import examine, failed

    checks = examine(config)
    for check in checks:
        _print(check)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(checks)) + b"\n")
    raise typer.Exit(1 if failed(checks) else 0)


def _print(check: Check) -> None:
    typer.echo(f"{typer.style(f'{check.level:4}', fg=COLOURS[check.level])} {check.name}: {check.found}")
    if check.remedy:
        typer.echo(f"       -> {check.remedy}")
