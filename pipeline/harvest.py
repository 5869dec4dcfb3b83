"""Scores of live good parts, out of the verdict streams, to calibrate an engine's threshold with.

Every scored part of the period is taken, whatever its verdict. Taking the ``OK`` ones alone would cut off the very
tail that the threshold is about: each calibration would then reject more good parts than the one before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import redis

from engines.calibration import CalibrationError
from pipeline.parts import Verdict
from pipeline.records import Fields, Keys
from pipeline.recovery import RedisUnreachableError
from pipeline.simulator import GOOD

PAGE: Final = 1000
DIGITS: Final = 6
"""Significant digits of a score in a record."""


@dataclass(frozen=True)
class Period:
    """Which parts to take.

    Attributes:
        line: Name of the line.
        cameras: Cameras that see such parts.
        engine: ``name@version`` that has to have judged them: another engine's scores are on another scale.
        since, until: Wall clock of arrival in nanoseconds, ``since <= arrival < until``.
        excluded: Parts that are not good: part ids, or ``camera/session/seq``.
        simulated: Whether to take parts that are marked as simulated.
    """

    line: str
    cameras: tuple[str, ...]
    engine: str
    since: int
    until: int
    excluded: frozenset[str] = frozenset()
    simulated: bool = False


@dataclass
class Harvest:
    """What was found.

    Attributes:
        scores: Scores of the parts that count as good.
        counts: What became of every record of the period: ``taken``, and why others were left out.
        rejected: Records of the parts that count as good although they were answered ``NG``.
        warnings: What speaks against the sample, in words.
    """

    scores: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    rejected: list[Fields] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    excluded_ng: int = 0


def harvest(client: redis.Redis, period: Period) -> Harvest:
    """Read the verdict streams of a period.

    Raises:
        CalibrationError: if a camera has no verdicts, an excluded part is not in the period, or a score is no number.
        RedisUnreachableError: if Redis does not answer.
    """
    found, keys = Harvest(), Keys(period.line)
    try:
        for camera in period.cameras:
            _read(client, keys.verdicts(camera), camera, period, found)
    except redis.RedisError as error:
        where = client.connection_pool.connection_kwargs
        place = where.get("path") or f"{where.get('host')}:{where.get('port')}"
        msg = f"no Redis at {place}: {error}. Start it, or correct --redis"
        raise RedisUnreachableError(msg) from error
    if missing := sorted(period.excluded - found.named):
        msg = f"--except {missing[0]}: no such part in the period (ids as in the field part, or camera/session/seq)"
        raise CalibrationError(msg)
    if not found.scores:
        left = ", ".join(f"{count} {name}" for name, count in sorted(found.counts.items())) or "no record at all"
        msg = f"no good part of {period.engine} with a score in the period: {left}. Correct --since, --until or ENGINE"
        raise CalibrationError(msg)
    _warn(found)
    return found


def _read(client: redis.Redis, key: str, camera: str, period: Period, found: Harvest) -> None:
    first = True
    for fields in _records(client, key):
        arrival = int(fields["t_arrival_ns"])
        if first and arrival > period.since:
            begin = datetime.fromtimestamp(arrival / 1e9, UTC).isoformat(timespec="seconds")
            found.warnings.append(f"The verdicts of {camera} in Redis begin only at {begin}.")
        first = False
        if period.since <= arrival < period.until:
            _take(fields, period, found)
    if first:
        msg = f"no verdicts of camera {camera!r} on line {period.line!r} in Redis: correct --camera, --line or --redis"
        raise CalibrationError(msg)


def _records(client: redis.Redis, key: str) -> Iterator[Fields]:
    """Every record of a stream, oldest first; ids tell the session, not the time, so all have to be read."""
    start = "-"
    while True:
        page: Any = client.xrange(key, start, "+", count=PAGE)
        for _, raw in page:
            yield {name.decode(): value.decode() for name, value in raw.items()}
        if len(page) < PAGE:
            return
        start = f"({page[-1][0].decode()}"


def _take(fields: Fields, period: Period, found: Harvest) -> None:
    """Count a record of the period, and take its score if the part counts as good."""
    why = _left_out(fields, period, found)
    found.counts[why or "taken"] += 1
    if why:
        found.excluded_ng += why == "excluded" and fields["verdict"] == Verdict.NG
        return
    found.scores.append(_largest(fields["score"]))
    if fields["verdict"] == Verdict.NG:
        found.rejected.append(fields)


def _left_out(fields: Fields, period: Period, found: Harvest) -> str:
    """Why a record does not count, or nothing."""
    names = ({fields["part"], "{camera}/{session}/{seq}".format_map(fields)} - {""}) & period.excluded
    found.named |= names
    reasons = {
        "excluded": bool(names),
        "simulated": fields["simulated"] == "1" and not period.simulated,
        "without a score": not fields["score"],
        "late": fields["late"] == "1",
        "of another engine": fields["engine"] != period.engine,
        "known to be defective": fields["truth"] not in {"", GOOD},
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _largest(text: str) -> float:
    """The largest score that a record of six digits may stand for: rounding never costs a good part its ``OK``.

    Raises:
        CalibrationError: if it is no finite number.
    """
    try:
        score = Decimal(text)
        if score.is_finite():
            return float(score + Decimal(5).scaleb(score.adjusted() - DIGITS)) if score else 0.0
    except InvalidOperation:
        pass
    msg = f"score {text!r} in a record is not a finite number: leave its time out by --since and --until"
    raise CalibrationError(msg)


def _warn(found: Harvest) -> None:
    taken, unscored = found.counts["taken"], found.counts["without a score"]
    if unscored > taken / 10:
        found.warnings.append(
            f"{unscored} parts of the period have no score, beside {taken} that have: those that were inspected in time"
            " may not be like the rest."
        )
    if found.excluded_ng and not found.rejected:
        found.warnings.append(
            f"All {found.excluded_ng} parts that were answered NG are left out. That is right only if each was looked"
            " at and found defective; else the new threshold rejects more good parts than declared."
        )
