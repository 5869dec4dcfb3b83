"""The papers' protocols on public data sets, and the papers' figures beside ours.

For those who have the data and the weights of WideResNet50-2; a GPU is advised. One category after the other is
trained with the papers' settings and measured; what was measured is kept, so a run that was killed goes on.

    python -m benchmarks.papers mvtec DATA --method dmdd --weights wide_resnet50_2.pth --out FOLDER
    python -m benchmarks.papers kolektor DATA --method adps --out FOLDER

A published figure is its authors' claim. Where their code is not public, it is not known whether they took the best
epoch by the test set, nor which of two definitions of per-region overlap they used: both of ours are printed. Here the
last step is taken, always.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import layouts
from benchmarks.layouts import Layout
from pipeline.errors import explain
from train import data
from train.compare import Cell, Outcome, Variant, plan, run
from train.comparison import Spread, as_json, markdown

SETS: Final[dict[str, tuple[str, Layout]]] = {
    "mvtec": ("MVTec AD", layouts.mvtec),
    "mpdd": ("MPDD", layouts.mvtec),
    "visa": ("VisA", layouts.visa),
    "kolektor": ("KolektorSDD2", layouts.kolektor),
}
BACKBONE: Final = "wide_resnet50_2"
ADPS_EPOCHS: Final = 300
ADPS_BATCH: Final = 32
FIGURES: Final = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC, all pixels of a category together",
    "pixel_ap": "pixel AP, all pixels of a category together",
    "aupro": "AUPRO up to FPR 0.3, pooled (Bergmann et al., IJCV 2021)",
    "aupro_0.05": "AUPRO up to FPR 0.05, pooled",
    "pro_per_image": "PRO up to FPR 0.3, per image (RD4AD and its descendants)",
}
"""Our figures, by name, with their definitions."""


@dataclass(frozen=True)
class Published:
    """A figure of a paper, in per cent, and the figures of ours that it may be compared with."""

    method: str
    dataset: str
    name: str
    value: float
    ours: tuple[str, ...]


PUBLISHED: Final = (
    Published("dmdd", "mvtec", "pixel AUROC", 98.85, ("pixel_auroc",)),
    Published("dmdd", "mvtec", "PRO", 96.13, ("pro_per_image", "aupro")),
    Published("dmdd", "mpdd", "detection AUROC", 98.1, ("image_auroc",)),
    Published("dmdd", "mpdd", "segmentation AUROC", 98.96, ("pixel_auroc",)),
    Published("dmdd", "mpdd", "AUPRO", 97.66, ("pro_per_image", "aupro")),
    Published("adps", "mvtec", "pixel AP", 77.4, ("pixel_ap",)),
    Published("adps", "kolektor", "pixel AP", 72.5, ("pixel_ap",)),
)
"""DMDD: Liu et al., ACM MM 2024, arXiv 2408.03888. ADPS: Xing et al., IEEE TNNLS 2025, arXiv 2210.10495."""


def settings(method: str, images: int, steps: int) -> dict[str, Any]:
    """What a method is told, by its paper or, where that is silent, by its authors' published relatives.

    Args:
        method: ``dmdd`` or ``adps``.
        images: Good images of the category.
        steps: Optimiser steps; 0 for the protocol's.
    """
    shared = {"backbone": BACKBONE, "size": "256", "strides": "4+8+16"}
    if method == "adps":
        epochs = ADPS_EPOCHS * math.ceil(images / ADPS_BATCH)
        return {**shared, "k": 8, "batch": ADPS_BATCH, "rate": 1e-4, "steps": steps or epochs}
    return {**shared, "batch": 16, "steps": steps or 5000}


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """Every category of the data set as cells."""
    _, layout = SETS[arguments.dataset]
    variant, cells = Variant(arguments.method, arguments.method, {}), []
    for folder in layout(arguments.data, arguments.out / "links" / arguments.dataset):
        told = settings(arguments.method, len(data.good_images(folder)), arguments.steps)
        if arguments.weights is not None:
            told["weights"] = str(arguments.weights.resolve())
        cells += plan([folder], [(variant, told)], arguments.seeds)
    return cells


def beside(method: str, dataset: str, outcomes: Sequence[Outcome]) -> str:
    """Our means over the categories, the papers' figures beside them, as a Markdown table, in per cent."""
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    claims = {name: p for p in PUBLISHED if (p.method, p.dataset) == (method, dataset) for name in p.ours}
    lines = ["| figure | ours | published |", "| --- | --- | --- |"]
    for name, definition in FIGURES.items():
        # The mean over categories of the mean over seeds, as every paper of the field takes it.
        groups: dict[str, list[float | None]] = {}
        for result in results:
            groups.setdefault(result.cell.dataset, []).append(result.figures.get(name))
        spread = Spread.of(found.mean for values in groups.values() if (found := Spread.of(values)))
        ours = "-" if spread is None else f"{100 * spread.mean:.2f}"
        claim = f"{claims[name].value} ({claims[name].name})" if name in claims else "-"
        lines.append(f"| {definition} | {ours} | {claim} |")
    missing = len(outcomes) - len(results)
    note = f"{len({r.cell.dataset for r in results})} categories" + (f", {missing} cells MISSING" if missing else "")
    return "\n".join([*lines, "", f"{SETS[dataset][0]}, {method}: mean over {note}.", ""])


def main(words: Sequence[str] | None = None) -> int:
    """Train, measure, print; 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(SETS), help="which protocol")
    parser.add_argument("data", type=Path, help="folder of the data set")
    parser.add_argument("--method", choices=("dmdd", "adps"), default="dmdd")
    parser.add_argument("--weights", type=Path, help=f"weights of {BACKBONE}; default: timm fetches them")
    parser.add_argument("--out", type=Path, default=Path("papers"), help="folder of the results")
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps; 0: the protocol's")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="categories at a time")
    arguments = parser.parse_args(words)
    try:
        outcomes = run(cells_of(arguments), arguments.out, jobs=arguments.jobs, say=_say)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        parser.exit(2, f"benchmarks.papers: {message}\n")
    text = f"{markdown(outcomes)}\n{beside(arguments.method, arguments.dataset, outcomes)}"
    (arguments.out / f"{arguments.dataset}-{arguments.method}.json").write_bytes(as_json(outcomes))
    (arguments.out / f"{arguments.dataset}-{arguments.method}.md").write_text(text)
    sys.stdout.write(text)
    return int(any(outcome.result is None for outcome in outcomes))


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
