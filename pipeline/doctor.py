"""``dmdd doctor``: whether this box can run this line, point by point, with what to do where it cannot.

Every check looks at the real thing and changes nothing that a running line would notice.
"""

from __future__ import annotations

import ctypes
import fcntl
import getpass
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import zmq

from engines import signing
from engines.bundle import Bundle, BundleError
from engines.calibration import CalibrationError, verify
from engines.signing import Trust
from engines.store import Store, StoreError
from pipeline import config as settings
from pipeline import curve, gate
from pipeline.checks import Check, Level, fail, ok, warn
from pipeline.config import Camera, Config, ConfigError, Socket
from pipeline.doctor_devices import check_driver, check_openvino, check_pycuda, check_tensorrt
from pipeline.doctor_redis import check_redis, line_is_alive

MIN_FREE: Final = 256 << 20
"""Bytes; with less, a new engine or the first minutes of a spool do not fit."""
STRETCH: Final = 0.05
"""So much may the aspect ratio of a region of interest differ from that of its engine's input."""
TIME_ERROR: Final = 5
"""What adjtimex(2) returns while nothing synchronises the clock."""
COARSE_S: Final = 1e-3
YEAR_2025_S: Final = 1_735_689_600
CONNECT_S: Final = 1.0
SIOCGIFADDR: Final = 0x8915
"""Ask for an interface's IPv4 address, netdevice(7)."""


def examine(path: Path) -> list[Check]:
    """Check everything that the line of a config needs.

    A config that cannot be read is a finding too; the checks that need none are made all the same.
    """
    try:
        config = settings.load(path)
    except ConfigError as error:
        wrong = fail("config", str(error), "mend it; the project's config.toml explains every key")
        others = [check_clock, lambda: check_driver(needed=False), lambda: check_openvino("fp32", needed=True)]
        return [wrong, *_run(others)]
    gpu = config.engine.target == "tensorrt"
    return _run(
        [
            lambda: check_config(path, config),
            lambda: check_driver(needed=gpu),
            lambda: check_pycuda(needed=gpu),
            lambda: check_tensorrt(needed=gpu),
            lambda: check_openvino(config.engine.precision, needed=not gpu),
            lambda: check_redis(config.redis, config.line.name),
            lambda: check_endpoints(config),
            lambda: check_disk(config),
            check_clock,
            lambda: check_folders(config),
            lambda: check_engines(config),
        ]
    )


def failed(checks: list[Check]) -> bool:
    """Whether the line cannot run as it is configured."""
    return any(check.level is Level.FAIL for check in checks)


def _run(checks: list[Callable[[], Iterator[Check]]]) -> list[Check]:
    return [found for check in checks for found in check()]


def check_config(path: Path, config: Config) -> Iterator[Check]:
    """Whether others can read a password in the config."""
    yield ok("config", f"{path}: valid; line {config.line.name}, cameras {', '.join(config.cameras)}")
    redis = config.redis
    files = [path] if urlsplit(redis.url).password is not None else []
    files += [Path(file) for file in (redis.password_file, redis.sentinel_password_file, redis.tls_key) if file]
    if not files:
        yield ok("secrets", "the config holds no password")
    for file in files:
        yield _check_secret(file)
    if any(each.curve for each in config.sockets):
        yield _check_keys(config)


def _check_keys(config: Config) -> Check:
    """Whether the line can read its CURVE keys, and knows every camera's."""
    try:
        keys = curve.load_server(config.curve.keys)
    except curve.CurveError as error:
        return fail("keys", str(error), "dmdd keys server makes them, dmdd keys camera NAME those of a camera")
    missing = sorted(set(config.cameras) - set(keys.cameras))
    if missing:
        return warn("keys", f"{config.curve.keys} has no key of {', '.join(missing)}", f"dmdd keys camera {missing[0]}")
    return ok("keys", f"{config.curve.keys}: the line's own and {len(keys.cameras)} cameras'")


def _check_secret(path: Path) -> Check:
    """Whether others can read a file with a password or key; whether it is there is another check's matter."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0
    if mode & 0o004:
        return fail("secrets", f"everybody on this box can read the password in {path} (mode {mode:o})", _chmod(path))
    if mode & 0o040:
        return warn("secrets", f"its group can read the password in {path} (mode {mode:o})", _chmod(path))
    return ok("secrets", f"only its owner can read the password in {path}")


def _chmod(path: Path) -> str:
    return f"chmod 600 {path}, owned by the line's user; change the password if others could have read it"


def check_endpoints(config: Config) -> Iterator[Check]:
    """Whether the line could open its sockets. Nothing of a running line is touched."""
    alive = line_is_alive(config.redis, config.line.name)
    for each in config.sockets:
        name = f"zeromq {each.address}"
        wrong = _connect_problem(each) if each.mode == "connect" else _bind_problem(each)
        if not wrong:
            yield ok(name, f"libzmq {zmq.zmq_version()} can {each.mode} it")
        elif each.mode == "connect":
            yield warn(name, wrong, "start the camera, check its address; the line connects when it comes")
        elif alive and "use" in wrong:
            yield ok(name, f"{wrong}, and line {config.line.name} is alive")
        else:
            yield fail(name, wrong, "stop the program that has it (`ss -ltnp`), or change the address in [[sockets]]")


def _bind_problem(each: Socket) -> str:
    """Why an address cannot be bound; empty if it can.

    ZeroMQ itself is not asked to bind it. Waiting senders would connect at once, and then either lose frames or,
    where the socket's type does not suit them, never connect again. A port without a listener only refuses them.
    """
    scheme, _, place = each.address.partition("://")
    if scheme == "ipc":
        return _ipc_problem(Path(place))
    host, _, port = place.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZeroMQ does: only a listener is in the way
        try:
            probe.bind((_resolve(host), int(port)))
        except (OSError, ValueError, OverflowError) as error:
            return getattr(error, "strerror", None) or str(error)
    return ""


def _resolve(host: str) -> str:
    """What ZeroMQ takes for a host: ``*``, the name of a network interface, a name or an address."""
    if host == "*":
        return "0.0.0.0"  # noqa: S104 - tried because it is configured
    if host not in {name for _, name in socket.if_nameindex()}:
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        reply = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, host.encode().ljust(40, b"\0"))
    return socket.inet_ntoa(reply[20:24])


def _ipc_problem(path: Path) -> str:
    """Not bound to find out: ZeroMQ would take the path away from whoever listens there."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"the folder {path.parent} is not there or not writable"
    if not path.exists():
        return ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:  # left behind by a process that is gone: ZeroMQ takes it over
            return ""
        except OSError as error:
            return f"{path}: {error.strerror}"
    return "Address already in use"


def _connect_problem(each: Socket) -> str:
    """Why nobody answers at an address that the line connects to; empty if somebody does."""
    parts = urlsplit(each.address)
    if parts.scheme != "tcp":
        return "" if Path(each.address.partition("://")[2]).exists() else "nobody listens there"
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), CONNECT_S).close()
    except (OSError, ValueError) as error:
        return f"nobody answers there: {error}"
    return ""


def check_disk(config: Config) -> Iterator[Check]:
    """Free space where engines are stored and where records wait."""
    folders = {
        "disk of the store": (config.engine.store, MIN_FREE),
        "disk of the spool": (config.spool.path, _spool_needs(config)),
    }
    for name, (path, wanted) in folders.items():
        free = shutil.disk_usage(_existing(path)).free
        found = f"{_gib(free)} free at {path}"
        if free < MIN_FREE:
            yield fail(name, found, f"free some: at least {_gib(MIN_FREE)}, better {_gib(wanted)}")
        elif free < wanted:
            yield warn(name, found, f"spool.max_bytes may need {_gib(wanted)}: free some, or lower it")
        else:
            yield ok(name, found)


def _spool_needs(config: Config) -> int:
    """Bytes that the spool may still grow by."""
    folder = config.spool.path
    used = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
    return max(MIN_FREE, config.spool.max_bytes + config.spool.picture_bytes - used)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def check_clock() -> Iterator[Check]:
    """Whether the wall clock is right and kept right, and the monotonic one fine enough for deadlines."""
    remedy = "run chrony or systemd-timesyncd; records are ordered by it and compared with the PLC's"
    buffer = ctypes.create_string_buffer(512)  # struct timex with modes = 0: it is only read
    state = ctypes.CDLL(None).adjtimex(buffer)
    if time.time() < YEAR_2025_S:
        yield fail(
            "clock", f"it says {time.strftime('%Y-%m-%d %H:%M', time.gmtime(time.time()))}", "set it, then " + remedy
        )
    elif state == TIME_ERROR:
        yield warn("clock", "nothing synchronises it", remedy)
    elif state < 0:
        yield warn("clock", "the system does not say whether it is synchronised", remedy)
    else:
        yield ok("clock", "synchronised")
    step = _monotonic_step()
    if step > COARSE_S:
        yield fail("monotonic clock", f"its steps are {step * 1e3:.2f} ms", "deadlines need finer: use another system")
    else:
        yield ok("monotonic clock", f"its steps are {step * 1e9:.0f} ns")


def _monotonic_step() -> float:
    """The smallest of some steps of the clock that deadlines are kept by, in seconds."""
    steps = []
    for _ in range(20):
        first = second = time.monotonic_ns()
        while second == first:
            second = time.monotonic_ns()
        steps.append(second - first)
    return min(steps) / 1e9


def check_folders(config: Config) -> Iterator[Check]:
    """Whether this user can read the store and write the spool."""
    who, store, spool = getpass.getuser(), config.engine.store, config.spool.path
    if not (store.is_dir() and os.access(store, os.R_OK | os.X_OK)):
        remedy = "`dmdd train` and `dmdd engines add` make one; check engine.store and the folder's owner"
        yield fail("store", f"{store} is no folder that {who} can read", remedy)
    elif wrong := _write_problem(store):
        remedy = f"the line only reads it; to add or activate engines, run as its owner, or chown it to {who}"
        yield warn("store", f"{store}: {who} cannot write it ({wrong})", remedy)
    else:
        yield ok("store", f"{store}: {who} can read and write it")
    if wrong := _write_problem(_existing(spool)):
        remedy = "chown it to the line's user; without it records are lost while Redis is away"
        yield fail("spool", f"{spool}: {who} cannot write it ({wrong})", remedy)
    else:
        yield ok("spool", f"{spool}: {who} can write it")


def _write_problem(folder: Path) -> str:
    """Why no file can be made in a folder; empty if one can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"\0")
    except OSError as error:
        return str(error.strerror)
    return ""


def check_engines(config: Config) -> Iterator[Check]:
    """Whether every configured engine may be run, and fits the cameras that it is for."""
    engine = config.engine
    try:
        trust = signing.load_trust(engine.trusted_keys, required=engine.require_signature)
    except (BundleError, OSError) as error:
        yield fail("trusted keys", str(error), "check engine.trusted_keys")
        return
    for reference in config.engines():
        try:
            bundle = Store(engine.store, trust).resolve(reference)
        except (StoreError, BundleError, OSError) as error:
            remedy = "`dmdd engines list`; then add, sign or activate one, or roll back"
            yield fail(f"engine {reference}", str(error), remedy)
            continue
        yield from _check_engine(config, reference, bundle, trust)


def _check_engine(config: Config, reference: str, bundle: Bundle, trust: Trust) -> Iterator[Check]:
    name, signer = f"engine {reference}", signing.check(bundle, trust)
    try:
        bundle.parity()
        if (evidence := bundle.evidence()) is not None:
            verify(bundle.manifest.threshold, evidence)
    except (BundleError, CalibrationError) as error:
        yield fail(name, str(error), "take another version: `dmdd engines rollback`, or train anew")
        return
    yield ok(name, f"{bundle.label}: files verified, {f'signed by {signer}' if signer else 'not signed'}")
    yield _check_gate(config, name, reference, bundle)
    for camera, each in config.cameras.items():
        if reference in {config.engine_of(camera), *(each.recipes or {}).values()}:
            yield _check_camera(f"camera {camera}", each, bundle, config.limits.max_frame_bytes)


def _check_gate(config: Config, name: str, reference: str, bundle: Bundle) -> Check:
    """Whether it is known to reproduce its reference as the line will run it."""
    kind = f"{config.engine.target}-{config.engine.precision}"
    try:
        reports = {report.kind: report for report in gate.kept(Store(config.engine.store), bundle)}
    except BundleError as error:
        return fail(name, str(error), "`dmdd engines verify`")
    report = reports.get(kind)
    if report is None:
        remedy = f"`dmdd engines verify {reference} --config FILE`; the line passes it through the gate when it starts"
        return warn(name, f"no report of its parity gate for {kind}", remedy)
    if not report.passed:
        return fail(name, f"refused by the parity gate for {kind}: {report.reason}", "another precision or version")
    return ok(name, f"passed the parity gate for {kind} on {report.created}")


def _check_camera(name: str, camera: Camera, bundle: Bundle, most: int) -> Check:
    """Whether what a camera shows can become the engine's input without being distorted."""
    spec = bundle.manifest.input
    takes = f"{bundle.label} takes {spec.width}x{spec.height} {spec.colour}"
    if camera.roi is None:
        return ok(name, f"{takes}; whole frames are resized to it")
    left, top, width, height = camera.roi
    if (left + width) * (top + height) * spec.channels > most:
        found = f"a raw frame that holds its roi is larger than limits.max_frame_bytes ({most})"
        return warn(name, found, "raise limits.max_frame_bytes, unless frames come compressed")
    seen = (height, width) if camera.rotate in (90, 270) else (width, height)
    ratio = seen[0] / seen[1] * spec.height / spec.width
    found = f"{takes}; its roi shows {seen[0]}x{seen[1]}"
    if abs(ratio - 1) > STRETCH:
        return warn(name, f"{found}, another aspect ratio", "train on images cut in the same way, or change the roi")
    if seen[0] < spec.width or seen[1] < spec.height:
        return warn(name, f"{found}, less than the engine looks at", "a larger roi, or an engine of a smaller size")
    return ok(name, found)
