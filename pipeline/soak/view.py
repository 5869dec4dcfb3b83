"""A history, sorted for the checker: what was sent and answered, by part and by session."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from pipeline.soak.history import Entry, Fields, History, Sent

Identity = tuple[str, int, int]
"""Camera, session, seq: one part."""
Session = tuple[str, int]

NEVER: Final = 1 << 63
VERDICTS: Final = "verdicts:"
"""What the names of the streams of verdicts start with; the camera follows."""


def identity(fields: Fields) -> Identity:
    """The part that a record is of."""
    return fields["camera"], int(fields["session"]), int(fields["seq"])


def id_of(text: str) -> tuple[int, int]:
    """A stream id as a pair that compares as Redis compares ids."""
    left, _, right = text.partition("-")
    return int(left), int(right)


class View:
    """A history, sorted.

    Attributes:
        history: As it was recorded.
        attempts: What may have reached the line of each part: without the frames whose sender knows that they did not.
        parts: For each session, one more than the highest number that its sender has used up.
        records: Entries of the verdict streams at the end, by camera, in stream order.
        by_part: Of these, those of each part.
        rejects, late: Entries of these streams at the end, by part.
        ended: Confirmed sessions with their numbers of parts.
        read: Number of the reply in which a reader saw an entry first, and when, by stream and id.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.attempts = _attempts(history)
        self.parts = _parts(history)
        self.records: dict[str, list[Entry]] = defaultdict(list)
        for entry in history.final:
            if entry.stream.startswith(VERDICTS):
                self.records[entry.stream.removeprefix(VERDICTS)].append(entry)
        self.by_part = _by_part(entry for entries in self.records.values() for entry in entries)
        self.rejects = _by_part(entry for entry in history.final if entry.stream == "rejects")
        self.late = _by_part(entry for entry in history.final if entry.stream == "late")
        self.ended: dict[Session, int] = {(item.camera, item.session): item.parts for item in history.ended}
        self.read: dict[tuple[str, str], tuple[int, int]] = {}
        for entry in history.live:
            self.read.setdefault((entry.stream, entry.id), (entry.read, entry.t))

    def sessions(self, camera: str) -> list[tuple[int, list[Entry]]]:
        """The sessions of a camera in order of their first record, each with its records."""
        found: dict[int, list[Entry]] = {}
        for entry in self.records.get(camera, ()):
            found.setdefault(int(entry.fields["session"]), []).append(entry)
        return list(found.items())

    def last_session(self, camera: str) -> int | None:
        """The session that a camera's senders have begun last; None if it never sent."""
        return max((session for name, session in self.parts if name == camera), default=None)

    def named(self, part: Identity) -> int:
        """The earliest time at which the line can have known of a part: its frame, or a later one, was sent.

        The time at which its reject was read is of no use: a reader may read it after the line has died.
        """
        camera, session, _ = part
        times = (sent.t for sent in self.history.sent if (sent.camera, sent.session) == (camera, session))
        own = [sent.t for sent in self.attempts.get(part, ())]
        return min(own) if own else min(times, default=0)

    def first_read(self, camera: str, which: Callable[[int], bool]) -> int:
        """When a reader first saw a record of such sessions of a camera; the end of all times if never."""
        times = [
            self.read[entry.stream, entry.id][1]
            for entry in self.records.get(camera, ())
            if which(int(entry.fields["session"])) and (entry.stream, entry.id) in self.read
        ]
        return min(times, default=NEVER)

    def died_between(self, start: int, end: int) -> bool:
        """Whether the line ended unasked in this time."""
        return any(start <= death <= end for death in self.history.deaths())

    def judged(self) -> Iterator[Entry]:
        """The records that say that a frame was inspected."""
        for entries in self.records.values():
            yield from (entry for entry in entries if entry.fields["verdict"] in {"OK", "NG"})


def _attempts(history: History) -> dict[Identity, list[Sent]]:
    attempts: dict[Identity, list[Sent]] = defaultdict(list)
    for sent in history.sent:
        attempts[sent.camera, sent.session, sent.seq].append(sent)
    for failed in history.failed:
        tried = attempts[failed.camera, failed.session, failed.seq]
        before = [at for at, sent in enumerate(tried) if sent.t <= failed.t]
        if before:
            del tried[before[-1]]
    return attempts


def _parts(history: History) -> dict[Session, int]:
    parts: dict[Session, int] = {}
    used = [(sent.camera, sent.session, sent.seq + 1) for sent in history.sent]
    used += [(failed.camera, failed.session, failed.seq + 1) for failed in history.failed]
    used += [(end.camera, end.session, end.parts) for end in history.ends]
    for camera, session, count in used:
        parts[camera, session] = max(parts.get((camera, session), 0), count)
    return parts


def _by_part(entries: Iterable[Entry]) -> dict[Identity, list[Entry]]:
    found: dict[Identity, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[identity(entry.fields)].append(entry)
    return found
