"""``make demo-engine``: train the demo's engine on the simulator's good parts and put it into the repository."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from rich.console import Console

from pipeline.simulator import GOOD, Simulator
from train.commands import Options, build_bundle, validate

PRODUCTS: Final = ("washer", "cap")
EACH: Final = 300
LIGHT: Final = {"statistics": "prototypes"}
"""Gaussians at every place would make the engine too large for a repository."""
SEED: Final = 20_000
"""Far from the seeds of the demo's cameras: the demo shows parts that were not trained on."""


def render(folder: Path, each: int = EACH) -> None:
    """Write good parts of every product as PNG files."""
    for product in PRODUCTS:
        simulator = Simulator(product, width=256, height=256, seed=SEED)
        for index in range(each):
            shot = simulator.render(GOOD, np.random.default_rng([SEED, index]))
            cv2.imwrite(str(folder / f"{product}-{index:04}.png"), shot.image)


def main() -> None:
    """Train and replace ``engines/demo``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--each", type=int, default=EACH)
    parser.add_argument("--target", type=Path, default=Path(__file__).parent.parent / "engines" / "demo")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "good").mkdir()
        render(folder / "good", arguments.each)
        options = Options(steps=arguments.steps, false_rejects=0.02, strides=(4, 8, 16), choices=LIGHT)
        built = build_bundle(folder, "dmdd", "demo", options, folder / "run", folder / "bundle", console)
        validate(built)
        shutil.rmtree(arguments.target, ignore_errors=True)
        shutil.copytree(built.folder, arguments.target)
    size = sum(file.stat().st_size for file in arguments.target.iterdir())
    console.print(f"{arguments.target}: {size / 2**20:.1f} MiB. {built.manifest.threshold.statement}")


if __name__ == "__main__":
    main()
