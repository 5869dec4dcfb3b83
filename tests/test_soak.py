"""``dmdd soak``: a short one with a fixed seed passes, and a line that lies is found out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.soak.checker import check
from pipeline.soak.rig import Rig, Setup
from tests.support.line import until


@pytest.mark.timeout(400)
def test_a_soak_with_a_fixed_seed_breaks_no_promise(tmp_path: Path) -> None:
    """Two minutes of faults of all kinds, two cameras: exit code 0, and a report of what was injected and seen."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipeline", "soak", "--minutes", "2", "--cameras", "2", "--seed", "7"]
    done = subprocess.run([*command, "--out", str(out)], check=False, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["passed"]
    assert report["violations"] == []
    assert len(report["faults"]) >= 5
    assert sum(row["seen"] for row in report["faults"]) >= len(report["faults"]) / 2
    assert min(report["verdicts"][name] for name in ("OK", "NG", "UNKNOWN")) > 0
    assert (out / "report.md").read_text().startswith("# Soak: passed")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A small set-up, running."""
    made = Rig(Setup(tmp_path / "run", cameras=2, seed=1))
    try:
        made.settle()
        yield made
    finally:
        made.close()


def test_a_line_that_gives_stale_results_is_found_out(rig: Rig) -> None:
    """Lanes that give the results of the batch before betray themselves to nobody but the checker."""
    time.sleep(1)
    rig.set_engine("stale")
    time.sleep(1)
    rig.set_engine()
    assert rig.finish()
    rig.shut()
    assert "wrong_frame" in {violation.kind for violation in check(rig.history()).violations}


def test_an_unknown_fault_is_refused_by_name() -> None:
    """The message says which faults there are; nothing is started."""
    done = CliRunner().invoke(app, ["soak", "--faults", "fire"])
    assert done.exit_code == 2
    assert "no fault 'fire'" in " ".join(done.output.split())


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    """Two histories never get into one folder."""
    (tmp_path / "read.jsonl").write_text("")
    with pytest.raises(FileExistsError, match="give a soak a folder of its own"):
        Rig(Setup(tmp_path))


def test_a_soak_that_is_stopped_leaves_no_process_behind(tmp_path: Path) -> None:
    """SIGTERM in the midst of it: line, cameras, reader and both Redis servers end with it."""
    command = [sys.executable, "-m", "pipeline", "soak", "--minutes", "5", "--cameras", "2", "--faults", "none"]
    with subprocess.Popen([*command, "--out", str(tmp_path / "out")], stdout=subprocess.DEVNULL) as soak:
        until((tmp_path / "out/cam2-001.jsonl").exists, 60)
        started = psutil.Process(soak.pid).children(recursive=True)
        soak.terminate()
        assert soak.wait(60) == 143
    assert len(started) >= 6
    assert psutil.wait_procs(started, timeout=10)[1] == []
