"""Recordings of lines that need not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import wire
from pipeline.recording import Manifest, Message, RecordingWriter, Seen
from pipeline.wire import Header


def manifest(**changes: Any) -> Manifest:
    """What is known at the start of a recording of line ``t`` with one camera."""
    return Manifest(**{"line": "t", "cameras": ["cam1"], "renumbered": [], "sockets": [], "started_ns": 1, **changes})


def message(seq: int, *, camera: str = "cam1", session: int = 7, at_ms: float = 0.0, **header: Any) -> Message:
    """A message as it comes off the wire."""
    pixels = header.pop("pixels", bytes([seq % 256]) * 16)
    parts = wire.encode(camera, Header(seq=seq, session=session, **header), pixels)
    return Message(int(at_ms * 1e6), 0, [bytes(part) for part in parts])


def verdict(seq: int, said: str = "OK", **fields: str) -> Seen:
    """A part's record, as far as the tools read it."""
    record = {
        "camera": "cam1", "session": "7", "seq": str(seq), "part": "", "verdict": said, "score": "0.1",
        "reason": "below_threshold", "engine": "bright@1", **fields,
    }  # fmt: skip
    return Seen(0, 0, f"0-{seq}", record)


def write(folder: Path, messages: list[Message], verdicts: list[Seen] | None = None, **changes: Any) -> Path:
    """Write a recording that ended by itself."""
    writer = RecordingWriter(folder, manifest(**changes), 1 << 30)
    for one in messages:
        writer.message(one)
    for seen in verdicts or ():
        writer.verdict(seen)
    writer.close(2, "enough")
    return folder
