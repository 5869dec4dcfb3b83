"""What readers have seen lately: whether a fault has had its effect is told from this, not from the line's word."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from pipeline.soak.history import Ended, Entry, Item
from pipeline.soak.view import VERDICTS

KEPT: Final = 200_000


class Seen(NamedTuple):
    """A record as it was read.

    Attributes:
        t: When, in monotonic nanoseconds.
        off_s: How far the line's wall clock was from this box's.
    """

    t: int
    camera: str
    session: int
    verdict: str
    reason: str
    latency_ms: float
    off_s: float


class Tail:
    """Follows the file of a reader.

    Args:
        path: The file; it need not be there yet.

    Attributes:
        records: What was read from the verdict streams.
        ended: The session that each camera's last confirmed end is of.
        late: When late results were read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._decode = msgspec.json.Decoder(Item).decode
        self.records: deque[Seen] = deque(maxlen=KEPT)
        self.ended: dict[str, int] = {}
        self.late: list[int] = []

    def refresh(self) -> None:
        """Read what has come since."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, _, _ = file.read().rpartition(b"\n")
        if whole:
            self._offset += len(whole) + 1
            for line in whole.split(b"\n"):
                self._take(self._decode(line))

    def since(self, t: int, camera: str = "") -> list[Seen]:
        """The records that were read since then, of one camera or of all."""
        self.refresh()
        found = []
        for seen in reversed(self.records):
            if seen.t < t:
                break
            if not camera or seen.camera == camera:
                found.append(seen)
        return found[::-1]

    def reasons(self, t: int) -> set[str]:
        """The reasons of these records."""
        return {seen.reason for seen in self.since(t)}

    def silence_s(self, t: int, camera: str = "") -> float:
        """The longest time between two of these records."""
        times = [seen.t for seen in self.since(t, camera)]
        return max((later - earlier for earlier, later in zip([t, *times], times, strict=False)), default=0) / 1e9

    def _take(self, item: Item) -> None:
        if isinstance(item, Ended):
            self.ended[item.camera] = item.session
        if isinstance(item, Entry) and item.stream == "late":
            self.late.append(item.t)
        if isinstance(item, Entry) and item.stream.startswith(VERDICTS):
            fields = item.fields
            off = (int(fields["t_verdict_ns"]) - time.time_ns()) / 1e9
            latency = int(fields["latency_us"]) / 1000
            session, verdict, reason = int(fields["session"]), fields["verdict"], fields["reason"]
            self.records.append(Seen(item.t, fields["camera"], session, verdict, reason, latency, off))
