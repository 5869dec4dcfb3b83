"""The decoders under fuzzing, short and the same in each run. ``python -m tests.fuzz.wire`` looks for longer."""

from __future__ import annotations

import base64
import resource
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Final

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import targets

ROOT = Path(__file__).parent.parent
HEADER: Final = msgspec.msgpack.encode({"seq": 1, "session": 2, "w": 16, "h": 16, "fmt": "bgr8", "part": "P-1"})
TEXT: Final = b'{"msg": "cam1|P-1", "dtype": "uint8", "shape": [24, 32, 3]}'
IMAGE: Final = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)
FILES: Final = {kind: cv2.imencode(f".{kind}", IMAGE)[1].tobytes() for kind in ("png", "jpg")}
FOUND: Final = {
    "a png chunk of 4 GiB": "AwAIAAAAAAAAiVBORw0KGgoAAAANSUhEUgAAACAAAAAYCAAAAAC+OKAX////QElEQVQoFYXBgQAAQQgAwdbkUEIJ"
    "JZRQQgnlDX5nCMRDJKIQjRjEIg4RiIdIRCEaMYhFHCIQD5GIQjRiEIs4/n2BTQ2BHDf0hAAAAABJRU5ErkJggg==",
    "a png end of 3 GiB": "AwAIAO3/////iVBORw0KGgoAAAANSUhEUgAAACAAAAC+AAgYAAAAAEEIwfQAhElFTkSuQmCC",
}
"""Inputs that the coverage-guided harness has found, which once took all memory."""
PEAK: Final = 4 << 20
"""Bytes that Python may take for a message of a few kilobytes."""


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """Good bytes with some of them replaced, removed, repeated, or others put between."""
    raw = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        size = draw(st.integers(0, 8))
        raw[at : at + size] = draw(st.binary(max_size=8) | st.sampled_from([b"\xff" * 4, bytes(4), raw[at : at + 64]]))
    return bytes(raw)


def frame_of(fmt: str, w: int, h: int, stride: int, choice: int, body: bytes) -> bytes:
    """An input of the frame target."""
    return struct.pack("<BBHHH", choice, targets.FORMATS.index(fmt), w, h, stride) + body


inputs = st.one_of(
    st.binary(max_size=300),
    st.builds(bytes.__add__, st.just(b"\x00"), mutated(b"cam-1") | st.binary(max_size=70)),
    st.builds(bytes.__add__, st.just(b"\x01"), mutated(HEADER)),
    st.builds(bytes.__add__, st.just(b"\x02"), mutated(TEXT)),
    st.builds(
        lambda *values: b"\x03" + frame_of(*values),
        st.sampled_from(targets.FORMATS),
        st.integers(0, 63),
        st.integers(0, 63),
        st.integers(0, 255),
        st.integers(0, 31),
        mutated(FILES["png"]) | mutated(FILES["jpg"]) | st.binary(max_size=300),
    ),
)


@settings(max_examples=1000)
@given(inputs)
def test_no_input_breaks_a_promise(raw: bytes) -> None:
    """Values in range, reasons of the closed set, WireError and FrameError: nothing else leaves the decoders."""
    targets.any_target(raw)


@pytest.mark.parametrize("kind", [1, 2])
def test_a_message_takes_no_more_memory_than_its_size_explains(kind: int) -> None:
    """A header or text that promises much (long arrays, deep nesting, huge numbers) costs next to nothing."""
    promising = [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xa1x\xdd\xff\xff\xff\xff",
        b"\x82" + HEADER[1:] + b"\xa1x\xdc\xff\xff" + b"\x90" * 3000,
        b"[" * 4096,
        b'{"msg": "cam1", "shape": ' + b"9" * 4000 + b"}",
        b'{"msg": "cam1", "shape": [' + b"1e9," * 900 + b"1]}",
    ]
    tracemalloc.start()
    try:
        for raw in promising:
            targets.TARGETS[kind](raw)
        assert tracemalloc.get_traced_memory()[1] < PEAK
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("found", FOUND)
def test_what_fuzzing_has_found_stays_mended(found: str) -> None:
    """Each input runs in a process that may have 2 GiB, and ends at once."""
    limit = 2 << 30
    code = f"from tests.fuzz import targets; targets.any_target({base64.b64decode(FOUND[found])!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1000:]
