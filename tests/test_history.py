"""The recorders of a soak: what they have written survives a kill, and comes back as it was."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from pipeline.soak.history import (
    FINAL,
    End,
    Ended,
    Entry,
    Event,
    Failed,
    History,
    Item,
    Latest,
    Lost,
    Recorder,
    Sent,
    Told,
    load,
    now,
    read,
)  # fmt: skip

FIELDS = {"camera": "cam1", "session": "7", "seq": "0"}
ITEMS: tuple[Item, ...] = (
    Sent("cam1", 7, 0, 1, "p", "d" * 64, 0.25, "OK"),
    Failed("cam1", 7, 0, 2),
    End("cam1", 7, 1, 3),
    Entry("verdicts:cam1", "7-0", FIELDS, 4, 1),
    Told(FIELDS, 5),
    Ended("cam1", 7, 1, 6),
    Latest("cam1", FIELDS),
    Event("exited", 8, "-9"),
    Lost(3, 9),
)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    """Items of every kind are read as they were written, also where another recorder goes on with the file."""
    for items in (ITEMS[:4], ITEMS[4:]):
        with Recorder(tmp_path / "a.jsonl") as recorder:
            recorder.add(*items)
    assert tuple(read(tmp_path / "a.jsonl")) == ITEMS


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    """A line that a kill has cut off is no part of the history; those before it are."""
    with Recorder(tmp_path / "a.jsonl") as recorder:
        recorder.add(*ITEMS)
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole[:-5])
    assert tuple(read(tmp_path / "a.jsonl")) == ITEMS[:-1]


def test_a_killed_recorder_loses_nothing_that_it_was_given(tmp_path: Path) -> None:
    """SIGKILL after a write: the item is in the file."""
    program = (
        "import os, signal, sys; from pathlib import Path; from pipeline.soak.history import *\n"
        "Recorder(Path(sys.argv[1])).add(Lost(1, 2)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, tmp_path / "a.jsonl"], check=False, timeout=60)
    assert killed.returncode == -9
    assert read(tmp_path / "a.jsonl") == [Lost(1, 2)]


def test_a_folder_is_one_history(tmp_path: Path) -> None:
    """All files together are the history; what Redis held at the end is kept apart from what readers saw."""
    with Recorder(tmp_path / "a.jsonl") as one, Recorder(tmp_path / FINAL) as final:
        one.add(*ITEMS)
        final.add(ITEMS[3])
    history = load(tmp_path, {"cam1": 500.0})
    expected = History(
        {"cam1": 500.0}, [ITEMS[0]], [ITEMS[1]], [ITEMS[2]], [ITEMS[3]], [ITEMS[4]], [ITEMS[5]],  # type: ignore[list-item]
        [ITEMS[3]], [ITEMS[6]], [ITEMS[7]], [ITEMS[8]],  # type: ignore[list-item]
    )  # fmt: skip
    assert history == expected
    assert history.deaths() == [8]


def test_a_look_in_between_leaves_out_what_was_read_later(tmp_path: Path) -> None:
    """What readers saw after the reading of Redis began cannot be held against what Redis held then."""
    history = History({}, live=[ITEMS[3]], told=[ITEMS[4]], ended=[ITEMS[5]])  # type: ignore[list-item]
    early = history.before(5)
    assert (early.live, early.told, early.ended, early.complete) == ([ITEMS[3]], [], [], False)


def test_times_are_comparable_between_processes() -> None:
    """Another process's clock lies between two readings of ours: CLOCK_MONOTONIC is the box's."""
    program = "from pipeline.soak.history import now; print(now())"
    before = now()
    there = int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60).stdout)
    assert before < there < now()
    assert abs(now() - time.monotonic_ns()) < 1_000_000_000
