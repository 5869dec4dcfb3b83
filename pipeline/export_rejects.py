"""Rejects of a time span as a folder: a table of their records, and their images and heatmaps as files.

And what people have said of parts on the monitor page, as folders of good and defective parts.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import redis

from pipeline.line_view import unreachable
from pipeline.parts import Finding, Part, Reason, Verdict
from pipeline.records import Fields, Keys, fields_of
from pipeline.wire import CAMERA_ID, Header

PAGE: Final = 500
SLACK_MS: Final = 60_000
"""Ids of rejects can be this far behind their verdicts; they are never ahead of what is searched."""
RECORDS, LABELS = "rejects.csv", "labels.csv"
KINDS: Final = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg"}
LABEL_COLUMNS: Final = ("camera", "session", "seq", "label", "t_ns", "verdict", "score", "image_file")
CLASSES: Final = ("good", "defective")
FIELDS: Final = tuple(
    fields_of(Part("", Header(seq=0, session=0), 0, 0, 0, 0, 0), Finding(Verdict.NG, Reason.ABOVE_THRESHOLD))
)
UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class ExportError(ValueError):
    """A folder that cannot be exported to; the message says what to do."""


@dataclass(frozen=True)
class Span:
    """A time span, wall clock in nanoseconds: ``since <= t < until``."""

    since: int
    until: int

    def __contains__(self, at: int) -> bool:
        """Whether a time lies in it."""
        return self.since <= at < self.until


def parse_time(text: str, option: str, now: float) -> int:
    """A time of the wall clock in nanoseconds, from ISO 8601, or as so long ago: ``90m``, ``2h``, ``7d``.

    Args:
        text: What the user says; local time where it names no zone.
        option: Its name, for the error.
        now: Seconds.

    Raises:
        ExportError: if it is neither.
    """
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if ago is not None:
        return int((now - float(ago[1]) * UNITS[ago[2]]) * 1e9)
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1_000_000) * 1000
    except (ValueError, OverflowError) as error:
        msg = f"{option} {text}: expected so long ago, as 2h or 7d, or a time, as 2026-01-31T06:00"
        raise ExportError(msg) from error


@dataclass
class Exported:
    """What was written.

    Attributes:
        counts: Records, images, heatmaps, labels; and ``images_gone``, ``heatmaps_gone``, ``labels_without_image``:
            what had lapsed in Redis, or was never kept.
        labels: The labels that were written, as they stand in Redis: field to value.
    """

    counts: Counter[str] = field(default_factory=Counter)
    labels: dict[str, str] = field(default_factory=dict)


class Exporter:
    """Writes a line's rejects to a folder.

    Args:
        client: A patient Redis client; the caller closes it.
        keys: Names of the line's keys.
        folder: Where to; made if missing, and without an earlier export.

    Attributes:
        done: What was written so far.

    Raises:
        ExportError: if the folder holds an export.
        OSError: if it cannot be made.
    """

    def __init__(self, client: redis.Redis, keys: Keys, folder: Path) -> None:
        there = next((name for name in (RECORDS, LABELS) if (folder / name).exists()), None)
        if there is not None:
            msg = f"{folder}: holds an export already ({there}); give another folder"
            raise ExportError(msg)
        folder.mkdir(parents=True, exist_ok=True)
        self._client, self._keys, self._folder = client, keys, folder
        self.done = Exported()

    def rejects(self, span: Span, cameras: frozenset[str] = frozenset()) -> None:
        """Write the rejects whose verdicts fell into a span, of these cameras, or of all.

        Raises:
            RedisUnreachableError: if Redis does not answer.
            OSError: if a file cannot be written.
        """
        rows = []
        for record in self._found(span, cameras):
            name = _file_name(record["camera"], record["session"], record["seq"])
            image = self._picture(record["frame"], "images", name)
            heatmap = self._picture(record["heatmap"], "heatmaps", name)
            rows.append({**record, "image_file": image, "heatmap_file": heatmap})
            self.done.counts["records"] += 1
        _write_table(self._folder / RECORDS, rows, (*FIELDS, "image_file", "heatmap_file"))

    def labels(self, span: Span) -> None:
        """Write the parts that were labelled in a span: images to ``good/`` and ``defective/``, and a table.

        Raises:
            RedisUnreachableError: if Redis does not answer.
            OSError: if a file cannot be written.
        """
        rows = []
        for name, text in self._labels():
            row = _label(name, text)
            if row is None or int(row["t_ns"]) not in span:
                continue
            file = _file_name(row["camera"], row["session"], row["seq"])
            key = self._keys.labelled(name) if row.pop("key") else ""
            row["image_file"] = self._picture(key, row["label"], file, "labels_without_image")
            rows.append(row)
            self.done.labels[name] = text
            self.done.counts["labels"] += 1
        _write_table(self._folder / LABELS, rows, LABEL_COLUMNS)

    def take_out(self) -> int:
        """Remove the labels that were written, and their images, from Redis; return how many.

        One that somebody has changed meanwhile stays.

        Raises:
            RedisUnreachableError: if Redis does not answer.
        """
        os.sync()  # what is removed from Redis is nowhere else
        removed = 0
        try:
            for name, text in self.done.labels.items():
                now: Any = self._client.hget(self._keys.labels, name)
                if now is not None and now.decode() == text:
                    self._client.hdel(self._keys.labels, name)
                    self._client.delete(self._keys.labelled(name))
                    removed += 1
        except redis.RedisError as error:
            raise unreachable(error) from error
        return removed

    def _found(self, span: Span, cameras: frozenset[str]) -> Iterator[Fields]:
        start: str = f"{max(0, span.since // 1_000_000 - SLACK_MS)}-0"
        while True:
            try:
                page: Any = self._client.xrange(self._keys.rejects, min=start, count=PAGE)
            except redis.RedisError as error:
                raise unreachable(error) from error
            for _, raw in page:
                record = _text(raw)
                if not _whole(record):
                    self.done.counts["unreadable"] += 1
                elif int(record["t_verdict_ns"]) in span and (not cameras or record["camera"] in cameras):
                    yield record
            if len(page) < PAGE:
                return
            start = f"({page[-1][0].decode()}"

    def _labels(self) -> Iterator[tuple[str, str]]:
        try:
            for name, text in self._client.hscan_iter(self._keys.labels, count=PAGE):
                yield name.decode("utf-8", "replace"), text.decode("utf-8", "replace")
        except redis.RedisError as error:
            raise unreachable(error) from error

    def _picture(self, key: str, folder: str, name: str, gone: str = "") -> str:
        """Write what a key holds; return the file's place in the folder, or nothing where there is none."""
        try:
            found: Any = self._client.get(key) if key else None
        except redis.RedisError as error:
            raise unreachable(error) from error
        if not found:
            self.done.counts[gone or f"{folder}_gone"] += bool(key or gone)
            return ""
        suffix = next((ending for start, ending in KINDS.items() if found.startswith(start)), ".bin")
        path = self._folder / folder / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(found)
        self.done.counts[folder] += 1
        return f"{folder}/{path.name}"


def _file_name(camera: str, session: str, seq: str) -> str:
    return f"{camera}-{session}-{seq}"


def _whole(record: Fields) -> bool:
    """Whether a record can be named in a file's name, and has the fields that are read here."""
    numbers = (record.get("session", ""), record.get("seq", ""), record.get("t_verdict_ns", ""))
    named = CAMERA_ID.fullmatch(record.get("camera", "")) is not None
    return named and all(one.isascii() and one.isdecimal() for one in numbers) and {"frame", "heatmap"} <= set(record)


def _label(name: str, text: str) -> Fields | None:
    """A label's row, with the key of its image; None for what the page has not written."""
    camera, _, place = name.partition(":")
    session, _, seq = place.partition(":")
    values = text.split("|")
    numbers = (session, seq, values[1] if len(values) == 5 else "")
    if values[0] not in CLASSES or not CAMERA_ID.fullmatch(camera) or not all(map(str.isdecimal, numbers)):
        return None
    row = {"camera": camera, "session": session, "seq": seq, "label": values[0]}
    return {**row, **dict(zip(("t_ns", "verdict", "score", "key"), values[1:], strict=True))}


def _write_table(path: Path, rows: list[Fields], columns: Iterable[str]) -> None:
    """Write a table whole: these columns, then fields that a later version of the line has added."""
    names = dict.fromkeys((*columns, *(name for row in rows for name in row)))
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def _text(raw: dict[bytes, bytes]) -> Fields:
    return {name.decode(): value.decode("utf-8", "replace") for name, value in raw.items()}
