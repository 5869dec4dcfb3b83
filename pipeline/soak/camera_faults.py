"""What cameras do wrong."""

from __future__ import annotations

import time
from typing import Final

from pipeline.soak.fault import Act, Evidence, Fault, answered, both, refused
from pipeline.soak.rig import MAX_GAP, Mark, Rig

FLOOD_MS: Final = 1000
SLOW_MS: Final = 1500
SECOND: Final = 1_000_000_000


def _order(do: str, n: int = 1) -> Act:
    return lambda rig, camera: rig.cameras[camera].order(do, n)


def _kill(rig: Rig, camera: str) -> None:
    rig.cameras[camera].kill()


def _stale(rig: Rig, camera: str) -> None:
    rig.cameras[camera].order("reconnect")
    time.sleep(4 / rig.setup.rate)  # the new session has to be known before the old one comes again
    rig.cameras[camera].order("stale", 3)


def _new_session(rig: Rig, camera: str, mark: Mark) -> bool:
    before = {seen.session for seen in rig.tail.records if seen.camera == camera and seen.t < mark.t}
    return any(seen.session not in before for seen in rig.tail.since(mark.t, camera))


def _stranger(rig: Rig, camera: str, mark: Mark) -> bool:
    return any(seen.reason == "unknown_camera" for seen in rig.tail.since(mark.t, f"stranger-{camera}"))


def _many(rig: Rig, camera: str, mark: Mark) -> bool:
    """In some second there were as many parts as usually in four."""
    times = [seen.t for seen in rig.tail.since(mark.t, camera)]
    many = int(4 * rig.setup.rate)
    return any(last - first < SECOND for first, last in zip(times, times[many:], strict=False))


def _few(rig: Rig, camera: str, mark: Mark) -> bool:
    """Two parts of the camera were eight times as far from each other as usual."""
    return rig.tail.silence_s(mark.t, camera) > 8 / rig.setup.rate


def _bad(name: str, what: str, effect: str, seen: Evidence, n: int = 3) -> Fault:
    return Fault(name, "camera", what, effect, seen, _order(name, n), seconds=(0.1, 0.3))


def _reason(name: str, what: str, reason: str = "") -> Fault:
    return _bad(name, what, f"`UNKNOWN ({reason or name})`", answered(reason or name))


REFUSED: Final = "`refused` in the heartbeat grows"

CAMERA: Final = (
    Fault(
        "camera_kill", "camera", "a camera's process is killed and another one begins", "records of a new session",
        _new_session, _kill, lambda rig, camera: rig.cameras[camera].start(), (0.2, 1.0),
    ),
    _bad("reconnect", "a camera ends its session and begins another", "records of a new session", _new_session, 1),
    Fault(
        "flood", "camera", "ten times the rate, for a second", "four seconds' worth of records in one", _many,
        _order("flood", FLOOD_MS), seconds=(1.0, 1.5),
    ),
    Fault(
        "slow_camera", "camera", "a tenth of the rate", "records eight times as far apart", _few,
        _order("slow", SLOW_MS), seconds=(1.5, 2.0),
    ),
    _bad("gap", "numbers without frames", "`UNKNOWN (missing_frame)`", answered("missing_frame")),
    Fault(
        "jump", "camera", "more numbers without frames than `max_gap`", "`UNKNOWN (sequence_jump)`",
        answered("sequence_jump"), _order("gap", MAX_GAP + 10), seconds=(0.1, 0.3),
    ),
    _bad("duplicate", "a frame comes again", REFUSED, refused),
    _bad(
        "reorder", "two frames come the wrong way round", "`UNKNOWN (missing_frame)`, and " + REFUSED,
        both(answered("missing_frame"), refused), 2,
    ),
    Fault(
        "stale_session", "camera", "a frame of an ended session comes again", REFUSED, refused, _stale,
        seconds=(0.3, 0.5),
    ),
    _bad("corrupt_header", "headers that are no MessagePack", REFUSED, refused),
    _bad("garbage", "messages of random parts", REFUSED, refused, 50),
    _reason("truncated", "messages without pixels"),
    _reason("wrong_size", "a byte too few", "bad_size"),
    _reason("bad_format", "a format that there is not"),
    _reason("bad_version", "another version of the contract"),
    _reason("incomplete", "buffers that the camera did not fill"),
    _reason("undecodable", "JPEG files that are none"),
    _reason("unknown_recipe", "a product that the camera does not have"),
    _bad("huge", "a message far above `max_frame_bytes`", "`UNKNOWN (missing_frame)`", answered("missing_frame"), 1),
    _bad("unknown_camera", "a camera that is not in the config", "`UNKNOWN (unknown_camera)`", _stranger, 5),
)  # fmt: skip
