"""What has changed between the recorded verdicts and those of a replay. Pure logic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.recording import Recording
from pipeline.records import Fields

Name = tuple[str, int, int]


@dataclass(frozen=True)
class Change:
    """A part whose verdict is another one."""

    name: Name
    before: Fields
    after: Fields

    @property
    def text(self) -> str:
        """For people: which part, and from what to what."""
        camera, session, seq = self.name
        part = f" ({self.before['part']})" if self.before["part"] else ""
        return f"{camera}/{session}/{seq}{part}: {_said(self.before)} -> {_said(self.after)}"


@dataclass
class Diff:
    """The comparison of all parts.

    Attributes:
        equal: Parts with the same verdict.
        changes: Parts with another one, in the order of the recording.
        unanswered: Parts with a recorded verdict that got none now.
        unrecorded: Parts that got a verdict now, and whose recorded one is not known.
        scores: Score now minus score then, of every part that an engine judged both times.
        engines: Engines then, and engines now.
    """

    equal: int = 0
    changes: list[Change] = field(default_factory=list)
    unanswered: list[Name] = field(default_factory=list)
    unrecorded: int = 0
    scores: list[float] = field(default_factory=list)
    engines: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))

    @property
    def passed(self) -> bool:
        """Whether every recorded verdict was given again, and there was one."""
        return self.equal > 0 and not self.changes and not self.unanswered

    def figures(self) -> dict[str, Any]:
        """Everything that is counted, as plain values."""
        distances = [abs(value) for value in self.scores]
        kinds = Counter(f"{one.before['verdict']} -> {one.after['verdict']}" for one in self.changes)
        return {
            "parts": self.equal + len(self.changes) + len(self.unanswered),
            "equal": self.equal,
            "changed": len(self.changes),
            **dict(sorted(kinds.items())),
            "unanswered": len(self.unanswered),
            "without_a_record": self.unrecorded,
            "scores": len(self.scores),
            "score_difference_max": max(distances, default=None),
            "score_difference_mean": sum(distances) / len(distances) if distances else None,
            "engines_recorded": sorted(self.engines[0]),
            "engines_now": sorted(self.engines[1]),
        }

    def take(self, name: Name, before: Fields, after: Fields) -> None:
        """Compare a part's two records."""
        if before["verdict"] == after["verdict"]:
            self.equal += 1
        else:
            self.changes.append(Change(name, before, after))
        if before["score"] and after["score"]:
            self.scores.append(float(after["score"]) - float(before["score"]))
        for engines, record in zip(self.engines, (before, after), strict=True):
            engines.update({record["engine"]} - {""})


def compare(
    before: Mapping[Name, Fields], after: Mapping[Name, Fields], spans: Mapping[tuple[str, int], tuple[int, int]]
) -> Diff:
    """Compare the verdicts of all parts that were sent, and of those that were missing between them.

    Args:
        before: Recorded verdicts by camera, recorded session and number.
        after: New ones by the same names.
        spans: Of each camera and recorded session, the least and greatest number that was sent.
    """
    found = Diff()
    for name, record in before.items():
        if not _within(name, spans):
            continue
        if name in after:
            found.take(name, record, after[name])
        else:
            found.unanswered.append(name)
    found.unrecorded = sum(name not in before and _within(name, spans) for name in after)
    return found


def recorded(recording: Recording) -> dict[Name, Fields]:
    """The verdicts of a recording by camera, session and number; of cameras that can be compared by number."""
    left_out = frozenset(recording.manifest.renumbered)
    return _named(seen.fields for seen in recording.verdicts() if seen.fields["camera"] not in left_out)


def _named(records: Iterable[Fields]) -> dict[Name, Fields]:
    return {(one["camera"], int(one["session"]), int(one["seq"])): one for one in records}


def _within(name: Name, spans: Mapping[tuple[str, int], tuple[int, int]]) -> bool:
    low, high = spans.get(name[:2], (0, -1))
    return low <= name[2] <= high


def _said(record: Fields) -> str:
    score = f", score {record['score']}" if record["score"] else ""
    return f"{record['verdict']} ({record['reason']}{score})"
