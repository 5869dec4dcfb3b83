"""``dmdd soak``: the whole line under faults, on this box, judged from what was recorded."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def soak(
    minutes: Annotated[float, typer.Option(help="How long faults are injected.", min=0.05)] = 2.0,
    cameras: Annotated[int, typer.Option(help="How many cameras send.", min=1, max=32)] = 4,
    faults: Annotated[str, typer.Option(help="all, none, or a comma-separated list of faults and groups.")] = "all",
    seed: Annotated[int, typer.Option(help="Of the schedule and of the frames.", min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="A new or empty folder for the history and the report; default: a temporary one."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Frames a second of each camera.", min=1, max=200)] = 20.0,
    list_faults: Annotated[bool, typer.Option("--list", help="Only print the kinds of fault.")] = False,
) -> None:
    """Run cameras, line and Redis on this box under a seeded schedule of faults, and check every promise.

    Needs the extra `soak`, no running Redis, no config. The report is OUT/report.md and OUT/report.json. Exit code 1 if
    a promise was broken, or the line did not recover.
    """
    from pipeline.soak.faults import FAULTS, UnknownFaultError, as_table, chosen

    if list_faults:
        typer.echo(as_table(FAULTS.values()))
        return
    from pipeline.soak.report import write
    from pipeline.soak.rig import Setup
    from pipeline.soak.run import run_soak

    try:
        kinds = chosen(faults)
    except UnknownFaultError as error:
        raise typer.BadParameter(str(error), param_hint="--faults") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process of the soak is left behind
    folder = (out or Path(tempfile.mkdtemp(prefix="dmdd-soak-"))).resolve()
    setup = Setup(folder, cameras=cameras, rate=rate, seed=seed)
    outcome = run_soak(setup, minutes, kinds, typer.echo)
    report, _ = write(outcome, folder)
    broken = len(outcome.result.violations)
    verdict = "no promise was broken" if outcome.passed else f"{broken} violations, {len(outcome.failures)} failures"
    typer.echo(f"{verdict}; report: {report}")
    raise typer.Exit(0 if outcome.passed else 1)
