"""Outputs as 16-bit registers, and a PLC's registers as inputs."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from pipeline.plc.bridge import Input, Output
from pipeline.plc.results import OTHER_REASON, REASONS, VERDICTS, Result
from pipeline.plc.settings import Registers

STATUS_BITS: Final = ("heartbeat", "ready", "toggle", "pass", "reject", "fault", "gate_open", "gate_shut")
"""Of the status register, from bit 0 on."""
NOTHING: Final = Result("", 0, 0, "", "")


def encode(output: Output, layout: Registers) -> list[int]:
    """The registers of one camera's block."""
    shown = output.shown or NOTHING
    values = {
        "status": [_status(output)],
        "verdict": [VERDICTS[shown.verdict]],
        "reason": [REASONS.get(shown.reason, OTHER_REASON) if shown.reason else 0],
        "seq": _two(struct.pack(">I", shown.seq & 0xFFFFFFFF), layout),
        "session": _two(struct.pack(">I", shown.session // 1_000_000_000 & 0xFFFFFFFF), layout),
        "score": _two(struct.pack(">f", shown.score), layout),
        "threshold": _two(struct.pack(">f", shown.threshold), layout),
        "latency": [min(shown.latency_us // 1000, 0xFFFF)],
        "waiting": [min(output.waiting, 0xFFFF)],
        "lost": [output.lost & 0xFFFF],
        "part": _text(shown.part, layout.part_chars),
    }
    block = [0] * layout.size
    for name, size in layout.sizes.items():
        block[layout.at(name) : layout.at(name) + size] = values[name]
    return block


def decode(controls: Sequence[int], layout: Registers) -> Input:
    """What a PLC has written for one camera."""
    ack = layout.ack >= 0 and bool(controls[layout.ack] & 1)
    if layout.encoder < 0:
        return Input(ack)
    words = controls[layout.encoder : layout.encoder + 2]
    high, low = words if layout.word_order == "big" else reversed(words)
    return Input(ack, high << 16 | low)


def _status(output: Output) -> int:
    passes = output.shown is not None and output.shown.passes
    bits = (
        output.heartbeat, output.ready, output.toggle, passes, not passes, output.fault, output.gate, not output.gate,
    )  # fmt: skip
    return sum(1 << position for position, bit in enumerate(bits) if bit)


def _two(raw: bytes, layout: Registers) -> list[int]:
    words = list(struct.unpack(">HH", raw))
    return words if layout.word_order == "big" else words[::-1]


def _text(text: str, chars: int) -> list[int]:
    raw = text.encode("ascii", "replace")[:chars].ljust(chars, b"\0")
    return list(struct.unpack(f">{chars // 2}H", raw))
