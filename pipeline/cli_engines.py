"""``dmdd engines`` and ``dmdd build``: look at, validate, activate and roll back engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engines.build import FrameDifference
    from engines.bundle import Bundle

engines = typer.Typer(no_args_is_help=True, help="Look at, add, activate and roll back engines.", rich_markup_mode=None)

StoreOption = Annotated[Path, typer.Option("--store", envvar="DMDD_STORE", help="Folder of the engine store.")]
NameArgument = Annotated[str, typer.Argument(help="name or name@version.")]
TargetOption = Annotated[str, typer.Option(help="openvino or tensorrt.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")]
PrecisionOption = Annotated[str, typer.Option(help="fp32 or bf16.")]
STORE = Path("store")


@engines.command("list")
def list_engines(store: StoreOption = STORE) -> None:
    """List all engines; the active version is marked."""
    from engines.store import Store

    opened = Store(store)
    for name in opened.names():
        active = opened.active(name)
        versions = " ".join(f"[{v}]" if v == active else v for v in opened.versions(name))
        typer.echo(f"{name}: {versions}")
    if not opened.names():
        typer.echo(f"no engines in {store}; `dmdd train` makes one")


@engines.command()
def show(engine: NameArgument, store: StoreOption = STORE) -> None:
    """Verify an engine's files, choose its threshold again from the stored scores, and print its manifest."""
    import msgspec

    from engines.calibration import verify
    from engines.store import Store

    bundle = Store(store).resolve(engine)
    typer.echo(msgspec.json.format(msgspec.json.encode(bundle.manifest), indent=2).decode())
    if (evidence := bundle.evidence()) is not None:
        verify(bundle.manifest.threshold, evidence)
    typer.echo(f"verified: {bundle.folder}, sha256 {bundle.digest}", err=True)


@engines.command()
def add(
    folder: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    name: Annotated[str, typer.Option(help="Name in the store; default: the bundle's own.")] = "",
    store: StoreOption = STORE,
) -> None:
    """Copy a bundle into the store as a new version; it is not active yet."""
    from engines import bundle
    from engines.store import Store

    added = Store(store).add(folder, name or bundle.load(folder).manifest.name)
    typer.echo(f"added {added.label}; `dmdd engines activate {added.label}` puts it to use")


@engines.command()
def activate(
    engine: NameArgument,
    store: StoreOption = STORE,
    target: TargetOption = "openvino",
    precision: PrecisionOption = "fp32",
) -> None:
    """Pass an engine through the parity gate on this machine and make it the active version."""
    from engines.store import Store

    opened = Store(store)
    name, _, version = engine.partition("@")
    bundle = opened.get(name, version or (opened.versions(name) or [""])[-1])
    validate(bundle, target, precision)
    opened.activate(name, bundle.version)
    typer.echo(f"{bundle.label} is active; a line takes it at its next start")


@engines.command()
def rollback(name: Annotated[str, typer.Argument(help="Name of the engine.")], store: StoreOption = STORE) -> None:
    """Make the version active that was active before."""
    from engines.store import Store

    typer.echo(f"{name}@{Store(store).rollback(name)} is active again")


def build(
    engine: NameArgument,
    store: StoreOption = STORE,
    target: TargetOption = "openvino",
    precision: PrecisionOption = "fp32",
    json: JsonOption = None,
) -> None:
    """Compile an engine for a target on this machine and print how far it is from its reference."""
    import msgspec

    from engines.store import Store

    bundle = Store(store).resolve(engine)
    rows = validate(bundle, target, precision)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    for row in rows:
        if row.batch == 1:
            typer.echo(
                f"frame {row.frame}: score {row.score:.4f}, reference {row.expected:.4f},"
                f" heatmap off by {row.heatmap_mean:.3f} levels"
            )
    typer.echo(f"{bundle.label} reproduces its reference on {target} in {precision}")


def validate(bundle: Bundle, target: str, precision: str) -> list[FrameDifference]:
    """Compile a bundle and pass one lane through the parity gate.

    Raises:
        BuildError, LaneFault, ParityError: if it cannot be run here or differs from its reference.
    """
    from engines.build import Target, compile_engine, parity_gate

    engine = compile_engine(bundle, Target(kind=target, precision=precision, lanes=1, max_batch=4))
    try:
        lane = engine.make_lane()
        try:
            return parity_gate(bundle, lane)
        finally:
            lane.close()
    finally:
        engine.close()
