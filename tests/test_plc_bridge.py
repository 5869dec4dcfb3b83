"""The bridge's decisions: no bad part passes the gate, whatever happens to line, Redis and clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.plc.bridge import Core
from pipeline.plc.results import LATE, NO_LINE, SIMULATED, Result
from pipeline.plc.settings import Gate
from tests.support.conveyor import DELAY_MS, MS, PITCH_MS, WALL, Conveyor, Fate, Trouble, answered_ok, settings

fates = st.builds(
    Fate,
    good=st.booleans(),
    answer_ms=st.integers(0, DELAY_MS + 50),
    lost=st.sampled_from((False, False, False, True)),
    doubled=st.booleans(),
)
spans = st.tuples(st.integers(0, 30), st.integers(0, 12)).map(lambda span: (span[0], span[0] + span[1]))
steps = st.dictionaries(st.integers(5, 30), st.sampled_from((-3000, -200, -40, -11, 11, 40, 200, 3000)), max_size=2)
troubles = st.builds(Trouble, line_dead=spans, redis_lost=spans, clock_steps=steps)


class TestConveyor:
    def test_good_parts_pass_and_bad_ones_do_not(self) -> None:
        """Without trouble exactly the parts with an OK pass, once the line's heartbeat has been seen to beat."""
        parts = [Fate(good=number % 3 != 0) for number in range(40)]
        assert Conveyor(parts, Trouble()).run() == [number for number in answered_ok(parts) if number >= 2]

    @hypothesis_settings(max_examples=60, deadline=None)
    @given(st.lists(fates, min_size=35, max_size=35), troubles)
    def test_no_part_passes_without_its_own_ok(self, parts: list[Fate], trouble: Trouble) -> None:
        """Late, lost and doubled records, a dead line, a lost Redis, a clock that is set: never a bad part."""
        passed = Conveyor(parts, trouble).run()
        assert set(passed) <= set(answered_ok(parts))

    def test_a_window_wider_than_the_pitch_would_pass_bad_parts(self) -> None:
        """The stated limit is a real one: the simulated conveyor does show parts that must not pass."""
        wide = settings(gates={"cam1": Gate(delay_ms=DELAY_MS, width_ms=3 * PITCH_MS)})
        parts = [Fate(lost=number % 2 == 0) for number in range(40)]
        assert not set(Conveyor(parts, Trouble(), wide).run()) <= set(answered_ok(parts))

    def test_a_dead_line_rejects_what_is_on_the_conveyor(self) -> None:
        """Parts with an OK that have not reached the gate are rejected once the heartbeat has stopped."""
        parts = [Fate() for _ in range(60)]
        passed = Conveyor(parts, Trouble(line_dead=(20, 40))).run()
        assert not set(passed) & set(range(25 - DELAY_MS // PITCH_MS, 40))
        assert set(passed) & set(range(45, 60))


@pytest.fixture
def core() -> Core:
    """A core that trusts its line, at 1 s."""
    core = Core(settings())
    core.look(0, WALL)
    for at in (500, 1000):
        core.beat(at * MS, {"counter": str(at), "state": "Ready"})
    core.outputs(1000 * MS, clear=True)
    return core


def ok(arrival_ms: int, seq: int = 1, **more: object) -> Result:
    """An OK of ``cam1``, as the line stamps it."""
    return Result("cam1", 1, seq, "OK", "", arrival_ns=WALL + arrival_ms * MS, **more)  # type: ignore[arg-type]


def shown(core: Core, now_ms: int) -> Result:
    """The result that stands before the PLC."""
    core.hear(now_ms * MS, {})
    found = core.outputs(now_ms * MS, clear=True)["cam1"].shown
    assert found is not None
    return found


class TestTrust:
    def test_it_starts_with_rejects(self) -> None:
        """Before any heartbeat: not ready, fault, gate shut, nothing shown."""
        output = Core(settings()).outputs(0, clear=True)["cam1"]
        assert (output.ready, output.fault, output.gate, output.shown) == (False, True, False, None)

    def test_one_heartbeat_proves_nothing(self) -> None:
        """A heartbeat that a dead line has left behind does not make it alive."""
        core = Core(settings())
        for at in range(0, 1000, 100):
            core.beat(at * MS, {"counter": "7", "state": "Ready"})
            assert not core.outputs(at * MS, clear=True)["cam1"].ready
        core.beat(1000 * MS, {"counter": "8", "state": "Ready"})
        assert core.outputs(1000 * MS, clear=True)["cam1"].ready

    @pytest.mark.parametrize("heartbeat", [{}, {"counter": "2000", "state": "Error"}, {"counter": "2000"}], ids=str)
    def test_a_line_that_does_not_inspect_is_not_trusted(self, core: Core, heartbeat: dict[str, str]) -> None:
        """A heartbeat that has lapsed, or names another state, takes trust away at once."""
        core.beat(1100 * MS, heartbeat)
        assert core.outputs(1100 * MS, clear=True)["cam1"].fault

    def test_a_heartbeat_that_stands_still_ages(self, core: Core) -> None:
        """After ``stale_ms`` without a new count the line is dead, though its key is still there."""
        core.beat(2900 * MS, {"counter": "1000", "state": "Ready"})
        assert core.outputs(2900 * MS, clear=True)["cam1"].ready
        assert not core.outputs(3100 * MS, clear=True)["cam1"].ready

    def test_a_lost_redis_takes_the_shown_ok_away(self, core: Core) -> None:
        """What the PLC sees is a reject as soon as Redis does not answer."""
        core.take(1000 * MS, ok(990))
        assert shown(core, 1001).passes
        assert core.outputs(1002 * MS, clear=False)["cam1"].shown is None


class TestVerdicts:
    def test_an_ok_is_shown_as_it_is(self, core: Core) -> None:
        """The PLC reads the line's verdict."""
        core.take(1000 * MS, ok(990))
        assert shown(core, 1001) == ok(990)

    def test_a_late_ok_is_a_reject(self, core: Core) -> None:
        """An OK older than the window does not pass; three in a row are a fault."""
        for seq in range(3):
            core.take(4000 * MS, ok(1000, seq))
        core.beat(3900 * MS, {"counter": "3900", "state": "Ready"})
        core.beat(4000 * MS, {"counter": "4000", "state": "Ready"})
        output = core.outputs(4000 * MS, clear=True)["cam1"]
        assert (output.ready, output.fault) == (True, True)

    def test_an_ok_from_the_future_is_a_reject(self, core: Core) -> None:
        """A stamp that cannot be right is not believed."""
        core.take(1000 * MS, ok(1010))
        assert shown(core, 1001).reason == LATE

    def test_an_ok_stamped_before_a_clock_step_is_a_reject(self, core: Core) -> None:
        """After the clock was set back, an older stamp could seem a fresh one."""
        core.look(1000 * MS, WALL + 800 * MS)
        core.take(1150 * MS, ok(940))  # seems to be 10 ms old
        assert shown(core, 1151).reason == LATE

    def test_a_simulated_ok_is_a_reject(self, core: Core) -> None:
        """A frame that is not of a real part opens no gate, unless the config says so."""
        core.take(1000 * MS, ok(990, simulated=True))
        assert shown(core, 1001).reason == SIMULATED

    def test_an_ok_of_a_line_without_trust_is_a_reject(self) -> None:
        """Not even where trust comes a moment later."""
        core = Core(settings())
        core.look(0, WALL)
        core.take(400 * MS, ok(390))
        for at in (500, 600):
            core.beat(at * MS, {"counter": str(at), "state": "Ready"})
        assert shown(core, 601).reason == NO_LINE

    def test_a_strange_camera_is_ignored(self, core: Core) -> None:
        """Only the cameras of the config have a block."""
        core.take(1000 * MS, Result("other", 1, 1, "OK", ""))
        assert set(core.outputs(1000 * MS, clear=True)) == {"cam1"}
