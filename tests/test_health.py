"""The rules of health: states, conditions and what counts as stuck, on invented clocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Health
from pipeline.health import ALLOWED, Condition, Conditions, ForbiddenTransitionError, Lifecycle, Signs, State, Watch

S = 1_000_000_000


class TestLifecycle:
    """The state machine of OPC 40100, as far as this line has it."""

    def test_names(self) -> None:
        """The states are those of the companion specification, letter by letter."""
        assert list(State) == ["Preoperational", "Ready", "ContinuousExecution", "Error", "Halted"]

    @pytest.mark.parametrize(("before", "after"), itertools.permutations(State, 2))
    def test_only_allowed_transitions_happen(self, before: State, after: State) -> None:
        """What is not in the table is refused, and leaves the state as it was."""
        life = Lifecycle()
        life.state = before
        if after in ALLOWED[before]:
            assert life.enter(after)
            assert life.state is after
        else:
            with pytest.raises(ForbiddenTransitionError):
                life.enter(after)
            assert life.state is before

    def test_a_halted_line_stays_halted(self) -> None:
        """Nothing leads out of Halted, and every other state leads into it: a stop always works."""
        assert not ALLOWED[State.HALTED]
        assert all(State.HALTED in ALLOWED[state] for state in State if state is not State.HALTED)

    def test_no_part_is_taken_before_ready(self) -> None:
        """A line executes only after it was ready, and never goes back to loading."""
        assert State.CONTINUOUS not in ALLOWED[State.PREOPERATIONAL]
        assert all(State.PREOPERATIONAL not in after for after in ALLOWED.values())

    def test_the_same_state_is_no_change(self) -> None:
        """It is not told again."""
        life = Lifecycle()
        assert not life.enter(State.PREOPERATIONAL)


class TestWatch:
    """What makes a line stuck."""

    @pytest.fixture
    def watch(self) -> Watch:
        """Threads may be silent for 5 s, answers may take 2 s."""
        return Watch(5 * S, 2 * S)

    @pytest.mark.parametrize("name", ["timer", "publisher", "lanes of lid", "all lanes of lid"])
    def test_a_thread_without_a_beat_is_named(self, watch: Watch, name: str) -> None:
        """Whichever thread hangs, the line is stuck as soon as its last beat is too old, and no sooner."""
        beats = {"timer": 100 * S, "publisher": 100 * S, "lanes of lid": 100 * S, "all lanes of lid": 100 * S}
        beats[name] = 95 * S
        assert watch.stuck(100 * S, beats, 0, 0) == ""
        assert watch.stuck(100 * S + 1, beats, 0, 0) == name

    def test_a_thread_that_has_not_begun_is_not_stuck(self, watch: Watch) -> None:
        """A beat of 0 is none."""
        assert watch.stuck(100 * S, {"timer": 0}, 0, 0) == ""

    def test_open_parts_without_an_answer_are_stuck(self, watch: Watch) -> None:
        """Every thread beats and parts are open, but none is answered: the line is stuck after the longest deadline."""
        assert watch.stuck(10 * S, {"timer": 10 * S}, 3, 7) == ""
        assert watch.stuck(12 * S, {"timer": 12 * S}, 3, 7) == ""
        assert watch.stuck(12 * S + 1, {"timer": 12 * S}, 3, 7) == "open parts"

    def test_an_answer_is_progress(self, watch: Watch) -> None:
        """As long as some part is answered now and then, open ones may go on being open."""
        for second in range(10, 60):
            assert watch.stuck(second * S, {}, 3, second) == ""

    def test_nothing_open_is_no_fault(self, watch: Watch) -> None:
        """A line without frames rests for as long as it likes, and the next part has its full time."""
        assert watch.stuck(10 * S, {}, 0, 7) == ""
        assert watch.stuck(1000 * S, {}, 0, 7) == ""
        assert watch.stuck(1001 * S, {}, 1, 7) == ""
        assert watch.stuck(1003 * S, {}, 1, 7) == "open parts"

    def test_a_line_that_answers_again_is_no_longer_stuck(self, watch: Watch) -> None:
        """The first answer after a hang ends it."""
        watch.stuck(10 * S, {}, 1, 7)
        assert watch.stuck(20 * S, {}, 1, 7) == "open parts"
        assert watch.stuck(21 * S, {}, 1, 8) == ""


class TestConditions:
    """What degrades a line that goes on."""

    @pytest.fixture
    def conditions(self) -> Conditions:
        """One camera, ready at second 100; events last for 10 s; silence begins after 60 s."""
        return Conditions(Health(), ["cam1"], 100 * S)

    @staticmethod
    def signs(second: float, **changes: object) -> Signs:
        """A healthy line at a second, but for ``changes``."""
        now = int(second * S)
        base = Signs(now, now + 7_000 * S, arrivals={"cam1": now})
        return base._replace(**changes)  # type: ignore[arg-type]

    def test_a_healthy_line_is_not_degraded(self, conditions: Conditions) -> None:
        """Nothing is said where nothing is wrong."""
        assert conditions.assess(self.signs(100)) == set()
        assert conditions.assess(self.signs(100.1)) == set()

    @pytest.mark.parametrize(
        ("field", "condition"), [("redis_failures", Condition.REDIS_LOST), ("given_up", Condition.OVERLOAD)]
    )
    def test_an_event_lasts_and_then_ends(self, conditions: Conditions, field: str, condition: Condition) -> None:
        """A counter that grows raises its condition, which ends 10 s after it last grew."""
        conditions.assess(self.signs(100, **{field: 4}))
        assert conditions.assess(self.signs(101, **{field: 5})) == {condition}
        assert conditions.assess(self.signs(110.9, **{field: 5})) == {condition}
        assert conditions.assess(self.signs(111, **{field: 5})) == set()

    def test_counters_of_an_earlier_time_are_no_event(self, conditions: Conditions) -> None:
        """What had happened before the first look degrades nothing."""
        assert conditions.assess(self.signs(100, redis_failures=9, given_up=9)) == set()

    @given(step=st.integers(-(10**18), 10**18))
    def test_a_clock_step_is_seen_either_way(self, step: int) -> None:
        """A wall clock that was set by more than 0.1 s degrades the line; slewing does not."""
        conditions = Conditions(Health(), ["cam1"], 100 * S)
        conditions.assess(self.signs(100))
        later = self.signs(100.1)
        found = conditions.assess(later._replace(wall=later.wall + step))
        assert found == ({Condition.CLOCK_STEP} if abs(step) > S // 10 else set())

    def test_a_high_spool_has_hysteresis(self, conditions: Conditions) -> None:
        """It is high from one half on, until it is below a quarter."""
        found = [bool(conditions.assess(self.signs(100, spool=share))) for share in (0.49, 0.5, 0.26, 0.24, 0.4)]
        assert found == [False, True, True, False, False]

    def test_lost_lanes_and_drift_hold_while_they_are(self, conditions: Conditions) -> None:
        """They are states, not events."""
        assert conditions.assess(self.signs(100, lanes_lost=1)) == {Condition.LANE_LOST}
        assert conditions.assess(self.signs(101, drifting=["cam1"])) == {Condition.DRIFT}
        assert conditions.assess(self.signs(102)) == set()

    def test_a_camera_that_stops_sending_is_silent(self, conditions: Conditions) -> None:
        """After 60 s without a part, and no longer than until its next one."""
        assert conditions.assess(self.signs(170, arrivals={"cam1": 110 * S})) == set()
        assert conditions.assess(self.signs(170.1, arrivals={"cam1": 110 * S})) == {Condition.CAMERA_SILENT}
        assert conditions.silent == ["cam1"]
        assert conditions.assess(self.signs(171)) == set()

    def test_a_camera_that_never_sends_is_silent_too(self, conditions: Conditions) -> None:
        """It counts from when the line was ready."""
        assert conditions.assess(self.signs(160, arrivals={})) == set()
        assert conditions.assess(self.signs(160.1, arrivals={})) == {Condition.CAMERA_SILENT}

    def test_silence_can_be_switched_off(self) -> None:
        """A line that rests for days is not degraded where nobody asks for it."""
        conditions = Conditions(Health(camera_silent_s=0), ["cam1"], 0)
        assert conditions.assess(self.signs(10**6, arrivals={})) == set()
