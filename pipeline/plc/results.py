"""A verdict as the bridge takes it off a record of ``dmdd.verdict.v1``; what cannot be read is a reject."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

import msgspec

from pipeline.parts import Reason, Verdict

VERDICTS: Final = {"": 0, Verdict.OK: 1, Verdict.NG: 2, Verdict.UNKNOWN: 3}
"""The numbers that a PLC compares with; 0 while nothing has been inspected."""
LATE: Final = "late_for_plc"
SIMULATED: Final = "simulated"
UNREADABLE: Final = "unreadable"
NO_LINE: Final = "no_line"
OWN_REASONS: Final = {LATE: 200, SIMULATED: 201, UNREADABLE: 202, NO_LINE: 203}
"""Reasons of the bridge itself."""
REASONS: Final = {
    Reason.BELOW_THRESHOLD: 1, Reason.ABOVE_THRESHOLD: 2, Reason.DEADLINE: 3, Reason.INFEASIBLE: 4,
    Reason.OVERLOAD: 5, Reason.MISSING_FRAME: 6, Reason.SEQUENCE_JUMP: 7, Reason.INCOMPLETE: 8,
    Reason.TRUNCATED: 9, Reason.BAD_VERSION: 10, Reason.BAD_FORMAT: 11, Reason.BAD_SIZE: 12,
    Reason.TOO_LARGE: 13, Reason.UNDECODABLE: 14, Reason.UNKNOWN_CAMERA: 15, Reason.UNKNOWN_RECIPE: 16,
    Reason.ENGINE_FAULT: 17, Reason.SHUTDOWN: 18, Reason.SAMPLED: 19, Reason.UNEXPECTED: 20,
    **OWN_REASONS,
}  # fmt: skip
"""The number of each reason. A number is never given to another reason."""
OTHER_REASON: Final = 255
MOST_SESSIONS: Final = 256


class Result(msgspec.Struct, frozen=True, gc=False):
    """One part's verdict.

    Attributes:
        arrival_ns: Wall clock at which the line saw the frame.
        session, seq: Which part of the camera it is.
    """

    camera: str
    session: int
    seq: int
    verdict: str
    reason: str
    part: str = ""
    recipe: str = ""
    engine: str = ""
    score: float = float("nan")
    threshold: float = float("nan")
    arrival_ns: int = 0
    latency_us: int = 0
    simulated: bool = False

    @property
    def passes(self) -> bool:
        """Whether the part may go on."""
        return self.verdict == Verdict.OK

    @property
    def identity(self) -> tuple[str, int, int]:
        """What makes a part the same part."""
        return self.camera, self.session, self.seq

    def refused(self, reason: str) -> Result:
        """The same part, not known to be good, for a reason of the bridge."""
        return msgspec.structs.replace(self, verdict=Verdict.UNKNOWN, reason=reason)


def parse(camera: str, fields: Mapping[str, str]) -> Result | None:
    """Read a record; one that is damaged but names its part is a reject.

    Returns:
        None if the record names no part of this camera: then no gate opens for it.
    """
    try:
        session, seq = int(fields["session"]), int(fields["seq"])
    except (KeyError, ValueError):
        return None
    if fields.get("camera") != camera:
        return None
    bare = Result(camera, session, seq, Verdict.UNKNOWN, UNREADABLE, fields.get("part", ""))
    if fields.get("v") != "1" or fields.get("verdict") not in tuple(Verdict) or fields.get("late") != "0":
        return bare
    try:
        return Result(
            camera, session, seq, fields["verdict"], fields["reason"], bare.part, fields.get("recipe", ""),
            fields.get("engine", ""), float(fields["score"] or "nan"), float(fields["threshold"] or "nan"),
            int(fields["t_arrival_ns"]), int(fields["latency_us"]), fields.get("simulated") == "1",
        )  # fmt: skip
    except (KeyError, ValueError):
        return bare


class FirstVerdicts:
    """Lets each part's first verdict through, whichever of two streams it comes by, and no other.

    Args:
        most: How many parts of a camera are remembered. Older ones of the same session never pass again.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._seen: dict[str, OrderedDict[tuple[int, int], None]] = {}
        self._forgotten: OrderedDict[tuple[str, int], int] = OrderedDict()

    def __call__(self, result: Result) -> bool:
        """Whether this is the part's first verdict."""
        seen = self._seen.setdefault(result.camera, OrderedDict())
        number = result.session, result.seq
        # By session: one that a camera with its clock set back has begun may have a smaller number than those before.
        if number in seen or result.seq <= self._forgotten.get((result.camera, result.session), -1):
            return False
        seen[number] = None
        if len(seen) > self._most:
            (session, seq), _ = seen.popitem(last=False)
            self._forget((result.camera, session), seq)
        return True

    def _forget(self, session: tuple[str, int], seq: int) -> None:
        self._forgotten[session] = max(seq, self._forgotten.get(session, -1))
        if len(self._forgotten) > MOST_SESSIONS:
            self._forgotten.popitem(last=False)
