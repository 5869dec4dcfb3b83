"""``dmdd compare``: methods x data sets x seeds in one table."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import MissingExtraError

if TYPE_CHECKING:
    from train.compare import Variant


def compare(
    data: Annotated[list[Path], typer.Argument(help="Folders with train/good/, test/<class>/, ground_truth/<class>/.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Separated by commas: a method of this project, a peer (patchcore, padim, supersimplenet) or"
            " MODULE:CLASS; options of its own in brackets, as in dmdd[steps=3000]."
        ),
    ] = "dmdd,adps,patchcore,padim,supersimplenet",
    seeds: Annotated[int, typer.Option(help="Seeds 0 to N-1.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the results; cells that are there are kept.")] = Path("compare"),
    steps: Annotated[int, typer.Option(help="Training steps of this project's methods; 0: their own.", min=0)] = 0,
    coreset: Annotated[float, typer.Option(help="Share of patches that PatchCore keeps.", min=1e-4, max=1)] = 0.1,
    backbone: Annotated[str, typer.Option(help="Of every method.")] = "efficientnet_lite0",
    weights: Annotated[Path | None, typer.Option(help="Local weights of the backbone.")] = None,
    size: Annotated[str, typer.Option(help="Input of every method: WIDTHxHEIGHT or one number.")] = "256",
    jobs: Annotated[int, typer.Option(help="Cells at a time; the CPUs are divided among them.", min=1)] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what has a result.")] = False,
) -> None:
    """Measure methods on labelled data sets, several seeds each, and write one table: comparison.md, comparison.json.

    Each cell runs in a process of its own and leaves one file, so that a comparison that was killed goes on with the
    same command. Exit code 1 if a cell failed. Example:

      dmdd compare data/washer data/cap --methods dmdd,patchcore,padim --seeds 3 --out compare
    """
    from train import compare as cells
    from train.comparison import as_json, markdown

    asked = cells.variants(methods)
    _check_installed(asked)
    shared: dict[str, Any] = {"backbone": backbone, "size": size}
    if weights is not None:
        shared["weights"] = str(weights.resolve())
    own = {"patchcore": {"coreset": coreset}}
    told = [(v, {**shared, **own.get(v.method, {} if v.contender or not steps else {"steps": steps})}) for v in asked]
    outcomes = cells.run(
        cells.plan(data, told, seeds), out, jobs=jobs, fresh=fresh, say=lambda text: typer.echo(text, err=True)
    )
    (out / "comparison.json").write_bytes(as_json(outcomes))
    (out / "comparison.md").write_text(markdown(outcomes))
    typer.echo(markdown(outcomes))
    raise typer.Exit(int(any(outcome.result is None for outcome in outcomes)))


def _check_installed(asked: list[Variant]) -> None:
    """What a cell would miss is said before the first of them is trained."""
    from train.compare import PEERS, ROOT, ComparisonError

    peers = [variant.method for variant in asked if variant.method in PEERS]
    if peers and not (ROOT / "benchmarks").is_dir():
        msg = f"{', '.join(peers)}: peers come with the repository, not with the package; run this in a checkout"
        raise ComparisonError(msg)
    for package, extra in (("torch", "train"), *((("anomalib", "peers"),) if peers else ())):
        if find_spec(package) is None:
            raise MissingExtraError(extra, package)
