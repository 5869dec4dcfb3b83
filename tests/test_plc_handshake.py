"""A PLC sees every result, one after the other, or counts the loss."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.plc.handshake import MS, Handshake
from pipeline.plc.results import Result


def result(seq: int) -> Result:
    """An OK of ``cam1``."""
    return Result("cam1", 1, seq, "OK", "")


def handshake(*, acknowledged: bool = True, most: int = 4) -> Handshake:
    """A handshake that holds for 10 ms and waits for 100 ms."""
    return Handshake(hold_ms=10, ack_timeout_ms=100, most=most, acknowledged=acknowledged)


class TestHandshake:
    def test_it_starts_with_nothing(self) -> None:
        """Nothing shown is a reject."""
        assert handshake().shown is None

    def test_equal_results_flip_the_toggle(self) -> None:
        """Two equal results are still two."""
        shake, toggles = handshake(), []
        for at in range(3):
            shake.offer(result(1))
            shake.step(at * 20 * MS, shake.toggle)
            toggles.append(shake.toggle)
        assert toggles == [True, False, True]

    def test_the_next_waits_for_the_acknowledge(self) -> None:
        """A result stands until the PLC has repeated the toggle, and at least for its hold time."""
        shake = handshake()
        shake.offer(result(1))
        shake.offer(result(2))
        shake.step(0, ack=False)
        shake.step(5 * MS, ack=True)
        assert shake.shown == result(1)
        shake.step(50 * MS, ack=False)
        assert (shake.shown, shake.waiting) == (result(1), 1)
        shake.step(51 * MS, ack=True)
        assert (shake.shown, shake.waiting, shake.lost) == (result(2), 0, 0)

    def test_a_silent_plc_does_not_hold_it_up(self) -> None:
        """Without an acknowledge the next result comes in the end, and the loss is counted."""
        shake = handshake()
        shake.offer(result(1))
        shake.offer(result(2))
        shake.step(0, ack=False)
        shake.step(100 * MS, ack=False)
        assert (shake.shown, shake.lost) == (result(2), 1)

    def test_without_acknowledge_time_alone_counts(self) -> None:
        """In toggle mode each result stands for its hold time."""
        shake = handshake(acknowledged=False)
        shake.offer(result(1))
        shake.offer(result(2))
        shake.step(0, ack=False)
        shake.step(9 * MS, ack=False)
        assert shake.shown == result(1)
        shake.step(10 * MS, ack=False)
        assert shake.shown == result(2)

    def test_blank_takes_the_ok_away(self) -> None:
        """A line that is not trusted shows no OK, and what waited counts as lost."""
        shake = handshake()
        shake.offer(result(1))
        shake.step(0, ack=False)
        shake.offer(result(2))
        shake.blank()
        assert (shake.shown, shake.waiting, shake.lost) == (None, 0, 1)

    @given(st.lists(st.sampled_from(("offer", "step", "ack")), max_size=80))
    def test_none_vanishes(self, moves: list[str]) -> None:
        """Whatever the PLC does, each result is shown once in order, waits, or is counted as lost."""
        shake, offered, shown, at = handshake(most=3), 0, [], 0
        for move in moves:
            at += 30 * MS
            if move == "offer":
                offered += 1
                shake.offer(result(offered))
            before = shake.shown
            shake.step(at, shake.toggle if move == "ack" else not shake.toggle)
            if shake.shown is not before:
                shown.append(shake.shown.seq)  # type: ignore[union-attr]
            assert shake.waiting <= 3
        assert shown == sorted(set(shown))
        dropped = offered - len(shown) - shake.waiting
        assert 0 <= dropped <= shake.lost
