"""``dmdd compare``: methods x data sets x seeds, each cell a process of its own with one JSON file as its result.

A cell that has its file is not measured again, so a comparison that was killed goes on with the same command.
Nothing here imports torch: that is for the processes of the cells, :mod:`train.cell`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any, Final

import msgspec

from train import data

ROOT: Final = Path(__file__).resolve().parents[1]
PEERS: Final = {
    "patchcore": "benchmarks.peers:PatchCore",
    "padim": "benchmarks.peers:Padim",
    "supersimplenet": "benchmarks.peers:SuperSimpleNet",
}
"""Methods of another library, by the class that runs them."""
VARIANT: Final = re.compile(r"(?P<method>[\w.:-]+)(\[(?P<options>[^\[\]]*)\])?")
BETWEEN: Final = re.compile(r",(?![^\[]*\])")
LOG_TAIL: Final = 400
Say = Callable[[str], None]


class ComparisonError(RuntimeError):
    """A comparison cannot be made as it was asked for; the message says what to change."""


@dataclass(frozen=True)
class Variant:
    """A method with options of its own.

    Attributes:
        label: As it was asked for, e.g. ``dmdd[steps=3000]``: its name in the table.
        method: Name of a method, or ``MODULE:CLASS`` of a :class:`train.cell.Contender`.
        options: What differs from the options of all.
    """

    label: str
    method: str
    options: dict[str, Any]

    @property
    def contender(self) -> str | None:
        """``MODULE:CLASS`` of the class that runs it; None for a method of this project."""
        return PEERS.get(self.method, self.method if ":" in self.method else None)


class Cell(msgspec.Struct, frozen=True):
    """One measurement to make: a method on a data set with a seed.

    Attributes:
        folder: The data set.
        dataset: Its name in the table.
        label: The method's name in the table.
        method: Name of a method of this project, or ``MODULE:CLASS``.
        seed: Of everything random.
        options: What the method is told.
        data_sha256: Digest of every image and mask of the data set.
    """

    folder: str
    dataset: str
    label: str
    method: str
    seed: int
    options: dict[str, Any]
    data_sha256: str

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides the result, the code apart."""
        identity = [self.dataset, self.method, self.seed, self.options, self.data_sha256]
        return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of its files, without a suffix."""
        method = re.sub(r"\W+", "_", self.method.rpartition(":")[2]).lower()
        return f"{self.dataset}-{method}-s{self.seed}-{self.digest[:8]}"


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured in a cell, as it stands in its file.

    Attributes:
        cell: The cell.
        created: When, ISO 8601.
        code: SHA-256 of each source file of this project that had a part in it, by its path.
        figures: By name, see ``docs/methods.md``; null where a figure is not defined.
        train_seconds: From the images in memory to a model ready to use; null for a run that was taken up again.
        gmacs: Multiply-accumulates of one image, in 1e9, counted in convolutions and matrix products.
        megabytes: Size of the model, in 1e6 bytes.
        images: Number of ``train``, ``good`` and ``defective`` images.
        about: What else describes the run: versions, sizes, settings that were chosen by the method.
    """

    cell: Cell
    created: str
    code: dict[str, str]
    figures: dict[str, float | None]
    train_seconds: float | None
    gmacs: float | None
    megabytes: float | None
    images: dict[str, int]
    about: dict[str, Any]


class Task(msgspec.Struct, frozen=True):
    """A cell and where it is measured: its result's file, a folder to work in, the CPUs to use."""

    cell: Cell
    target: str
    work: str
    cpus: list[int]


@dataclass(frozen=True)
class Outcome:
    """A cell's result, or why there is none."""

    cell: Cell
    result: Measurement | None
    problem: str = ""


def variants(text: str) -> list[Variant]:
    """Parse ``dmdd,dmdd[steps=3000],patchcore[coreset=0.01]``.

    Raises:
        ComparisonError: if this is not a list of methods, or one is named twice.
    """
    found = []
    for part in filter(None, (piece.strip() for piece in BETWEEN.split(text))):
        match = VARIANT.fullmatch(part)
        pairs = [piece.partition("=") for piece in (match["options"] or "").split(",") if piece] if match else []
        if match is None or not all(name.strip() and equals for name, equals, _ in pairs):
            msg = f"{part!r}: expected a method, or a method with options as in dmdd[steps=3000,rate=1e-3]"
            raise ComparisonError(msg)
        found.append(Variant(part, match["method"], {name.strip(): value.strip() for name, _, value in pairs}))
    if not found or len({variant.label for variant in found}) < len(found):
        msg = f"{text!r}: name at least one method, and each only once"
        raise ComparisonError(msg)
    return found


def plan(folders: Sequence[Path], asked: Sequence[tuple[Variant, dict[str, Any]]], seeds: int) -> list[Cell]:
    """Every cell of a comparison, data set by data set.

    Args:
        folders: Labelled data sets; see :func:`train.data.labelled_samples`.
        asked: Each method with the options that it is given beside its own.
        seeds: Seeds ``0`` .. ``seeds - 1``.

    Raises:
        DataError: if a folder is no labelled data set.
        ComparisonError: if two data sets have the same name.
    """
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name for folder in resolved]
    if len(set(names)) < len(names):
        msg = f"data sets {', '.join(names)}: two have the same name; rename one of the folders"
        raise ComparisonError(msg)
    digests = {folder: _data_digest(folder) for folder in resolved}
    return [
        Cell(
            folder=str(folder),
            dataset=folder.name,
            label=variant.label,
            method=variant.contender or variant.method,
            seed=seed,
            options={**shared, **variant.options},
            data_sha256=digests[folder],
        )
        for folder, (variant, shared), seed in product(resolved, asked, range(seeds))
    ]


def _data_digest(folder: Path) -> str:
    samples = data.labelled_samples(folder)
    masks = [sample.mask for sample in samples if sample.mask is not None]
    return data.digest([*data.good_images(folder), *(sample.path for sample in samples), *masks])


def run(cells: Sequence[Cell], folder: Path, *, jobs: int = 1, fresh: bool = False, say: Say) -> list[Outcome]:
    """Measure the cells that have no result yet.

    Args:
        cells: What to measure.
        folder: Where results (``cells/``), logs (``logs/``) and trained models (``work/``) are kept.
        jobs: Processes at a time; the CPUs are divided among them.
        fresh: Whether to measure again what has a result.
        say: Told of each cell that is done.

    Returns:
        The outcome of every cell, in their order.
    """
    folder = folder.resolve()
    for name in ("cells", "logs", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    runner = _Runner(folder, jobs, say, len(cells))
    known = {cell.name: None if fresh else stored(cell, folder) for cell in cells}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(lambda cell: runner.measure(cell, known[cell.name]), cells))
        except BaseException:
            runner.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def stored(cell: Cell, folder: Path) -> Measurement | None:
    """The cell's result, if there is one that can be read and is of this very cell."""
    try:
        found = msgspec.json.decode((folder / "cells" / f"{cell.name}.json").read_bytes(), type=Measurement)
    except (OSError, msgspec.MsgspecError):
        return None
    # The label is the table's; what was measured is the same under any.
    return msgspec.structs.replace(found, cell=cell) if found.cell.digest == cell.digest else None


class _Runner:
    """Runs cells in processes of their own, which end when this one does."""

    def __init__(self, folder: Path, jobs: int, say: Say, total: int) -> None:
        self._folder, self._say, self._total = folder, say, total
        self._done = 0
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._slots: Queue[list[int]] = Queue()
        for cpus in _divided(sorted(os.sched_getaffinity(0)), jobs):
            self._slots.put(cpus)

    def measure(self, cell: Cell, known: Measurement | None) -> Outcome:
        """Take the result that there is, or let a process make it."""
        if known is not None:
            outcome = Outcome(cell, known)
        else:
            cpus = self._slots.get()
            try:
                outcome = self._spawn(cell, cpus)
            finally:
                self._slots.put(cpus)
        self._tell(outcome, "kept" if known is not None else "measured")
        return outcome

    def stop(self) -> None:
        """End what is running."""
        self._stopped.set()
        with self._lock:
            for process in self._running:
                process.terminate()

    def _spawn(self, cell: Cell, cpus: list[int]) -> Outcome:
        log, target = self._folder / "logs" / f"{cell.name}.log", self._folder / "cells" / f"{cell.name}.json"
        task = Task(cell, str(target), str(self._folder / "work" / cell.name), cpus)
        target.unlink(missing_ok=True)
        with log.open("w") as stream:
            if self._stopped.is_set():
                return Outcome(cell, None, "not started")
            process = subprocess.Popen(
                [sys.executable, "-m", "train.cell"],
                cwd=ROOT,
                env={**os.environ, **_threads(len(cpus))},
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                text=True,
            )
            with self._lock:
                self._running.add(process)
            # Its standard input stays open: the process ends itself when this one is gone, however that came.
            with process:
                _hand_over(process, task)
                code = process.wait()
            with self._lock:
                self._running.discard(process)
        result = stored(cell, self._folder) if code == 0 else None
        return Outcome(cell, result, "" if result else f"exit code {code}, {log}: {_last_line(log)}")

    def _tell(self, outcome: Outcome, how: str) -> None:
        with self._lock:
            self._done += 1
            cell, result = outcome.cell, outcome.result
            head = f"{self._done} of {self._total}: {cell.dataset}, {cell.label}, seed {cell.seed}"
            if result is None:
                self._say(f"{head}: FAILED, {outcome.problem}")
                return
            auroc = result.figures.get("image_auroc")
            self._say(f"{head}: {how}" + (f", image AUROC {auroc:.4f}" if auroc is not None else ""))


def _hand_over(process: subprocess.Popen[str], task: Task) -> None:
    if process.stdin is None:  # it was asked for above
        return
    try:
        process.stdin.write(msgspec.json.encode(task).decode() + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return  # it has ended already; its log says why


def _divided(cpus: list[int], jobs: int) -> list[list[int]]:
    """As many sets of CPUs as jobs: each its own, or all alike where there are fewer CPUs than jobs."""
    return [cpus[k::jobs] for k in range(jobs)] if jobs <= len(cpus) else [cpus] * jobs


def _threads(count: int) -> dict[str, str]:
    """OpenMP's threads: those of the cell's CPUs, or fewer where the environment says so."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return {"OMP_NUM_THREADS": str(min(count, int(told)) if told.isdigit() and int(told) else count)}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][-LOG_TAIL:] if lines else "no output"
