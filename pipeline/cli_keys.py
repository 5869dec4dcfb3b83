"""``dmdd keys``: keys of line and cameras (CURVE), and passwords of Redis users."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(no_args_is_help=True, help="Make keys for cameras, line and Redis.", rich_markup_mode=None)

FolderOption = Annotated[Path, typer.Option("--folder", help="Folder of keys, as curve.keys in the config.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there; who relies on it is shut out.")]
KEYS = Path("keys")


@keys.command()
def server(folder: FolderOption = KEYS, force: ForceOption = False) -> None:
    """Make the line's key pair. server.key_secret stays on its box, cameras get server.key."""
    from pipeline import curve

    pair = curve.generate(folder, curve.SERVER, force=force)
    typer.echo(f"secret: {folder / curve.SERVER}{curve.SECRET}, for the line's user only: chown it to that user")
    typer.echo(f"public: {folder / curve.SERVER}{curve.PUBLIC}, for every camera: {pair.public.decode()}")


@keys.command()
def camera(
    name: Annotated[str, typer.Argument(help="Camera id, as in [cameras.NAME].")],
    folder: FolderOption = KEYS,
    force: ForceOption = False,
) -> None:
    """Make a camera's key pair. NAME.key stays with the line, NAME.key_secret goes to the camera's box."""
    from pipeline import curve
    from pipeline.wire import CAMERA_ID

    if not CAMERA_ID.fullmatch(name):
        raise typer.BadParameter(f"{name!r}: 1 to 64 letters, digits, '_', '.', '-'", param_hint="NAME")
    place = folder / curve.CAMERAS
    curve.generate(place, name, force=force)
    typer.echo(f"public: {place / name}{curve.PUBLIC}, for the line: it lets this key send as {name}, once restarted")
    typer.echo(f"secret: {place / name}{curve.SECRET}, for the camera's box: move it there, leave no copy here")


@keys.command("list")
def list_keys(folder: FolderOption = KEYS) -> None:
    """Check the keys in a folder, and list which public key may send as which camera."""
    from pipeline import curve

    found = curve.load_server(folder)
    typer.echo(f"{found.pair.public.decode()}  {curve.SERVER}")
    for name, public in found.cameras.items():
        left = folder / curve.CAMERAS / f"{name}{curve.SECRET}"
        typer.echo(f"{public}  {name}" + ("  its secret key is still here: move it" if left.exists() else ""))


@keys.command()
def redis(
    template: Annotated[Path, typer.Argument(help="The ACL file to fill in, such as deploy/redis/users.acl.")],
    line: Annotated[str, typer.Option(help="Name of the line, as line.name in the config.")] = "line1",
    folder: FolderOption = KEYS,
    force: ForceOption = False,
) -> None:
    """Fill in a Redis ACL file: a new password for each user in it, hashed there, in clear in a file of its own."""
    from pipeline.redis_acl import fill

    written = fill(template, line, folder / "redis", force=force)
    typer.echo(f"for Redis: {written[0]}, as its aclfile")
    for file in written[1:]:
        typer.echo(f"password: {file}, for the one who logs in as {file.stem}")
