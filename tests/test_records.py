"""The Redis records: names of keys and the fields of a verdict, as docs and subscribers rely on them."""

from __future__ import annotations

import pytest

from pipeline.parts import UNKNOWN, Part, Reason, Verdict
from pipeline.records import Keys, fields_of, is_reject, stream_id
from pipeline.wire import Header
from tests.support.books import MS, NG, OK

FIELDS = [
    *("v", "camera", "session", "seq", "part", "recipe", "verdict", "reason", "score", "threshold", "engine"),
    *("t_exposure_ns", "t_arrival_ns", "t_verdict_ns", "deadline_ns", "latency_us", "late", "simulated"),
    *("area_px", "bbox", "peak", "heatmap", "frame", "truth"),
]


def answered() -> Part:
    """A part with a value in every place."""
    header = Header(
        seq=7, session=1_700_000_000_123_456_789, t_ns=11, part="A1", recipe="m8", truth="crack", simulated=True
    )
    part = Part("cam1", header, 1_700_000_000_123, 7, arrival=500, arrival_ns=9000, deadline=500 + 80 * MS)
    part.finding, part.verdict_ns, part.latency_us = NG, 9000 + 3 * MS, 3000
    return part


def test_every_field_of_a_verdict_is_there_and_is_text() -> None:
    """Names, order and values are those of dmdd.verdict.v1, readable from any language."""
    fields = fields_of(answered(), NG, heatmap="key of the heatmap", frame="key of the frame")
    assert list(fields) == FIELDS
    assert all(type(name) is str and isinstance(value, str) for name, value in fields.items())
    assert list(fields.values()) == [
        *("1", "cam1", "1700000000123456789", "7", "A1", "m8", "NG", "above_threshold", "0.75", "0.5", "bright@1"),
        *("11", "9000", str(9000 + 3 * MS), str(9000 + 80 * MS), "3000", "0", "1"),
        *("12", "1,2,3,4", "200", "key of the heatmap", "key of the frame", "crack"),
    ]


def test_a_part_that_no_engine_judged_has_no_score() -> None:
    """What is not known is empty, and not a number that could be compared."""
    fields = fields_of(answered(), UNKNOWN[Reason.DEADLINE])
    assert [fields[name] for name in ("score", "threshold", "engine", "bbox", "heatmap", "frame")] == [""] * 6
    assert (fields["verdict"], fields["reason"], fields["area_px"], fields["peak"]) == ("UNKNOWN", "deadline", "0", "0")


def test_a_late_result_is_marked() -> None:
    """It has the fields of its own finding, not of the part's first one."""
    fields = fields_of(answered(), OK, late=True)
    assert (fields["late"], fields["verdict"], fields["score"]) == ("1", "OK", "0.25")


def test_the_keys_of_a_line() -> None:
    """Every key has the line's name in literal braces, so that a cluster keeps a line on one shard."""
    keys, part = Keys("l1"), answered()
    assert keys.verdicts("cam1") == "dmdd:{l1}:verdicts:cam1"
    assert keys.latest("cam1") == "dmdd:{l1}:latest:cam1"
    assert keys.eos("cam1") == "dmdd:{l1}:eos:cam1"
    assert keys.rejects == "dmdd:{l1}:rejects"
    assert keys.late == "dmdd:{l1}:late"
    assert keys.heartbeat == "dmdd:{l1}:heartbeat"
    assert keys.heatmap(part) == "dmdd:{l1}:heatmap:cam1:1700000000123456789:7"
    assert keys.frame(part) == "dmdd:{l1}:frame:cam1:1700000000123456789:7"


def test_the_stream_id_is_fixed_by_the_part() -> None:
    """The same part has the same id however often it is sent."""
    assert stream_id(answered()) == "1700000000123-7"


@pytest.mark.parametrize("verdict", [*Verdict, "", "ok", "OK ", "MAYBE"])
def test_everything_but_ok_is_a_reject(verdict: str) -> None:
    """A verdict that a subscriber does not know is a reject too."""
    assert is_reject(verdict) == (verdict != "OK")


def test_every_reason_has_a_finding_for_parts_that_cannot_be_judged() -> None:
    """Each is UNKNOWN and carries its own reason."""
    assert set(UNKNOWN) == set(Reason)
    assert all(f.verdict is Verdict.UNKNOWN and f.reason is reason for reason, f in UNKNOWN.items())
