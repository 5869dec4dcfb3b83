"""What happened in a soak, as independent recorders saw it: append-only files, one JSON object a line.

Times are nanoseconds of ``CLOCK_MONOTONIC``, which all processes of a box share and nobody can set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

Fields = dict[str, str]


class Sent(msgspec.Struct, tag="sent", frozen=True):
    """A frame that a sender is about to send; written before it is sent.

    Attributes:
        seq, session: As in its header.
        t: Monotonic nanoseconds.
        part: Its ``part``: a digest of this very frame; see :func:`pipeline.soak.frames.part_of`.
        sha256: Of the pixels as sent.
        score: What the engine has to give for these pixels.
        expect: ``OK`` or ``NG`` for a sound frame, ``UNKNOWN`` for one that nobody may judge.
    """

    camera: str
    session: int
    seq: int
    t: int
    part: str
    sha256: str
    score: float
    expect: str


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The sender knows that the frame written just before did not go out; its number is used up."""

    camera: str
    session: int
    seq: int
    t: int


class End(msgspec.Struct, tag="end", frozen=True):
    """A sender says that the session had ``parts`` parts."""

    camera: str
    session: int
    parts: int
    t: int


class Entry(msgspec.Struct, tag="entry", frozen=True):
    """An entry of a stream.

    Attributes:
        stream: ``verdicts``, ``rejects`` or ``late``.
        id: Its id.
        t: When it was read.
        read: Number of the reply that it came in; one reply shows all streams at one instant.
    """

    stream: str
    id: str
    fields: Fields
    t: int
    read: int


class Told(msgspec.Struct, tag="told", frozen=True):
    """A message of the channel of rejects."""

    fields: Fields
    t: int


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """The line has confirmed the end of a session."""

    camera: str
    session: int
    parts: int
    t: int


class Latest(msgspec.Struct, tag="latest", frozen=True):
    """A camera's ``latest`` hash when everything was over."""

    camera: str
    fields: Fields


class Event(msgspec.Struct, tag="event", frozen=True):
    """Something that the supervisor saw of the line.

    Attributes:
        what: ``started``, ``ready``, ``watchdog``, ``stopping`` or ``exited``.
        detail: The exit status, for ``exited``.
    """

    what: str
    t: int
    detail: str = ""


class Lost(msgspec.Struct, tag="lost", frozen=True):
    """The line has said that it could keep ``count`` entries nowhere."""

    count: int
    t: int


Item = Sent | Failed | End | Entry | Told | Ended | Latest | Event | Lost


class Recorder:
    """Appends to one file. Each line is one write, so that a kill leaves at most one torn line, the last.

    Args:
        path: The file; one that is there goes on.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._encode = msgspec.json.Encoder().encode

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def add(self, *items: Item) -> None:
        """Write these down."""
        self._file.write(b"".join(self._encode(item) + b"\n" for item in items))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class History:
    """All that was recorded, and what was promised.

    Attributes:
        deadlines: Deadline of each camera in the config, in milliseconds.
        sent, failed, ends: What the senders say.
        live, told, ended: What readers saw while it happened, in the order in which each saw it.
        final: What Redis holds at the end, in the order of each stream.
        latest: The ``latest`` hashes at the end.
        events, lost: What the supervisor saw of the line, and what the line declared lost.
        complete: Whether everything had come to rest when ``final`` was read: every camera had ended its session,
            and the line had nothing left to write.
    """

    deadlines: dict[str, float]
    sent: list[Sent] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    live: list[Entry] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    final: list[Entry] = field(default_factory=list)
    latest: list[Latest] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    complete: bool = True

    def before(self, t: int) -> History:
        """The same without what readers saw later: for a look at a soak that still runs.

        Args:
            t: When the reading of ``final`` began.
        """
        return replace(
            self,
            live=[entry for entry in self.live if entry.t < t],
            told=[message for message in self.told if message.t < t],
            ended=[end for end in self.ended if end.t < t],
            complete=False,
        )

    def deaths(self) -> list[int]:
        """When the line ended without having been asked to."""
        return [event.t for event in self.events if event.what == "exited" and event.detail != "0"]


FINAL = "final.jsonl"
"""Name of the file with what Redis held at the end."""


def load(folder: Path, deadlines: dict[str, float]) -> History:
    """Read every ``*.jsonl`` of a run's folder.

    Raises:
        msgspec.ValidationError: if a line other than a torn last one is none of ours.
    """
    history = History(deadlines)
    for path in sorted(folder.glob("*.jsonl")):
        _sort(history, read(path), final=path.name == FINAL)
    return history


def read(path: Path) -> Iterable[Item]:
    """The items of one file; a torn last line is left out."""
    decode: Callable[[bytes], Item] = msgspec.json.Decoder(Item).decode
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [decode(line) for line in whole.split(b"\n") if line]


def _sort(history: History, items: Iterable[Item], *, final: bool) -> None:
    entries = history.final if final else history.live
    lists: dict[type[Item], list[Any]] = {
        Sent: history.sent, Failed: history.failed, End: history.ends, Told: history.told, Ended: history.ended,
        Latest: history.latest, Event: history.events, Lost: history.lost, Entry: entries,
    }  # fmt: skip
    for item in items:
        lists[type(item)].append(item)


def now() -> int:
    """Monotonic nanoseconds."""
    return time.monotonic_ns()
