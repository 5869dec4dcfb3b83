"""The Redis records, ``dmdd.verdict.v1``: names of keys and the fields of a verdict.

See ``docs/contracts.md``. Fields are flat strings, readable from any language; names follow OPC 40100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.parts import Finding, Part, Verdict

Fields = dict[str, str]


@dataclass(frozen=True)
class Keys:
    """Key names of one line. The braces are literal: a Redis Cluster keeps a line's keys on one shard."""

    line: str

    @property
    def prefix(self) -> str:
        """What all keys of the line start with."""
        return f"dmdd:{{{self.line}}}"

    def verdicts(self, camera: str) -> str:
        """Stream of every verdict of a camera in its order."""
        return f"{self.prefix}:verdicts:{camera}"

    def latest(self, camera: str) -> str:
        """Hash of a camera's last verdict."""
        return f"{self.prefix}:latest:{camera}"

    def eos(self, camera: str) -> str:
        """Hash that confirms a finished session."""
        return f"{self.prefix}:eos:{camera}"

    @property
    def rejects(self) -> str:
        """Stream, and channel of the same name, of NG and UNKNOWN."""
        return f"{self.prefix}:rejects"

    @property
    def late(self) -> str:
        """Stream of results that came after their part's verdict."""
        return f"{self.prefix}:late"

    @property
    def heartbeat(self) -> str:
        """Hash that lapses when the line dies."""
        return f"{self.prefix}:heartbeat"

    def drift(self, camera: str) -> str:
        """Hash of what has changed at a camera since it was calibrated."""
        return f"{self.prefix}:drift:{camera}"

    @property
    def labels(self) -> str:
        """Hash of what people have said of parts, on the monitor page."""
        return f"{self.prefix}:labels"

    def labelled(self, part: str) -> str:
        """Image of a labelled part, kept for good; ``part`` is camera, session and seq, joined by colons."""
        return f"{self.prefix}:labelled:{part}"

    def heatmap(self, part: Part) -> str:
        """PNG of a part's heatmap."""
        return f"{self.prefix}:heatmap:{part.camera}:{part.header.session}:{part.seq}"

    def frame(self, part: Part) -> str:
        """Image of a part."""
        return f"{self.prefix}:frame:{part.camera}:{part.header.session}:{part.seq}"


def fields_of(part: Part, finding: Finding, *, late: bool = False, heatmap: str = "", frame: str = "") -> Fields:
    """The fields of a part's record.

    Args:
        part: An answered part.
        finding: Its finding, or the late one.
        late: Whether the finding came after the part's first verdict.
        heatmap: Key of its heatmap, if one is stored.
        frame: Key of its image, if it is stored.
    """
    header = part.header
    return {
        "v": "1",
        "camera": part.camera,
        "session": str(header.session),
        "seq": str(part.seq),
        "part": header.part,
        "recipe": header.recipe,
        "verdict": finding.verdict,
        "reason": finding.reason,
        "score": _number(finding.score),
        "threshold": _number(finding.threshold),
        "engine": finding.engine,
        "t_exposure_ns": str(header.t_ns),
        "t_arrival_ns": str(part.arrival_ns),
        "t_verdict_ns": str(part.verdict_ns),
        "deadline_ns": str(part.arrival_ns + part.deadline - part.arrival),
        "latency_us": str(part.latency_us),
        "late": "1" if late else "0",
        "simulated": "1" if header.simulated else "0",
        "area_px": str(finding.area),
        "bbox": ",".join(map(str, finding.bbox)) if finding.bbox else "",
        "peak": str(finding.peak),
        "heatmap": heatmap,
        "frame": frame,
        "truth": header.truth,
    }


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def stream_id(part: Part) -> str:
    """Explicit id of a part's record in its camera's stream: a replay cannot double it."""
    return f"{part.stream_ms}-{part.seq}"


def is_reject(verdict: str) -> bool:
    """Whether a subscriber must reject the part: everything but a plain OK."""
    return verdict != Verdict.OK
