"""A record that is not a plain, first, readable OK is a reject."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.parts import Reason
from pipeline.plc.results import (
    MOST_SESSIONS,
    OTHER_REASON,
    OWN_REASONS,
    REASONS,
    UNREADABLE,
    FirstVerdicts,
    Result,
    parse,
)

GOOD = {
    "v": "1", "camera": "cam1", "session": "7", "seq": "3", "part": "P", "recipe": "", "verdict": "OK",
    "reason": "below_threshold", "score": "0.1", "threshold": "0.5", "engine": "e@1", "t_arrival_ns": "5",
    "latency_us": "900", "late": "0", "simulated": "0",
}  # fmt: skip


class TestParse:
    def test_a_record_of_the_contract(self) -> None:
        """Every field comes through."""
        expected = Result("cam1", 7, 3, "OK", "below_threshold", "P", "", "e@1", 0.1, 0.5, 5, 900, False)
        assert parse("cam1", GOOD) == expected

    @pytest.mark.parametrize(
        "change",
        [{"v": "2"}, {"verdict": "ok"}, {"verdict": "FINE"}, {"late": "1"}, {"score": "x"}, {"t_arrival_ns": ""}],
        ids=str,
    )
    def test_what_cannot_be_read_is_a_reject(self, change: dict[str, str]) -> None:
        """A damaged record, one of another version, and a late one never pass their part."""
        found = parse("cam1", GOOD | change)
        assert found is not None
        assert (found.passes, found.reason, found.seq) == (False, UNREADABLE, 3)

    @pytest.mark.parametrize("change", [{"seq": ""}, {"session": "x"}, {"camera": "cam2"}], ids=str)
    def test_what_names_no_part_is_none(self, change: dict[str, str]) -> None:
        """Nothing is guessed of whose verdict it is."""
        assert parse("cam1", GOOD | change) is None

    @given(st.dictionaries(st.sampled_from(sorted(GOOD)), st.text(max_size=12)))
    def test_garbage_never_passes(self, change: dict[str, str]) -> None:
        """Whatever is damaged, only a record that says OK in every respect passes."""
        found = parse("cam1", GOOD | change)
        if found is not None and found.passes:
            assert (GOOD | change)["verdict"] == "OK"
            assert (GOOD | change)["late"] == "0"


class TestReasons:
    def test_each_reason_has_a_number_of_its_own(self) -> None:
        """A PLC can tell every reason apart; no number is given twice, none to the catch-all."""
        assert set(Reason) <= set(REASONS)
        assert len(set(REASONS.values())) == len(REASONS)
        assert OTHER_REASON not in REASONS.values()
        assert set(OWN_REASONS) & set(Reason) == set()


class TestFirstVerdicts:
    def test_the_second_is_nothing(self) -> None:
        """A part that was rejected on the fast path is not passed by a later record."""
        first = FirstVerdicts()
        assert first(Result("a", 1, 1, "NG", ""))
        assert not first(Result("a", 1, 1, "OK", ""))
        assert first(Result("b", 1, 1, "OK", ""))

    def test_it_forgets_nothing_that_could_pass_again(self) -> None:
        """Beyond what is remembered, old parts are taken as seen."""
        first = FirstVerdicts(most=10)
        assert all(first(Result("a", 1, seq, "OK", "")) for seq in range(50))
        assert not any(first(Result("a", 1, seq, "OK", "")) for seq in range(50))

    def test_a_session_with_a_smaller_number_is_a_new_one(self) -> None:
        """A camera that starts again with its clock set back is not locked out."""
        first = FirstVerdicts(most=10)
        assert all(first(Result("a", 9, seq, "OK", "")) for seq in range(50))
        assert all(first(Result("a", 2, seq, "OK", "")) for seq in range(50))
        assert not any(first(Result("a", 2, seq, "OK", "")) for seq in range(50))

    def test_memory_is_bounded(self) -> None:
        """Sessions without end leave a bounded trace."""
        first = FirstVerdicts(most=1)
        for session in range(3 * MOST_SESSIONS):
            assert first(Result("a", session, 0, "OK", ""))
        assert len(first._forgotten) == MOST_SESSIONS
