"""``dmdd evaluate``: an engine's figures on labelled images, measured on the compiled engine, without torch."""

from __future__ import annotations

import json
import time
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
from train.metrics import PixelMetrics, image_metrics


@dataclass(frozen=True)
class Inspection:
    """What an engine said of every sample: scores ``(n,)``, heatmaps ``(n, h, w)``, seconds a part ``(n,)``."""

    scores: NDArray[np.float64]
    heatmaps: Pixels
    seconds: NDArray[np.float64]


def inspect(bundle: Bundle, samples: list[Sample], precision: str, console: Console) -> Inspection:
    """Run an engine over samples one by one, as single parts on the line."""
    spec, output = bundle.manifest.input, bundle.manifest.output
    scores, seconds = np.zeros(len(samples)), np.zeros(len(samples))
    heatmaps = np.zeros((len(samples), output.height, output.width), np.uint8)
    engine = compile_engine(bundle, Target(lanes=1, max_batch=1, precision=precision))
    lane = engine.make_lane()
    try:
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


def measure(bundle: Bundle, samples: list[Sample], result: Inspection) -> dict[str, Any]:
    """Image metrics, pixel metrics where there are masks, verdicts at the threshold, latency.

    Pixel metrics compare heatmaps, enlarged bilinearly, with masks, both at the engine's input size. Defective
    images without a mask count for the image metrics alone.
    """
    spec, threshold = bundle.manifest.input, bundle.manifest.threshold.value
    defective = np.array([sample.defective for sample in samples])
    pixels = PixelMetrics()
    for sample, heatmap in zip(samples, result.heatmaps, strict=True):
        if sample.defective and sample.mask is None:
            continue
        mask = np.zeros((spec.height, spec.width), bool)
        if sample.mask is not None:
            mask = data.load_mask(sample.mask, spec.height, spec.width)
        enlarged = cv2.resize(heatmap.astype(np.float32), (spec.width, spec.height), interpolation=cv2.INTER_LINEAR)
        pixels.add(np.asarray(enlarged, np.float32), mask)
    rejected = result.scores > threshold
    return {
        "engine": bundle.label,
        "images": len(samples),
        **image_metrics(result.scores, defective),
        **pixels.result(),
        "threshold": threshold,
        "good_rejected": float(rejected[~defective].mean()),
        "defects_caught": float(rejected[defective].mean()) if defective.any() else float("nan"),
        "latency_p50_ms": float(np.percentile(result.seconds, 50) * 1e3),
        "latency_p99_ms": float(np.percentile(result.seconds, 99) * 1e3),
    }


def per_class(samples: list[Sample], result: Inspection, threshold: float) -> dict[str, dict[str, float]]:
    """Image AUROC against good parts and the share caught, of each kind of defect."""
    labels = np.array([sample.label for sample in samples])
    table = {}
    for label in sorted(set(labels) - {data.GOOD}):
        chosen = (labels == label) | (labels == data.GOOD)
        scores, defective = result.scores[chosen], labels[chosen] == label
        table[str(label)] = {
            "images": int(defective.sum()),
            "image_auroc": image_metrics(scores, defective)["image_auroc"],
            "caught": float((scores[defective] > threshold).mean()),
        }
    return table


def evaluate_command(reference: str, folder: Path, *, store: Path, precision: str, json_file: Path | None) -> None:
    """Measure an engine and print the figures."""
    bundle = Store(store).resolve(reference)
    samples = data.labelled_samples(folder)
    result = inspect(bundle, samples, precision, Console(stderr=True))
    figures = measure(bundle, samples, result)
    classes = per_class(samples, result, bundle.manifest.threshold.value)
    console = Console()
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    for label, row in classes.items():
        console.print(f"{label}: {row['images']} images, AUROC {row['image_auroc']:.3f}, caught {row['caught']:.3f}")
    if json_file is not None:
        json_file.write_text(json.dumps({**figures, "classes": classes}, indent=2) + "\n")
