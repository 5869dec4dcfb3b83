"""``dmdd probe``: for whoever restarts a line that has no systemd."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def probe(
    config: Annotated[Path, typer.Option("--config", "-c", help="The config file of the line.")] = Path("config.toml"),
    ready: Annotated[bool, typer.Option("--ready", help="Ask whether it takes frames, not only lives.")] = False,
) -> None:
    """Ask the line on this box for its state; exit code 0 if it is alive. For health checks of containers.

    It asks the address in metrics.address. Redis is not asked: a line goes on without it.
    """
    from pipeline import config as settings
    from pipeline.probe import probe as ask

    answer = ask(settings.load(config).metrics.address)
    typer.echo(answer.text)
    raise typer.Exit(0 if (answer.ready if ready else answer.alive) else 1)
