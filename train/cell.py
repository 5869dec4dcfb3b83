"""One cell of a comparison, measured in a process of its own: ``python -m train.cell`` with a task on standard input.

Every method sees the images that :func:`train.data.load` gives, and is measured by :mod:`train.figures`.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from engines.frames import InputSpec, Pixels
from train import data
from train.compare import ROOT, Cell, ComparisonError, Measurement, Task
from train.data import Sample
from train.errors import TrainingError
from train.figures import figures_of
from train.metrics import Mask, RankScale

if TYPE_CHECKING:
    from train.commands import Options

SIZE: Final = 256
OWN: Final = ("engines", "pipeline", "train", "benchmarks")
PACKAGES: Final = ("dmdd-line", "torch", "timm", "openvino", "anomalib")


@dataclass(frozen=True)
class Facts:
    """What a model costs: 1e9 multiply-accumulates an image, 1e6 bytes, and what else is worth saying."""

    gmacs: float | None = None
    megabytes: float | None = None
    about: dict[str, Any] = field(default_factory=dict)


class Contender(Protocol):
    """A method from outside this project, as a class ``(spec: InputSpec, seed: int, **options: str | int | float)``."""

    def fit(self, good: Pixels) -> None:
        """Learn from good images, uint8 ``(n, H, W, C)``, BGR or mono."""
        ...

    def predict(self, frames: Pixels) -> tuple[NDArray[Any], NDArray[Any]]:
        """Scores ``(n,)`` and maps ``(n, H, W)`` of frames, float, higher where less normal."""
        ...

    def facts(self) -> Facts:
        """What the fitted model costs."""
        ...


@dataclass(frozen=True)
class _Run:
    """A method that was trained and measured."""

    figures: dict[str, float]
    seconds: float | None
    facts: Facts


def measure(task: Task) -> Measurement:
    """Train and measure one cell.

    Raises:
        ComparisonError: if there is no such method, or it does not take these options.
        DataError: if the data set cannot be read.
    """
    cell, folder = task.cell, Path(task.cell.folder)
    good, samples = data.good_images(folder), data.labelled_samples(folder)
    measured = _contender(cell, good, samples) if ":" in cell.method else _engine(cell, samples, Path(task.work))
    defective = sum(sample.defective for sample in samples)
    return Measurement(
        cell=cell,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code=code_digests(),
        figures={name: float(value) for name, value in measured.figures.items()},
        train_seconds=measured.seconds,
        gmacs=measured.facts.gmacs,
        megabytes=measured.facts.megabytes,
        images={"train": len(good), "good": len(samples) - defective, "defective": defective},
        about={**measured.facts.about, "cpus": len(task.cpus), "machine": platform.machine(), **_versions()},
    )


def _engine(cell: Cell, samples: list[Sample], work: Path) -> _Run:
    """A method of this project: trained, exported, and measured as the compiled engine."""
    from train.commands import build_bundle, validate  # noqa: PLC0415 - torch, seconds to import
    from train.evaluate import evaluate  # noqa: PLC0415
    from train.macs import graph_macs  # noqa: PLC0415

    options, console = engine_options(cell.method, {**cell.options, "seed": cell.seed}), Console(stderr=True)
    resumed = work.is_dir()
    shutil.rmtree(work / "bundle", ignore_errors=True)
    started = time.perf_counter()
    bundle = build_bundle(Path(cell.folder), cell.method, cell.dataset, options, work, work / "bundle", console)
    seconds = None if resumed else time.perf_counter() - started
    validate(bundle)
    figures = evaluate(bundle, samples, "fp32", console).figures.values
    settings = {**bundle.manifest.training.settings, "backbone": bundle.manifest.training.backbone}
    facts = Facts(graph_macs(bundle.model) / 1e9, bundle.model.stat().st_size / 1e6, settings)
    return _Run(figures, seconds, facts)


def _contender(cell: Cell, good: list[Path], samples: list[Sample]) -> _Run:
    """A method from outside: its scores and float maps, measured by the same code."""
    settings = dict(cell.options)
    width, height = size_of(settings.pop("size", SIZE))
    channels = data.infer_channels(good)
    spec = InputSpec(height, width, channels, "bgr" if channels == 3 else "mono")
    module, _, name = cell.method.partition(":")
    kind = getattr(importlib.import_module(module), name)
    try:
        contender: Contender = kind(spec, cell.seed, **settings)
    except TypeError as error:
        msg = f"{cell.method} does not take the options {settings}: {error}"
        raise ComparisonError(msg) from error
    frames = data.load(good, spec)
    started = time.perf_counter()
    contender.fit(frames)
    seconds = time.perf_counter() - started
    scores, maps = _predicted(contender, samples, spec)
    masks = [_mask(sample, spec) for sample in samples]
    pairs = list(zip(maps, masks, strict=True))
    labels = [sample.label for sample in samples]
    figures = figures_of(scores, labels, pairs, scale=RankScale.fitted(_measurable(samples, pairs)))
    return _Run(figures.values, seconds, contender.facts())


def _measurable(samples: list[Sample], pairs: list[tuple[Any, Mask | None]]) -> list[tuple[Any, Mask | None]]:
    """Those that count for pixel figures: good images, and defective ones with a mask."""
    return [pair for sample, pair in zip(samples, pairs, strict=True) if not sample.defective or pair[1] is not None]


def _predicted(
    contender: Contender, samples: list[Sample], spec: InputSpec
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    scores, maps = np.zeros(len(samples)), np.zeros((len(samples), spec.height, spec.width), np.float32)
    for at in range(0, len(samples), 8):
        chosen = slice(at, at + 8)
        scores[chosen], maps[chosen] = contender.predict(data.load([s.path for s in samples[chosen]], spec))
    return scores, maps


def _mask(sample: Sample, spec: InputSpec) -> Mask | None:
    return None if sample.mask is None else data.load_mask(sample.mask, spec.height, spec.width)


def engine_options(method: str, settings: dict[str, Any]) -> Options:
    """Settings, some of them as text, as training takes them; a tuple is written ``4+8+16``.

    What is no option of every method is one of the method's own.

    Raises:
        ComparisonError: if there is no such method or option, or an option has no such value.
    """
    from train.commands import Options  # noqa: PLC0415 - torch, seconds to import
    from train.method import check_options, names  # noqa: PLC0415

    if method not in names():
        msg = f"method {method!r}: one of {', '.join(names())}, or MODULE:CLASS"
        raise ComparisonError(msg)
    common = {entry.name for entry in fields(Options)} - {"choices"}
    told = _in_parts({name: value for name, value in settings.items() if name in common}, Options)
    own = {name: value for name, value in settings.items() if name not in common}
    choices = _in_parts(own, importlib.import_module(f"train.methods.{method}").OPTIONS)
    if "size" in told:
        told["size"] = size_of(told["size"])
    try:
        check_options(method, choices)
        return msgspec.convert({**told, "choices": choices}, Options, strict=False, dec_hook=_path)
    except (msgspec.ValidationError, TrainingError) as error:
        msg = f"options {settings}: {error}; of every method: {', '.join(sorted(common))}"
        raise ComparisonError(msg) from error


def _in_parts(settings: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Settings with text split at ``+`` where the option is a tuple; elsewhere ``+`` is a letter like any other."""
    tuples = {entry.name for entry in fields(kind) if "tuple" in str(entry.type)}
    return {
        name: value.split("+") if name in tuples - {"size"} and isinstance(value, str) else value
        for name, value in settings.items()
    }


def size_of(size: Any) -> tuple[int, int]:
    """Width and height of ``256``, ``320x240`` or a pair.

    Raises:
        ComparisonError: if it is none of these.
    """
    width, _, height = ("x".join(map(str, size)) if isinstance(size, list | tuple) else str(size)).partition("x")
    try:
        return int(width), int(height or width)
    except ValueError as error:
        msg = f"size {size!r}: WIDTHxHEIGHT or one number"
        raise ComparisonError(msg) from error


def code_digests() -> dict[str, str]:
    """SHA-256 of each source file of this project that was imported, by its path: the code that made a result."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    found = {Path(file).resolve() for file in files if file}
    own = sorted(path for path in found if any(path.is_relative_to(ROOT / package) for package in OWN))
    return {str(path.relative_to(ROOT)): sha256(path.read_bytes()).hexdigest() for path in own}


def _path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError  # msgspec's way to say that this is not for us


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    """Read a task, measure it, write its result."""
    line = sys.stdin.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    task = msgspec.json.decode(line, type=Task)
    os.sched_setaffinity(0, task.cpus)
    result = measure(task)
    target = Path(task.target)
    temporary = target.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    temporary.replace(target)


def _end_with_parent() -> None:
    """Standard input ends when the comparison ends, even by a kill: nobody waits for this result any more."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
