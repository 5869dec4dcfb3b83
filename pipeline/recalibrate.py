"""What ``dmdd calibrate`` does: good parts from a folder or from a line, and an engine's next version in the store."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import track

from engines.build import Target, compile_engine
from engines.bundle import MANIFEST, Bundle, Evidence, Threshold, with_threshold
from engines.calibration import CalibrationError
from engines.store import Store
from pipeline.cli_engines import validate
from pipeline.harvest import Period, harvest
from pipeline.records import Fields
from pipeline.redis_client import connect_url
from train import data

TIMEOUT_MS: Final = 5000
WAIT_S: Final = 30.0


@dataclass(frozen=True)
class GoodParts:
    """Scores of good parts.

    Attributes:
        scores: One of each part.
        counts: What became of every image or record.
        source: What the parts are, in words.
        warnings: What speaks against them as a sample, in words.
        rejected: Records of live parts that count as good although they were answered ``NG``.
    """

    scores: list[float]
    counts: dict[str, int]
    source: str
    warnings: tuple[str, ...] = ()
    rejected: tuple[Fields, ...] = ()


def from_folder(bundle: Bundle, folder: Path, target: Target) -> GoodParts:
    """Score the images of good parts directly in ``folder``, or in its folder ``good``; copies count once.

    Raises:
        CalibrationError: if these are the images that the engine was trained on.
        DataError: if there are none, or one cannot be decoded.
    """
    paths = data.images_in(folder) or data.images_in(folder / data.GOOD)
    if not paths:
        msg = f"{folder}: no images of good parts; expected them directly in the folder, or in good/"
        raise data.DataError(msg)
    if data.digest(paths) == bundle.manifest.training.data_sha256:
        msg = (
            f"{folder}: {bundle.label} was trained on these images and knows them too well: take images of other parts"
        )
        raise CalibrationError(msg)
    unique = list({data.digest([path]): path for path in paths}.values())
    counts = {"taken": len(unique), "copies": len(paths) - len(unique)}
    source = f"{len(unique)} images of good parts in the folder {folder.resolve().name}"
    return GoodParts(score_images(bundle, unique, target), counts, source)


def from_line(url: str, period: Period) -> GoodParts:
    """Read the scores of a line's parts from its verdicts in Redis.

    Raises:
        CalibrationError: if the address is none, or the period has no such parts; see :func:`harvest`.
        RedisUnreachableError: if Redis does not answer.
    """
    try:
        client = connect_url(url, TIMEOUT_MS)
    except ValueError as error:
        msg = f"--redis: {error}"
        raise CalibrationError(msg) from error
    with client:
        found = harvest(client, period)
    begin, end = (datetime.fromtimestamp(at / 1e9).astimezone() for at in (period.since, period.until))
    left = ", ".join(f"{count} {why}" for why, count in sorted(found.counts.items()) if why != "taken") or "none"
    source = (
        f"{found.counts['taken']} live parts of {period.engine}, line {period.line}, camera"
        f" {', '.join(period.cameras)}, {begin.isoformat(timespec='seconds')} to {end.isoformat(timespec='seconds')},"
        f" vouched for as good; {len(found.rejected)} of them were answered NG. Left out: {left}"
    )
    return GoodParts(found.scores, dict(found.counts), source, tuple(found.warnings), tuple(found.rejected))


def period_of(
    bundle: Bundle, line: str, cameras: list[str], since: str, until: str, excluded: list[str], *, simulated: bool
) -> Period:
    """The period that a user names, times in ISO 8601, local where they do not say.

    Raises:
        CalibrationError: if a time is missing or none.
    """
    if not since:
        msg = "--camera needs --since: the time from which on you vouch for the parts, for instance 2026-01-31T06:00"
        raise CalibrationError(msg)
    end = _nanoseconds(until, "--until") if until else time.time_ns()
    each_once = tuple(dict.fromkeys(cameras))
    return Period(
        line, each_once, bundle.label, _nanoseconds(since, "--since"), end, frozenset(excluded), simulated=simulated
    )


def score_defects(bundle: Bundle, folder: Path, target: Target) -> dict[str, list[float]]:
    """Scores of the defective parts in ``folder``, by kind: its folders but ``good``, and itself where it is flat.

    Raises:
        DataError: if there are none, or one cannot be decoded.
    """
    inner = sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    kinds = {
        kind.resolve().name: paths
        for kind in (folder, *inner)
        if kind.resolve().name != data.GOOD and (paths := data.images_in(kind))
    }
    if not kinds:
        msg = f"{folder}: no images of defective parts; expected them directly in the folder, or a folder for each kind"
        raise data.DataError(msg)
    return {name: score_images(bundle, paths, target) for name, paths in kinds.items()}


def score_images(bundle: Bundle, paths: list[Path], target: Target) -> list[float]:
    """The compiled engine's score of every image, one by one, as the line scores parts."""
    scores = []
    engine = compile_engine(bundle, target)
    try:
        lane = engine.make_lane()
        try:
            for path in track(paths, "scoring", console=Console(stderr=True)):
                lane.frames[:1] = data.load([path], bundle.manifest.input)
                lane.submit(1)
                lane.wait(WAIT_S)
                scores.append(float(lane.scores[0]))
        finally:
            lane.close()
    finally:
        engine.close()
    return scores


def store_version(
    store: Store, reference: str, bundle: Bundle, threshold: Threshold, evidence: Evidence, target: Target
) -> Bundle:
    """Put ``bundle`` with another threshold through the parity gate and into the store; it is not active yet.

    Args:
        store: Where to.
        reference: How ``bundle`` was named: its name in the store, with or without a version, or its folder.
        bundle: The engine.
        threshold: Its new threshold.
        evidence: The scores behind it.
        target: Where and how to run it for the gate.

    Raises:
        ParityError: if the engine does not reproduce its reference here.
    """
    own_folder = (Path(reference) / MANIFEST).is_file()
    name = bundle.manifest.name if own_folder else reference.partition("@")[0]
    with tempfile.TemporaryDirectory() as staging:
        staged = with_threshold(bundle, Path(staging) / "bundle", threshold, evidence)
        validate(staged, target.kind, target.precision)
        return store.add(staged.folder, name)


def _nanoseconds(text: str, option: str) -> int:
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1_000_000) * 1000
    except (ValueError, OverflowError) as error:
        msg = f"{option} {text}: a date and time is expected, for instance 2026-01-31T06:00 or 2026-01-31T06:00+01:00"
        raise CalibrationError(msg) from error
