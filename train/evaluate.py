"""``dmdd evaluate``: an engine's figures on labelled images, measured on the compiled engine, without torch."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from engines.build import Target, compile_engine
from engines.bundle import Bundle
from engines.frames import Pixels
from engines.store import Store
from train import data
from train.data import Sample
from train.figures import Figures, Share, figures_of
from train.metrics import Mask
from train.wording import sentences

NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Inspection:
    """What an engine said of every sample: scores ``(n,)``, heatmaps ``(n, h, w)``, seconds a part ``(n,)``."""

    scores: NDArray[np.float64]
    heatmaps: Pixels
    seconds: NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """An engine, what it was shown, what it said and how good that was.

    Attributes:
        bundle: The engine.
        precision: In which it ran.
        samples: The labelled images, in the order of ``inspection``.
        inspection: Scores, heatmaps and times.
        figures: What they are worth.
    """

    bundle: Bundle
    precision: str
    samples: list[Sample]
    inspection: Inspection
    figures: Figures

    @property
    def threshold(self) -> float:
        """Above it a part is rejected."""
        return self.bundle.manifest.threshold.value

    @property
    def good_rejected(self) -> Share:
        """Good parts above the threshold."""
        return self.figures.good_rejected or Share(0, 0)

    @property
    def defects_caught(self) -> Share:
        """Defective parts above the threshold."""
        return self.figures.defects_caught or Share(0, 0)

    def latency_ms(self, percentile: float) -> float:
        """That percentile of the time from submit to result of one image, in milliseconds."""
        return float(np.percentile(self.inspection.seconds, percentile) * 1e3)

    def sentences(self) -> list[str]:
        """The verdict on the engine in words."""
        return sentences(self.figures, self.bundle.manifest.threshold.false_reject_rate)

    def values(self) -> dict[str, Any]:
        """Every figure by its name, as it is printed and written as JSON."""
        return {
            "engine": self.bundle.label,
            "images": len(self.samples),
            **self.figures.values,
            "threshold": self.threshold,
            "good_rejected": self.good_rejected.value,
            "good_rejected_interval": self.good_rejected.interval,
            "defects_caught": self.defects_caught.value,
            "defects_caught_interval": self.defects_caught.interval,
            "latency_p50_ms": self.latency_ms(50),
            "latency_p99_ms": self.latency_ms(99),
        }


def inspect(bundle: Bundle, samples: list[Sample], precision: str, console: Console) -> Inspection:
    """Run an engine over samples one by one, as single parts on the line."""
    spec, output = bundle.manifest.input, bundle.manifest.output
    scores, seconds = np.zeros(len(samples)), np.zeros(len(samples))
    heatmaps = np.zeros((len(samples), output.height, output.width), np.uint8)
    engine = compile_engine(bundle, Target(lanes=1, max_batch=1, precision=precision))
    lane = engine.make_lane()
    try:
        lane.submit(1)  # the first run allocates; on the line that has happened before parts come
        lane.wait(30)
        for k, sample in enumerate(track(samples, "evaluating", console=console)):
            lane.frames[:1] = data.load([sample.path], spec)
            started = time.perf_counter()
            lane.submit(1)
            lane.wait(30)
            seconds[k] = time.perf_counter() - started
            scores[k], heatmaps[k] = lane.scores[0], lane.heatmaps[0]
    finally:
        lane.close()
        engine.close()
    return Inspection(scores, heatmaps, seconds)


def evaluate(bundle: Bundle, samples: list[Sample], precision: str, console: Console) -> Evaluation:
    """Run an engine over labelled samples and measure what it said.

    Pixel figures compare heatmaps, enlarged bilinearly, with masks, both at the engine's input size.

    Raises:
        DataError: if an image or a mask cannot be decoded.
        BuildError: if the engine cannot be compiled here.
    """
    inspection = inspect(bundle, samples, precision, console)
    figures = figures_of(
        inspection.scores,
        [sample.label for sample in samples],
        _maps(bundle, samples, inspection),
        threshold=bundle.manifest.threshold.value,
    )
    return Evaluation(bundle, precision, samples, inspection, figures)


def _maps(
    bundle: Bundle, samples: list[Sample], inspection: Inspection
) -> Iterator[tuple[NDArray[np.float32], Mask | None]]:
    """Each heatmap at the engine's input size, with its mask, one after the other."""
    height, width = bundle.manifest.input.height, bundle.manifest.input.width
    for sample, heatmap in zip(samples, inspection.heatmaps, strict=True):
        enlarged = cv2.resize(heatmap.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        mask = None if sample.mask is None else data.load_mask(sample.mask, height, width)
        yield np.asarray(enlarged, np.float32), mask


def evaluate_command(
    reference: str,
    folder: Path,
    *,
    store: Path,
    precision: str,
    json_file: Path | None,
    report: Path | None,
    write_report: bool,
) -> Evaluation:
    """Measure an engine, print the figures and write the report.

    Args:
        reference: Engine: name, name@version or a bundle's folder.
        folder: The labelled images.
        store: Folder of the engine store.
        precision: ``fp32`` or ``bf16``.
        json_file: Where to write every figure as JSON; None for nowhere.
        report: The HTML file to write; None for ``evaluation-<name>-<version>.html`` in the current folder.
        write_report: Whether to write it.
    """
    bundle = Store(store).resolve(reference)
    console = Console(stderr=True)
    evaluation = evaluate(bundle, data.labelled_samples(folder), precision, console)
    _print(evaluation)
    if json_file is not None:
        json_file.write_text(as_json(evaluation) + "\n")
    if write_report:
        from train.report import write  # noqa: PLC0415 - only where one is wanted

        target = report or Path(f"evaluation-{NAMES.sub('_', bundle.manifest.name)}-{bundle.version}.html")
        write(evaluation, folder.resolve().name, target)
        console.print(f"report: {target}", soft_wrap=True, markup=False, highlight=False)
    return evaluation


def as_json(evaluation: Evaluation) -> str:
    """Every figure, and the classes under ``classes``; what is not defined is null, which JSON has, unlike NaN."""
    classes = {label: _defined(found.row()) for label, found in evaluation.figures.classes.items()}
    return json.dumps({**_defined(evaluation.values()), "classes": classes}, indent=2)


def _defined(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}


def _print(evaluation: Evaluation) -> None:
    console = Console()
    table = Table(show_header=False)
    for name, value in evaluation.values().items():
        table.add_row(name, _shown(value))
    console.print(table)
    for label, found in evaluation.figures.classes.items():
        caught = found.caught or Share(0, 0)
        line = f"{label}: {caught.hits} of {caught.count} caught, image AUROC {found.image_auroc:.3f}"
        pixel_ap = f", pixel AP {found.pixels['pixel_ap']:.3f}" if found.pixels else ""
        console.print(line + pixel_ap, markup=False, highlight=False)
    for sentence in evaluation.sentences():
        console.print(sentence, markup=False, highlight=False)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(f"{end:.4f}" for end in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)
