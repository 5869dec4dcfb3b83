"""Every kind of fault against the running processes: it has its effect, and no promise is broken by it.

One set-up runs for all of them: two cameras, the line under its supervisor, two Redis servers, proxies, readers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from pipeline.soak.checker import check
from pipeline.soak.faults import FAULTS
from pipeline.soak.history import History
from pipeline.soak.rig import Rig, Setup
from pipeline.soak.servers import until

CAMERA = "cam1"
SEEN_S = 20.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The set-up, running."""
    made = Rig(Setup(tmp_path_factory.mktemp("soak") / "run", cameras=2, seed=5))
    try:
        made.settle()
        yield made
    finally:
        made.close()


def nothing_is_broken(history: History) -> None:
    """The checker finds nothing, in a history that says something."""
    assert check(history).violations == []
    assert history.sent
    assert history.live
    assert history.final


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_effect_and_breaks_no_promise(rig: Rig, name: str) -> None:
    """It is seen where it has to be; the line recovers by itself; every part so far has its one verdict."""
    fault, mark = FAULTS[name], rig.mark()
    fault.start(rig, CAMERA)
    time.sleep(fault.seconds[0])
    fault.stop(rig, CAMERA)
    until(lambda: fault.seen(rig, CAMERA, mark), f"{name}: {fault.effect}", SEEN_S)
    rig.settle()
    nothing_is_broken(rig.history_so_far())


def test_after_all_of_them_every_session_is_complete(rig: Rig) -> None:
    """When the cameras have ended, every part of every session is answered, and the line stops with status 0."""
    assert rig.finish()
    rig.shut()
    history = rig.history()
    nothing_is_broken(history)
    assert {end.camera for end in history.ended} == set(rig.setup.names)
    assert {entry.fields["verdict"] for entry in history.final} == {"OK", "NG", "UNKNOWN"}
    assert rig.exit_status == 0
