"""``dmdd engines`` and ``dmdd build``: look at, sign, validate, activate, roll back and prune engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engines.build import FrameDifference, Target
    from engines.bundle import Bundle
    from engines.store import Store
    from pipeline.config import Config
    from pipeline.gate import GateReport

engines = typer.Typer(
    no_args_is_help=True, help="Look at, add, sign, activate and roll back engines.", rich_markup_mode=None
)

StoreOption = Annotated[Path, typer.Option("--store", envvar="DMDD_STORE", help="Folder of the engine store.")]
ConfigStoreOption = Annotated[
    Path | None,
    typer.Option("--store", envvar="DMDD_STORE", help="Folder of the engine store; default: the config's, or store."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Take store, keys, target, precision, lanes and batch of this line's config."),
]
NameArgument = Annotated[str, typer.Argument(help="name or name@version.")]
TargetOption = Annotated[str, typer.Option(help="openvino or tensorrt.")]
PrecisionOption = Annotated[str, typer.Option(help="Arithmetic, as engine.precision in the config.")]
ConfigTargetOption = Annotated[str | None, typer.Option("--target", help="openvino (default) or tensorrt.")]
ConfigPrecisionOption = Annotated[
    str | None, typer.Option("--precision", help="Arithmetic, as engine.precision in the config; default fp32.")
]
LanesOption = Annotated[int | None, typer.Option("--lanes", help="Lanes to validate; default 2.", min=1)]
BatchOption = Annotated[int | None, typer.Option("--max-batch", help="Largest batch; default 8.", min=1)]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")]
ImagesOption = Annotated[
    Path | None, typer.Option(help="int8: a folder of images to measure ranges on, beside the bundle's own frames.")
]
KeyOption = Annotated[Path, typer.Option("--key", help="The private key, as `dmdd engines keygen` made it.")]
STORE = Path("store")


@engines.command("list")
def list_engines(store: ConfigStoreOption = None, config: ConfigOption = None) -> None:
    """List all versions of all engines. Every file is verified; a version that is refused says why."""
    from rich.console import Console

    from pipeline.engine_list import engine_table

    opened = _open(store, _load(config))
    if not opened.names():
        typer.echo(f"no engines in {opened.root}; `dmdd train` makes one")
        return
    Console(width=None if Console().is_terminal else 160).print(engine_table(opened))


@engines.command()
def show(engine: NameArgument, store: StoreOption = STORE) -> None:
    """Verify an engine's files, choose its threshold again from the stored scores, and print its manifest."""
    import msgspec

    from engines.store import Store

    bundle = Store(store).resolve(engine)
    typer.echo(msgspec.json.format(msgspec.json.encode(bundle.manifest), indent=2).decode())
    typer.echo(f"threshold: {_check_threshold(bundle)}", err=True)
    typer.echo(f"verified: {bundle.folder}, sha256 {bundle.digest}", err=True)


@engines.command()
def verify(
    engine: NameArgument,
    store: ConfigStoreOption = None,
    config: ConfigOption = None,
    target: ConfigTargetOption = None,
    precision: ConfigPrecisionOption = None,
    lanes: LanesOption = None,
    max_batch: BatchOption = None,
    json: JsonOption = None,
) -> None:
    """Verify files, signature and threshold; then the parity gate on every lane at every batch size.

    The report of the gate is kept beside the version in the store.
    """
    from engines import signing

    settings = _load(config)
    opened = _open(store, settings)
    bundle = opened.resolve(engine)
    signer = signing.check(bundle, opened.trust)
    typer.echo(f"files: as in the manifest, sha256 {bundle.digest}")
    typer.echo(f"signature: {f'by key {signer}' if signer else 'none'}")
    typer.echo(f"threshold: {_check_threshold(bundle)}")
    report = _gate(opened, bundle, _target(settings, target, precision, lanes, max_batch), json)
    typer.echo(f"{bundle.label} reproduces its reference on {report.target.kind} in {report.target.precision}")


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
def keygen(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; FILE.pub is the public one.")],
) -> None:
    """Make a key pair to sign engines with. Keep the private key off the line's box; trust the public one there."""
    from engines import signing

    identity = signing.keygen(file)
    typer.echo(f"key {identity}: private {file}, public {file}{signing.PUBLIC}")


@engines.command()
def sign(engine: NameArgument, key: KeyOption, store: StoreOption = STORE) -> None:
    """Sign an engine: the newest version where none is named, or a bundle's folder."""
    from engines import bundle, signing
    from engines.store import Store

    opened = Store(store)
    if (Path(engine) / bundle.MANIFEST).is_file():
        signer = signing.sign(bundle.load(Path(engine)), key)
    else:
        name, version = _newest(opened, engine)
        signer, engine = opened.sign(name, version, key), f"{name}@{version}"
    typer.echo(f"{engine} is signed by key {signer}")


@engines.command()
def activate(
    engine: NameArgument,
    store: ConfigStoreOption = None,
    config: ConfigOption = None,
    target: ConfigTargetOption = None,
    precision: ConfigPrecisionOption = None,
    lanes: LanesOption = None,
    max_batch: BatchOption = None,
) -> None:
    """Verify an engine, pass it through the parity gate on this machine and make it the active version."""
    settings = _load(config)
    opened = _open(store, settings)
    name, version = _newest(opened, engine)
    bundle = opened.get(name, version)
    _check_threshold(bundle)
    _gate(opened, bundle, _target(settings, target, precision, lanes, max_batch))
    opened.activate(name, bundle.version)
    typer.echo(f"{bundle.label} is active; a running line that follows it changes over, others take it at their start")


@engines.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Name of the engine.")],
    store: ConfigStoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Make the version active that was active before."""
    typer.echo(f"{name}@{_open(store, _load(config)).rollback(name)} is active again")


@engines.command()
def prune(
    keep: Annotated[int, typer.Option("--keep", help="How many of the newest versions stay.", min=1)],
    name: Annotated[str, typer.Argument(help="Name of the engine; default: all.")] = "",
    store: ConfigStoreOption = None,
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove old versions: never the active one, the one before it, or one that the config names."""
    settings = _load(config)
    opened = _open(store, settings)
    named = [reference.partition("@") for reference in settings.engines()] if settings else []
    for each in [name] if name else opened.names():
        pinned = [version for engine, _, version in named if engine == each and version]
        gone = opened.prune(each, keep, pinned, dry_run=dry_run)
        said = "would be removed" if dry_run else "removed"
        typer.echo(f"{each}: {' '.join(gone) or 'nothing'} {said}; {' '.join(opened.versions(each))} in the store")


def build(
    engine: NameArgument,
    store: ConfigStoreOption = None,
    config: ConfigOption = None,
    target: ConfigTargetOption = None,
    precision: ConfigPrecisionOption = None,
    images: ImagesOption = None,
    json: JsonOption = None,
) -> None:
    """Make an engine ready ahead of time: its graph or plan in the line's cache, then the parity gate.

    Give --config, so that the line finds what was made.
    """
    from engines.precision import rewrite

    settings = _load(config)
    opened = _open(store, settings)
    bundle = opened.resolve(engine)
    chosen = _target(settings, target, precision, None, None)
    if images is not None:
        rewrite(bundle, chosen.precision, chosen.cache_folder, images)
    _gate(opened, bundle, chosen, json)
    typer.echo(f"{bundle.label} reproduces its reference on {chosen.kind} in {chosen.precision}")


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


def _load(config: Path | None) -> Config | None:
    from pipeline import config as settings

    return settings.load(config) if config is not None else None


def _open(store: Path | None, config: Config | None) -> Store:
    """The store that an option, else the config names, with the config's keys."""
    from engines import signing
    from engines.store import Store

    if config is None:
        return Store(store or STORE)
    settings = config.engine
    trust = signing.load_trust(settings.trusted_keys, required=settings.require_signature)
    return Store(store or settings.store, trust)


def _target(
    config: Config | None, kind: str | None, precision: str | None, lanes: int | None, max_batch: int | None
) -> Target:
    """What the options say; for the rest what the config says, or the defaults."""
    import msgspec

    from engines.build import Target

    target = Target()
    if config is not None:
        line = config.engine
        target = Target(
            line.target, line.precision, line.lanes, line.max_batch, line.threads, line.cache, line.exact_batches
        )
    asked = {"kind": kind, "precision": precision, "lanes": lanes, "max_batch": max_batch}
    return msgspec.structs.replace(target, **{name: value for name, value in asked.items() if value is not None})


def _newest(store: Store, engine: str) -> tuple[str, str]:
    """Name and version: as given, else the newest one that there is."""
    name, _, version = engine.partition("@")
    return name, version or (store.versions(name) or [""])[-1]


def _check_threshold(bundle: Bundle) -> str:
    """Choose a threshold again from the stored scores; say what came of it."""
    from engines.calibration import verify as check

    evidence = bundle.evidence()
    if evidence is None:
        return "no scores are stored that it could be chosen from again; `dmdd calibrate` stores them"
    check(bundle.manifest.threshold, evidence)
    return f"{bundle.manifest.threshold.value:.6g}, chosen again from {len(evidence.scores)} stored scores"


def _gate(store: Store, bundle: Bundle, target: Target, json: Path | None = None) -> GateReport:
    """Run the gate, keep its report, print it, and refuse an engine that did not pass."""
    import msgspec
    from rich.console import Console

    from pipeline import gate

    report = gate.run_gate(bundle, target)
    where = gate.keep(store, bundle, report)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    Console(width=100).print(gate.frame_table(report))
    if where:
        typer.echo(f"report: {where}")
    gate.require(report)
    return report
