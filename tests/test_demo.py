"""The demo proves itself: exit code 0 only if every part was answered exactly once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from engines import bundle
from pipeline.demo import ENGINE


def test_the_demo_answers_every_part_and_catches_defects(tmp_path: Path) -> None:
    """A short demo ends with 0 and a summary that was counted from Redis."""
    report = tmp_path / "demo.json"
    command = [sys.executable, "-m", "pipeline", "demo", "--seconds", "4", "--rate", "5", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads(report.read_text())
    assert figures["parts"] == 40
    assert figures["unanswered"] == figures["answered_more_than_once"] == 0
    assert "XREVRANGE 'dmdd:{demo}:rejects'" in done.stdout


def test_the_demo_engine_is_small_and_verified() -> None:
    """The engine in the repository is a valid bundle of at most 8 MiB."""
    bundle.load(ENGINE)
    assert sum(file.stat().st_size for file in ENGINE.iterdir()) <= 8 << 20


def test_the_running_line_never_imports_torch() -> None:
    """Neither the service nor the evaluation pulls torch in."""
    code = (
        "import sys, pipeline.service, pipeline.demo, pipeline.camera, train.evaluate, engines.openvino_lane;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
