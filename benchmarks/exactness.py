"""Whether the compiled engine has the figures of the torch model: ``python -m benchmarks.exactness DATA``.

Trains on the good images of ``DATA``, keeps the torch model in hand, and shows every test image to it and to the
engine that was exported from it, in each precision. How well either works is of no concern here, so few steps do.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from engines.bundle import Bundle
from engines.lane import LaneFault
from train import data
from train.commands import Learned, Options, export, learn
from train.data import Sample
from train.evaluate import evaluate
from train.export import run
from train.figures import figures_of


def of_torch(learned: Learned, samples: list[Sample]) -> dict[str, float]:
    """The figures of the torch model, from its own scores and heatmaps."""
    spec, figures = learned.spec, []
    for sample in samples:
        with torch.no_grad():
            score, heatmap = run(learned.detector, data.load([sample.path], spec))
        figures.append((float(score[0]), heatmap[0].numpy().astype(np.float32)))
    size = (spec.width, spec.height)
    maps = (
        (cv2.resize(heatmap, size), None if s.mask is None else data.load_mask(s.mask, spec.height, spec.width))
        for s, (_, heatmap) in zip(samples, figures, strict=True)
    )
    scores = np.array([score for score, _ in figures])
    return figures_of(scores, [s.label for s in samples], maps).values


def of_engine(bundle: Bundle, samples: list[Sample], precision: str, console: Console) -> dict[str, Any]:
    """The figures of the engine in a precision, or the reason why there are none."""
    try:
        return dict(evaluate(bundle, samples, precision, console).figures.values)
    except (RuntimeError, LaneFault) as error:
        return {"image_auroc": str(error)}


def main() -> None:
    """Print one row a figure: the model's, each engine's, and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--method", default="dmdd")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--precisions", default="fp32", help="Separated by commas.")
    arguments = parser.parse_args()
    console, samples = Console(stderr=True), data.labelled_samples(arguments.data)
    with tempfile.TemporaryDirectory() as folder:
        learned = learn(arguments.data, arguments.method, Options(steps=arguments.steps), Path(folder) / "run", console)
        bundle = export(learned, arguments.data.name, Path(folder) / "bundle")
        columns = {"torch": of_torch(learned, samples)}
        for precision in arguments.precisions.split(","):
            columns[precision] = of_engine(bundle, samples, precision, console)
    table = Table("figure", *columns)
    for name, value in columns["torch"].items():
        table.add_row(name, f"{value:.5f}", *(_shown(columns[p].get(name), value) for p in list(columns)[1:]))
    Console().print(table)


def _shown(found: Any, expected: float) -> str:
    return f"{found:.5f} ({found - expected:+.5f})" if isinstance(found, float) else str(found or "")


if __name__ == "__main__":
    main()
