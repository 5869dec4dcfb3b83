"""The table of a comparison: mean and range over seeds, as Markdown and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from train.compare import Measurement, Outcome

COLUMNS: Final = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO@0.3",
    "aupro_0.05": "AUPRO@0.05",
    "pro_per_image": "PRO per image",
}
"""Figures in the table, in its order, by their names in ``docs/methods.md``."""
NONE: Final = "-"
READING: Final = (
    "Mean over the seeds, in brackets the least and the largest; bold where no other method of the set has more."
    " Every method saw the same images and was measured by the same code; docs/methods.md defines the figures."
)


@dataclass(frozen=True)
class Spread:
    """A figure over seeds; ``deviation`` is the sample standard deviation, NaN for one seed."""

    mean: float
    least: float
    largest: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of those that are defined; None of nothing."""
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return None
        deviation = statistics.stdev(known) if len(known) > 1 else math.nan
        return cls(statistics.fmean(known), min(known), max(known), deviation, len(known))


@dataclass(frozen=True)
class Row:
    """One method on one data set.

    Attributes:
        dataset: The data set.
        label: The method.
        seeds: Seeds that were measured.
        figures: Spread of each figure in ``COLUMNS`` that is defined.
        train_seconds: Spread of the training time of the runs that were not interrupted.
        gmacs: Cost of one image in 1e9 multiply-accumulates.
        megabytes: Size of the model.
        options: What the method was told.
    """

    dataset: str
    label: str
    seeds: list[int]
    figures: dict[str, Spread]
    train_seconds: Spread | None
    gmacs: float | None
    megabytes: float | None
    options: dict[str, Any]


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row for each method and data set that has a result, in the order of the outcomes."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for outcome in outcomes:
        if outcome.result is not None:
            groups.setdefault((outcome.cell.dataset, outcome.cell.label), []).append(outcome.result)
    return [_row(dataset, label, results) for (dataset, label), results in groups.items()]


def _row(dataset: str, label: str, results: list[Measurement]) -> Row:
    spreads = {name: Spread.of(result.figures.get(name) for result in results) for name in COLUMNS}
    costs = [Spread.of(getattr(result, name) for result in results) for name in ("gmacs", "megabytes")]
    return Row(
        dataset=dataset,
        label=label,
        seeds=[result.cell.seed for result in results],
        figures={name: spread for name, spread in spreads.items() if spread is not None},
        train_seconds=Spread.of(result.train_seconds for result in results),
        gmacs=costs[0].mean if costs[0] else None,
        megabytes=costs[1].mean if costs[1] else None,
        options=results[0].cell.options,
    )


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table with all that is needed to read it."""
    rows = rows_of(outcomes)
    head = ["set", "method", "seeds", *COLUMNS.values(), "training, s", "GMACs", "MB"]
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line(_cells(row, [other for other in rows if other.dataset == row.dataset])) for row in rows]
    return "\n".join([*lines, "", *_notes(outcomes, rows), ""])


def _cells(row: Row, rivals: list[Row]) -> list[str]:
    figures = [_figure(row.figures.get(name), [rival.figures.get(name) for rival in rivals]) for name in COLUMNS]
    seconds = f"{row.train_seconds.mean:.0f}" if row.train_seconds else NONE
    costs = [NONE if cost is None else f"{cost:.2f}" for cost in (row.gmacs, row.megabytes)]
    return [row.dataset, row.label, str(len(row.seeds)), *figures, seconds, *costs]


def _figure(spread: Spread | None, rivals: list[Spread | None]) -> str:
    """The mean, bold where no method has a larger one, and the range."""
    if spread is None:
        return NONE
    text = f"{spread.mean:.3f}"
    known = [rival.mean for rival in rivals if rival is not None]
    if len(known) > 1 and spread.mean >= max(known):
        text = f"**{text}**"
    return text if spread.count == 1 else f"{text} ({spread.least:.3f} to {spread.largest:.3f})"


def _notes(outcomes: Sequence[Outcome], rows: list[Row]) -> list[str]:
    measured = [outcome.result for outcome in outcomes if outcome.result is not None]
    failed = [outcome for outcome in outcomes if outcome.result is None]
    notes = [
        READING,
        *_settings(rows),
        *_environment(measured),
        *_code(measured),
        *(f"**Missing:** {o.cell.dataset}, {o.cell.label}, seed {o.cell.seed}: {_plain(o.problem)}" for o in failed),
    ]
    return [f"- {note}" for note in notes]


def _settings(rows: list[Row]) -> list[str]:
    told = dict.fromkeys(f"{row.label}: {_options(row.options)}." for row in rows if row.options)
    return ["Options: " + " ".join(told)] if told else []


def _environment(measured: list[Measurement]) -> list[str]:
    if not measured:
        return []
    days = sorted({result.created[:10] for result in measured})
    used = ", ".join(_shared(measured, name) for name in ("torch", "anomalib", "cpus"))
    return [f"Measured {' to '.join(dict.fromkeys((days[0], days[-1])))} with {used}."]


def _code(measured: list[Measurement]) -> list[str]:
    """A warning where a source file was not the same for all cells."""
    states: dict[str, set[str]] = {}
    for path, digest in (entry for result in measured for entry in result.code.items()):
        states.setdefault(path, set()).add(digest)
    changed = sorted(path for path, digests in states.items() if len(digests) > 1)
    if not changed:
        return []
    return [f"**The code changed between cells** ({', '.join(changed)}): `--fresh` measures all of them again."]


def _shared(measured: list[Measurement], name: str) -> str:
    values = dict.fromkeys(str(result.about[name]) for result in measured if name in result.about)
    return f"{name} {' and '.join(values) or NONE}"


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(options.items()))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that does not end a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def as_json(outcomes: Sequence[Outcome]) -> bytes:
    """The rows with spreads, and every cell, for other programs."""
    document = {
        "rows": rows_of(outcomes),
        "cells": [outcome.result for outcome in outcomes if outcome.result is not None],
        "missing": [{"cell": o.cell, "problem": o.problem} for o in outcomes if o.result is None],
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
