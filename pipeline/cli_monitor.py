"""``dmdd monitor``: the page."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import MissingExtraError


def monitor(
    config: Annotated[Path, typer.Option("--config", "-c", help="The config file of the line.")] = Path("config.toml"),
    listen: Annotated[str, typer.Option(help="HOST:PORT; on another address than this box's, put TLS before it.")] = (
        "127.0.0.1:8080"
    ),
    password_file: Annotated[
        Path | None,
        typer.Option(help="A hash that --make-password made, or the name of a systemd credential; else read-only."),
    ] = None,
    make_password: Annotated[
        Path | None, typer.Option("--make-password", help="Ask for a password, write its hash to this file, and end.")
    ] = None,
    https: Annotated[
        bool, typer.Option("--https", help="A proxy before it speaks TLS: cookies for https alone.")
    ] = False,
) -> None:
    """Show the line in a browser: live verdicts, rejects with heatmaps, rates, drift, the threshold on trial.

    It reads Redis alone, so it can run on any box. Without a password nobody can change anything. Example:

      dmdd monitor --config config.toml --listen 0.0.0.0:8080
    """
    for package in ("argon2", "starlette", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtraError("monitor", package)
    if make_password is not None:
        _write_password(make_password)
        return
    from pipeline import config as settings
    from pipeline import logs
    from pipeline.page.serve import serve

    loaded = settings.load(config)
    logs.configure(loaded.logging)
    host, _, port = listen.rpartition(":")
    if not port.isdecimal():
        raise typer.BadParameter(f"{listen!r}: expected HOST:PORT, such as 127.0.0.1:8080")
    serve(loaded, host, int(port), _read_hash(password_file), secure=https)


def _write_password(path: Path) -> None:
    from pipeline.page.auth import hashed

    password = typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(hashed(password) + "\n")
    typer.echo(f"{path}: written; start the page with --password-file {path}")


def _read_hash(path: Path | None) -> str:
    if path is None:
        return ""
    credential = Path(os.environ.get("CREDENTIALS_DIRECTORY", "")) / path
    return (path if path.is_absolute() or not credential.is_file() else credential).read_text().strip()
