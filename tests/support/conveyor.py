"""A conveyor with a reject gate, simulated: what passes the gate when a bridge's core drives it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.parts import Verdict
from pipeline.plc.bridge import Core
from pipeline.plc.results import Result
from pipeline.plc.settings import Gate, Plc

MS = 1_000_000
PITCH_MS = 20
DELAY_MS = 300
STEP_MS = 1
WALL = 1_700_000_000_000_000_000


@dataclass(frozen=True)
class Fate:
    """What happens to one part.

    Attributes:
        good: Whether the line says OK.
        answer_ms: From arrival to the record that the bridge can read.
        lost: Whether the record never comes.
        doubled: Whether it comes twice, the second time as an OK that must not count.
    """

    good: bool = True
    answer_ms: int = 30
    lost: bool = False
    doubled: bool = False


@dataclass(frozen=True)
class Trouble:
    """What happens to the line and its surroundings, by part number: from, to."""

    line_dead: tuple[int, int] = (0, 0)
    redis_lost: tuple[int, int] = (0, 0)
    clock_steps: dict[int, int] = field(default_factory=dict)


def settings(**more: object) -> Plc:
    """``[plc]`` of one camera whose gate is ``DELAY_MS`` behind it."""
    gate = Gate(delay_ms=DELAY_MS, width_ms=PITCH_MS - 2)
    return Plc.model_validate({"cameras": ("cam1",), "gates": {"cam1": gate}, "window_ms": 2000, **more})


class Conveyor:
    """One camera, its line, and the gate.

    Args:
        fates: Of each part in its order, one every ``PITCH_MS``.
        trouble: What else happens.
        plc: ``[plc]``.
    """

    def __init__(self, fates: list[Fate], trouble: Trouble, plc: Plc | None = None) -> None:
        self.core = Core(plc or settings())
        self.passed: list[int] = []
        self._fates, self._trouble = fates, trouble
        self._step_ms = 0
        self._mail: list[tuple[int, Result]] = []

    def run(self) -> list[int]:
        """Let every part go by; return the numbers of those that passed."""
        end = len(self._fates) * PITCH_MS + DELAY_MS + 2 * PITCH_MS
        for at in range(0, end, STEP_MS):
            self._tick(at)
        return self.passed

    def _tick(self, at: int) -> None:
        number, now = at // PITCH_MS, (at + 10_000) * MS
        if at % PITCH_MS == 0:
            self._step_ms += self._trouble.clock_steps.get(number, 0)
            self._photograph(number, at)
        wall = WALL + now + self._step_ms * MS
        self.core.look(now, wall)
        redis = not _within(number, self._trouble.redis_lost)
        if redis:
            self._deliver(at, number, now)
        outputs = self.core.outputs(now, clear=redis)
        gone = at - DELAY_MS
        if gone >= 0 and gone % PITCH_MS == 0 and outputs["cam1"].gate and gone // PITCH_MS < len(self._fates):
            self.passed.append(gone // PITCH_MS)
        self.core.hear(now, {})

    def _photograph(self, number: int, at: int) -> None:
        if number >= len(self._fates) or _within(number, self._trouble.line_dead):
            return
        fate = self._fates[number]
        arrival = WALL + (at + 10_000) * MS + self._step_ms * MS
        verdict = Verdict.OK if fate.good else Verdict.NG
        result = Result("cam1", 1, number, verdict, "", arrival_ns=arrival)
        if not fate.lost:
            self._mail.append((at + fate.answer_ms, result))
            if fate.doubled:
                again = Result("cam1", 1, number, Verdict.OK, "", arrival_ns=arrival)
                self._mail.append((at + fate.answer_ms + 1, again))

    def _deliver(self, at: int, number: int, now: int) -> None:
        if at % 50 == 0:
            alive = not _within(number, self._trouble.line_dead)
            self.core.beat(now, {"counter": str(at), "state": "ContinuousExecution"} if alive else {})
        due = [result for when, result in self._mail if when <= at]
        self._mail = [(when, result) for when, result in self._mail if when > at]
        for result in due:
            self.core.take(now, result)


def _within(number: int, span: tuple[int, int]) -> bool:
    return span[0] <= number < span[1]


def answered_ok(fates: list[Fate]) -> Iterator[int]:
    """Numbers of the parts whose first record is an OK."""
    yield from (number for number, fate in enumerate(fates) if fate.good and not fate.lost)
