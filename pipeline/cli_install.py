"""``dmdd install`` and ``dmdd uninstall``: the services of a line on a box."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

RootOption = Annotated[Path, typer.Option("--root", help="Folder that stands for /; for images and for a try.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say every step, and do none.")]


def install(
    root: RootOption = Path("/"),
    source: Annotated[
        Path | None, typer.Option("--from", help="Checkout to take units and config from. Default: this version's own.")
    ] = None,
    program: Annotated[
        Path, typer.Option(help="Environment that the units start. Default: the one of this command.")
    ] = Path(sys.prefix),
    dry_run: DryRunOption = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Bring the files of the version before back.")] = False,
) -> None:
    """Install or upgrade the services of a line on this box: user, folders, units, limits of the log, a first config.

    It starts nothing. A file that you have changed is kept; the new one lies beside it as NAME.new. A second run
    changes nothing. Examples:

      dmdd install --dry-run
      sudo /opt/dmdd-line/bin/dmdd install
      sudo /opt/dmdd-line/bin/dmdd install --rollback
    """
    from pipeline import install as steps
    from pipeline.install_box import Box

    box = Box(root, dry_run=dry_run, say=typer.echo)
    if rollback:
        steps.rollback(box)
    else:
        steps.install(box, steps.wanted(source or steps.source(), str(program)))
    _sum_up(box.changed, dry_run=dry_run)
    if box.changed and not rollback:
        typer.echo(f"next: {steps.CONFIG}/config.toml, an engine, then: systemctl enable --now dmdd-line dmdd-monitor")


def uninstall(
    root: RootOption = Path("/"),
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove config, keys, engines and the spool, too. They are lost.")
    ] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Stop and remove the services of this box. /etc/dmdd and /var/lib/dmdd stay, and so do files that you changed."""
    from pipeline import install as steps
    from pipeline.install_box import Box

    box = Box(root, dry_run=dry_run, say=typer.echo)
    steps.uninstall(box, purge=purge)
    _sum_up(box.changed, dry_run=dry_run)


def _sum_up(changed: int, *, dry_run: bool) -> None:
    verb = "would be done" if dry_run else "done"
    typer.echo(f"{changed} step(s) {verb}" if changed else "nothing to change")
