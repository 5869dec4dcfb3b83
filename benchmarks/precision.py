"""How fast an engine is in each precision on this CPU, and how far each is from the reference.

Engines take turns frame by frame, so that a busy machine is equally unfair to all; figures are medians.

    python -m benchmarks.precision BUNDLE --cache FOLDER [--precisions fp32,bf16,int8] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from engines import bundle as bundles
from engines.build import ParityError, Target, compile_engine, parity_gate
from engines.bundle import Bundle
from engines.lane import Lane


def gate(bundle: Bundle, lane: Lane) -> str:
    """The gate's verdict in words."""
    try:
        parity_gate(bundle, lane)
    except ParityError:
        return "refused"
    return "passed"


def distances(bundle: Bundle, lane: Lane) -> tuple[float, float]:
    """Largest difference of a score and of a heatmap's mean level from the reference, frame by frame."""
    parity, found = bundle.parity(), []
    for frame, score, heatmap in zip(parity.frames, parity.scores, parity.heatmaps, strict=True):
        lane.frames[0] = frame
        lane.submit(1)
        lane.wait(60)
        off = np.abs(lane.heatmaps[0].astype(np.int16) - heatmap).mean()
        found.append((abs(float(lane.scores[0] - score)), float(off)))
    return max(score for score, _ in found), max(off for _, off in found)


def latencies(bundle: Bundle, lanes: dict[str, Lane], rounds: int) -> dict[str, float]:
    """Median milliseconds of one frame on each lane, the lanes taking turns."""
    frames, taken = bundle.parity().frames, {name: list[float]() for name in lanes}
    for turn in range(rounds):
        for name, lane in lanes.items():
            lane.frames[0] = frames[turn % len(frames)]
            begin = time.perf_counter()
            lane.submit(1)
            lane.wait(60)
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: float(np.median(times)) for name, times in taken.items()}


def measure(bundle: Bundle, precisions: list[str], cache: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """One row a precision; the first one is what speed is compared with."""
    targets = {p: Target(precision=p, lanes=1, max_batch=2, threads=threads, cache=str(cache)) for p in precisions}
    engines = {p: compile_engine(bundle, target) for p, target in targets.items()}
    lanes = {p: engine.make_lane() for p, engine in engines.items()}
    rows = []
    for name, lane in lanes.items():
        score, heatmap = distances(bundle, lane)
        rows.append({"precision": name, "score_off": score, "heatmap_off": heatmap, "gate": gate(bundle, lane)})
    median = latencies(bundle, lanes, rounds)
    for row in rows:
        row["ms"], row["speedup"] = median[row["precision"]], median[precisions[0]] / median[row["precision"]]
    for precision, lane in lanes.items():
        lane.close()
        engines[precision].close()
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = measure(bundles.load(given.bundle), given.precisions.split(","), given.cache, given.rounds, given.threads)
    for row in rows:
        print(  # noqa: T201
            f"{row['precision']}: {row['ms']:.1f} ms ({row['speedup']:.2f} times as fast), score off by at most"
            f" {row['score_off']:.4f}, heatmap by {row['heatmap_off']:.2f} levels; gate: {row['gate']}"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
