"""Fuzz the wire decoder with atheris, guided by coverage: ``python -m tests.fuzz.wire --runs 1000000``.

It stops at the first input that breaks a promise of ``tests/fuzz/targets.py``, crashes, hangs, or makes the process
allocate more than a frame can ask for, writes that input to the folder of findings, and ends with another exit code
than 0. ``python -m tests.fuzz.wire --replay FILE`` runs it again.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris
import cv2
import msgspec
import numpy as np

with atheris.instrument_imports(include=["pipeline.wire", "pipeline.decode", "engines.frames", "json"]):
    from tests.fuzz import targets

MALLOC_MIB = 512
"""A PNG of the largest allowed size unpacks to 192 MiB of colour; no single allocation may be larger than this."""
RSS_MIB = 2048
SLOW_S = 10
FINDINGS = Path(tempfile.gettempdir()) / "fuzz-findings"


def seeds(folder: Path) -> None:
    """Write good messages of every kind, so that mutation begins from the inside."""
    image = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)
    encoded = {kind: cv2.imencode(f".{kind}", image)[1].tobytes() for kind in ("png", "jpg")}
    full = {"seq": 1, "session": 2, "w": 32, "h": 24, "fmt": "bgr8", "v": 1, "stride": 96, "t_ns": 3, "part": "P-1"}
    full |= {"recipe": "r", "complete": True, "deadline_ms": 1.5, "eos": False, "truth": "good", "simulated": False}
    formats = targets.FORMATS
    good = [
        b"\x00cam-1",
        b"\x01" + msgspec.msgpack.encode(full),
        b"\x01" + msgspec.msgpack.encode({"seq": 2**64 - 1, "session": 0, "eos": True}),
        b'\x02{"msg": "cam1|P-1", "dtype": "uint8", "shape": [24, 32, 3]}',
        b'\x02{"msg": "cam1"}',
        bytes([3, 0, formats.index("png"), *bytes(6)]) + encoded["png"],
        bytes([3, 8, formats.index("jpeg"), *bytes(6)]) + encoded["jpg"],
        bytes([3, 24, formats.index("bayer_rg8"), 16, 0, 16, 0, 0, 0]) + bytes(256),
        bytes([3, 16, formats.index("mono8"), 16, 0, 16, 0, 20, 0]) + bytes(320),
    ]
    for number, raw in enumerate(good):
        (folder / f"seed-{number}").write_bytes(raw)


def main() -> None:
    """Read the options, then run; libFuzzer ends the process itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs to try")
    parser.add_argument("--seed", type=int, default=1, help="0 takes another one each time")
    parser.add_argument("--corpus", type=Path, help="keep interesting inputs in this folder, and begin with them")
    parser.add_argument("--findings", type=Path, default=FINDINGS, help="where a failing input goes")
    parser.add_argument("--replay", type=Path, help="run this one input and nothing else")
    options = parser.parse_args()
    if options.replay is not None:
        targets.any_target(options.replay.read_bytes())
        return
    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="fuzz-wire-"))
    for folder in (corpus, options.findings):
        folder.mkdir(parents=True, exist_ok=True)
    seeds(corpus)
    os.environ["OPENCV_LOG_LEVEL"] = "OFF"
    cv2.setNumThreads(1)
    arguments = [sys.argv[0], f"-runs={options.runs}", f"-seed={options.seed}", "-max_len=8192", "-len_control=100"]
    arguments += [f"-rss_limit_mb={RSS_MIB}", f"-malloc_limit_mb={MALLOC_MIB}", f"-timeout={SLOW_S}"]
    arguments += ["-print_final_stats=1", "-close_fd_mask=2", f"-artifact_prefix={options.findings}/", str(corpus)]
    print(f"{time.strftime('%H:%M:%S')} {' '.join(arguments[1:])}", flush=True)  # noqa: T201 - a command line tool
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    atheris.Setup(arguments, targets.any_target)
    print(f"{before >> 10} MiB before the first input", flush=True)  # noqa: T201
    atheris.Fuzz()


if __name__ == "__main__":
    main()
