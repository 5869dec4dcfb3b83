"""The gate opens for an OK's own part alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.parts import Verdict
from pipeline.plc import settings
from pipeline.plc.gate import MOST_WINDOWS, MS, Encoder, Gate, WallClock
from pipeline.plc.results import Result


def result(seq: int, verdict: str = Verdict.OK) -> Result:
    """A verdict of ``cam1``."""
    return Result("cam1", 1, seq, verdict, "")


def timed() -> Gate:
    """A gate 100 ms behind the camera, open for 10 ms."""
    return Gate(settings.Gate(delay_ms=100, width_ms=10))


class TestByTime:
    def test_it_starts_shut(self) -> None:
        """Nobody has said OK, nothing passes."""
        assert not timed().is_open(0)

    def test_an_ok_opens_it_at_its_time_alone(self) -> None:
        """Open around arrival + delay for the width, before and after that shut."""
        gate = timed()
        gate.decide(result(1), 0)
        assert [gate.is_open(at * MS) for at in (94, 95, 100, 104, 105, 200)] == [False, True, True, True, False, False]

    def test_a_reject_beside_an_ok_wins(self) -> None:
        """Where the windows of an OK and a reject overlap, the gate is shut."""
        gate = timed()
        gate.decide(result(1), 0)
        gate.decide(result(2, Verdict.UNKNOWN), 6 * MS)
        assert [gate.is_open(at * MS) for at in (99, 101, 104, 106)] == [True, False, False, False]

    def test_void_forgets_every_ok(self) -> None:
        """What is on its way is rejected."""
        gate = timed()
        gate.decide(result(1), 0)
        gate.void()
        assert not gate.is_open(100 * MS)

    def test_too_many_verdicts_shut_it(self) -> None:
        """Where windows no longer fit in memory none of them counts: the one dropped could be a reject's."""
        gate = timed()
        gate.decide(result(0, Verdict.NG), 0)
        for seq in range(1, MOST_WINDOWS + 1):
            gate.decide(result(seq, Verdict.NG if seq == 1 else Verdict.OK), 0)
        assert gate.is_open(100 * MS)  # the last OK alone is left
        gate.decide(result(9999, Verdict.NG), 0)
        assert not gate.is_open(100 * MS)


class TestByEncoder:
    def counting(self) -> tuple[Encoder, Gate]:
        encoder = Encoder()
        return encoder, Gate(settings.Gate(counts=1000, width_counts=100), encoder)

    def test_it_opens_where_the_part_is(self) -> None:
        """At the part's own count, however long the conveyor stood in between."""
        encoder, gate = self.counting()
        encoder.read(0, 500)
        gate.decide(result(1), 0)
        encoder.read(100 * MS, 500)
        assert not gate.is_open(100 * MS)
        encoder.read(5000 * MS, 1460)
        assert gate.is_open(5000 * MS)
        encoder.read(5100 * MS, 1560)
        assert not gate.is_open(5100 * MS)

    def test_a_stale_encoder_shuts_it(self) -> None:
        """Where nothing is known of the conveyor, nothing passes."""
        encoder, gate = self.counting()
        encoder.read(0, 500)
        gate.decide(result(1), 0)
        encoder.read(100 * MS, 1500)
        assert gate.is_open(100 * MS)
        assert not gate.is_open(400 * MS)

    def test_an_encoder_that_stands_while_parts_come_shuts_it(self) -> None:
        """Two parts at one count: the encoder has failed, and an OK's window would stay open for whatever comes."""
        encoder, gate = self.counting()
        encoder.read(0, 500)
        gate.decide(result(1), 0)
        encoder.read(100 * MS, 1500)
        assert gate.is_open(100 * MS)
        for at, seq in ((110, 2), (130, 3)):
            encoder.read(at * MS, 1500)
            gate.decide(result(seq), at * MS)
        encoder.read(140 * MS, 1500)
        assert not gate.is_open(140 * MS)

    def test_an_arrival_between_readings_is_interpolated(self) -> None:
        """A frame half-way between two readings was half-way between their counts."""
        encoder, _ = self.counting()
        encoder.read(0, 100)
        encoder.read(100 * MS, 200)
        assert encoder.position(50 * MS) == 150
        assert encoder.position(-1) is None

    def test_the_counter_wraps(self) -> None:
        """A 32-bit counter that begins anew goes on counting."""
        encoder, _ = self.counting()
        assert not encoder.read(0, 0xFFFFFFF0)  # the first reading: nothing was known before
        assert encoder.read(100 * MS, 0x10)
        assert encoder.position(100 * MS) == 0xFFFFFFF0 + 0x20

    def test_a_jump_is_told(self) -> None:
        """A conveyor that runs backwards makes all that was known void."""
        encoder, _ = self.counting()
        encoder.read(0, 1000)
        assert not encoder.read(10 * MS, 900)
        assert encoder.position(5 * MS) is None


class TestWallClock:
    @given(st.integers(-(10**12), 10**12), st.integers(0, 10**10))
    def test_it_converts(self, offset: int, at: int) -> None:
        """A wall-clock instant comes back as the monotonic one."""
        clock = WallClock()
        assert clock.look(at, at + offset)
        assert abs(clock.monotonic(at + offset) - at) < 1000

    def test_a_step_is_noticed_once(self) -> None:
        """A clock that was set is told; the next look is an ordinary one. Slewing is no step."""
        clock = WallClock()
        assert clock.look(0, 0)
        assert clock.look(1000 * MS, 1001 * MS)
        assert not clock.look(2000 * MS, 2100 * MS)
        assert clock.look(3000 * MS, 3100 * MS)
        assert 2000 * MS < clock.valid_from < 2101 * MS
