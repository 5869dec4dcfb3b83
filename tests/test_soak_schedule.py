"""The schedule of faults, the choice of them, and the report that names them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.soak.checker import KINDS as KINDS_OF_VIOLATION
from pipeline.soak.checker import check
from pipeline.soak.faults import FAULTS, GROUPS, UnknownFaultError, as_table, chosen
from pipeline.soak.report import figures, write
from pipeline.soak.rig import Setup
from pipeline.soak.run import Injection, Outcome
from pipeline.soak.schedule import Slot, schedule
from pipeline.soak.supervisor import Sample
from tests.support.story import Story

CAMERAS = ["cam1", "cam2"]
KINDS = list(FAULTS.values())
PAGE = Path(__file__).parent.parent / "docs/reliability.md"


def slots(seed: int, count: int = 200) -> list[Slot]:
    """The first slots of a seed."""
    return list(islice(schedule(KINDS, CAMERAS, np.random.default_rng(seed)), count))


def test_a_seed_is_a_schedule() -> None:
    """The same seed gives the same faults at the same times, another seed others."""
    assert slots(7) == slots(7)
    assert slots(7) != slots(8)


def test_every_kind_comes_before_any_comes_again() -> None:
    """However short a soak is, it wastes no time on repetitions."""
    names = [fault.name for slot in slots(3) for fault in slot.faults]
    assert set(names[: len(KINDS)]) == set(FAULTS)


def test_what_has_to_be_alone_is_alone() -> None:
    """Two faults at once are of different groups, and neither is one that another would spoil."""
    pairs = [slot.faults for slot in slots(5, 500) if len(slot.faults) > 1]
    assert len(pairs) > 50
    assert all(first.group != second.group for first, second in pairs)
    assert not any(fault.alone for pair in pairs for fault in pair)


def test_no_faults_no_slots() -> None:
    """A soak without faults is one of load alone."""
    assert list(schedule([], CAMERAS, np.random.default_rng(0))) == []


def test_the_registry_is_whole() -> None:
    """At least thirty kinds, each in a known group, under its own name, and told by what it is seen."""
    assert len(FAULTS) >= 30
    assert all(
        fault.name == name and fault.group in GROUPS and fault.what and fault.effect for name, fault in FAULTS.items()
    )
    assert {fault.group for fault in KINDS} == set(GROUPS)


def test_choice() -> None:
    """Names and groups, none twice; what there is not is refused with what there is."""
    assert chosen("all") == KINDS
    assert chosen("none") == []
    assert [fault.name for fault in chosen("redis_kill, gap,redis_kill")] == ["redis_kill", "gap"]
    assert {fault.group for fault in chosen("box,line")} == {"box", "line"}
    with pytest.raises(UnknownFaultError, match="no fault 'fire'; there are: all, none, camera"):
        chosen("gap,fire")


def test_the_page_has_the_table() -> None:
    """The table of faults in the documentation is the registry's own: nothing has to be kept in step by hand."""
    assert as_table(KINDS) in PAGE.read_text(), "write what `dmdd soak --list` prints into docs/reliability.md"


def outcome(tmp_path: Path, *, sound: bool) -> Outcome:
    """A soak of two faults and 100 seconds."""
    story = Story("cam1")
    story.good("cam1")
    story.bad("cam1")
    history = story.close()
    if not sound:
        history.final.pop(0)
    samples = [Sample(1, n * 1_000_000_000, 1000 + (10 if n > 50 else 0), 20, 7) for n in range(100)]
    injections = [Injection("gap", "cam1", 1, 0.5, seen=True, recovered_s=0.2), Injection("gap", "cam1", 2, error="no")]
    counts = {"started": 1}
    return Outcome(Setup(tmp_path), 100.0, injections, history, check(history), samples, counts)


def test_report(tmp_path: Path) -> None:
    """The report says what was run, what came of it, and how far memory grew after the first quarter."""
    found = figures(outcome(tmp_path, sound=True))
    assert found["passed"]
    assert found["verdicts"] == {"OK": 1, "NG": 1}
    assert found["faults"] == [{"name": "gap", "times": 2, "seen": 1, "recovered_s": 0.2, "errors": 1}]
    assert found["lives"][0] == {
        "life": 1, "seconds": 99, "rss_mib": 1.0, "rss_growth_percent": 1.0, "fds": "20, 20 (20 to 20)",
        "threads": "7, 7 (7 to 7)",
    }  # fmt: skip
    markdown, data = write(outcome(tmp_path, sound=True), tmp_path)
    assert json.loads(data.read_text()) == found
    assert markdown.read_text().startswith("# Soak: passed: no promise was broken\n")


def test_report_of_a_broken_promise(tmp_path: Path) -> None:
    """Each violation is named with its part."""
    markdown, _ = write(outcome(tmp_path, sound=False), tmp_path)
    assert markdown.read_text().startswith("# Soak: FAILED\n")
    assert "- `unanswered` cam1 " in markdown.read_text()


def test_the_page_has_every_promise() -> None:
    """Each kind of violation stands in the documentation with its meaning, and no other."""
    rows = PAGE.read_text().partition("| broken promise |")[2].partition("\n\n")[0].splitlines()[2:]
    assert rows == [f"| `{name}` | {text} |" for name, text in KINDS_OF_VIOLATION.items()]
