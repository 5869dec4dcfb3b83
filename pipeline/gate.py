"""The parity gate on every lane of an engine, and the report that is kept of it beside the version."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import msgspec
from rich.table import Table

from engines.build import ParityError, Target, compile_engine, parity_gate
from engines.bundle import Bundle, BundleError
from engines.lane import Engine, Lane, LaneFault
from engines.store import Store
from pipeline.build_progress import BuildProgress

Row = dict[str, Any]
PACKAGES: Final = {"openvino": ("openvino",), "tensorrt": ("tensorrt", "pycuda")}
"""Whose versions decide what a target computes."""


class GateReport(msgspec.Struct, frozen=True):
    """How an engine came through the gate on a box.

    Attributes:
        engine: ``name@version``.
        digest: SHA-256 of its manifest.
        target: Where and how it ran.
        created: When, ISO 8601.
        box: What it ran on: processor and versions.
        passed: Whether every lane reproduced the reference at every batch size.
        reason: Why not; empty if it did.
        rows: The differences of every stored frame at every batch size on every lane: the fields of
            ``engines.build.FrameDifference``, and ``lane``.
    """

    engine: str
    digest: str
    target: Target
    created: str
    box: dict[str, str]
    passed: bool
    reason: str
    rows: tuple[Row, ...]

    @property
    def kind(self) -> str:
        """Target and precision, as the report's file is called."""
        return f"{self.target.kind}-{self.target.precision}"


def run_gate(bundle: Bundle, target: Target) -> GateReport:
    """Compile a bundle and pass all its lanes through the parity gate, each at every batch size.

    All lanes exist at once, as in the running line. A lane that fails or differs is a report that did not pass.

    Raises:
        BuildError: if it cannot be compiled here.
    """
    rows: list[Row] = []
    engine = compile_engine(bundle, target, BuildProgress(bundle.label))
    try:
        reason = _pass_lanes(bundle, engine, target.lanes, rows)
    finally:
        engine.close()
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return GateReport(bundle.label, bundle.digest, target, created, _box(target.kind), not reason, reason, tuple(rows))


def _pass_lanes(bundle: Bundle, engine: Engine, count: int, rows: list[Row]) -> str:
    """Add every lane's differences to ``rows``; return why the engine is refused, empty if it is not."""
    lanes: list[Lane] = []
    with ExitStack() as made:
        try:
            for _ in range(count):
                lane = engine.make_lane()
                made.callback(lane.close)
                lanes.append(lane)
            for number, lane in enumerate(lanes):
                rows += _rows(number, parity_gate(bundle, lane))
        except LaneFault as error:
            return f"a lane failed: {error}"
        except ParityError as error:
            rows += _rows(number, error.differences)
            return f"lane {number}: {error}"
    return ""


def _rows(lane: int, differences: Any) -> list[Row]:
    return [{"lane": lane, **msgspec.to_builtins(found)} for found in differences]


def keep(store: Store, bundle: Bundle, report: GateReport) -> str:
    """Keep a report beside the version in the store; return where, empty for a bundle that is in no store."""
    path = store.keep_report(bundle, report.kind, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return str(path or "")


def kept(store: Store, bundle: Bundle) -> list[GateReport]:
    """The reports that are kept of this very bundle.

    Raises:
        BundleError: if one of them is damaged.
    """
    found = []
    for path in store.reports(bundle.name, bundle.version) if bundle.name else ():
        try:
            report = msgspec.json.decode(path.read_bytes(), type=GateReport)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            msg = f"{path}: not a report of the gate: {error}; remove it, and run `dmdd engines verify` again"
            raise BundleError(msg) from error
        if report.digest == bundle.digest:
            found.append(report)
    return found


def require(report: GateReport) -> None:
    """Refuse an engine that did not pass.

    Raises:
        ParityError: with the reason.
    """
    if not report.passed:
        raise ParityError(report.reason)


def frame_table(report: GateReport) -> Table:
    """Each stored frame with its largest differences over all lanes and batch sizes."""
    table = Table(
        "frame", "reference", "score", "off by", "heatmap off", "lane", "batch", "verdict", title=report.engine
    )
    frames: dict[int, list[Row]] = {}
    for row in report.rows:
        frames.setdefault(row["frame"], []).append(row)
    for frame, rows in sorted(frames.items()):
        table.add_row(str(frame), *_worst(rows))
    return table


def _worst(rows: list[Row]) -> list[str]:
    """The cells of one frame: the row with the largest difference of the score, heatmap and verdict over all."""
    worst = max(rows, key=_score_off)
    return [
        f"{worst['expected']:.4f}",
        f"{worst['score']:.4f}",
        f"{_score_off(worst):.5f}",
        f"{max(row['heatmap_mean'] for row in rows):.3f}",
        str(worst["lane"]),
        str(worst["batch"]),
        "same" if all(row["verdict_agrees"] for row in rows) else "DIFFERENT",
    ]


def _score_off(row: Mapping[str, Any]) -> float:
    return abs(float(row["score"]) - float(row["expected"]))


def _box(kind: str) -> dict[str, str]:
    """What the results depend on, beside the engine."""
    found = {"machine": platform.machine(), "system": platform.platform(), "cores": str(os.cpu_count())}
    for package in PACKAGES.get(kind, ()):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
