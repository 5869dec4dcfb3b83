"""The frame message: what a peer may send, and that anything else is refused in one way only."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import wire
from pipeline.parts import Reason
from pipeline.wire import ENCODED, MAX_HEADER_BYTES, MAX_SIDE, RAW_CHANNELS, Header, WireError

U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=128)
LEAST = {"seq": 1, "session": 2}
SESSION = 77

headers = st.builds(
    Header,
    seq=U64,
    session=U64,
    w=st.integers(0, MAX_SIDE),
    h=st.integers(0, MAX_SIDE),
    fmt=st.sampled_from([*RAW_CHANNELS, *ENCODED]),
    stride=st.integers(0, 1 << 20),
    t_ns=U64,
    part=TEXT,
    recipe=TEXT,
    complete=st.booleans(),
    deadline_ms=st.floats(0, 60_000),
    eos=st.booleans(),
    truth=TEXT,
    simulated=st.booleans(),
)


def packed(**fields: Any) -> bytes:
    """A header as a peer in any language may write it."""
    return msgspec.msgpack.encode(fields)


def raw_frame(fmt: str = "mono8", w: int = 4, h: int = 3, **fields: Any) -> Header:
    """The header of a frame without a fault."""
    return Header(seq=1, session=2, w=w, h=h, fmt=fmt, **fields)


@given(headers)
def test_a_header_arrives_as_it_was_sent(header: Header) -> None:
    """What encode writes, decode_camera and decode_header read back; the pixels are not copied."""
    pixels = memoryview(b"pixels")
    camera, raw, body = wire.encode("cam-1", header, pixels)
    assert (wire.decode_camera(bytes(camera)), wire.decode_header(bytes(raw))) == ("cam-1", header)
    assert body is pixels


def test_a_header_in_plain_messagepack_is_understood() -> None:
    """A map with nothing but seq and session is a header; keys that the line does not know are ignored."""
    assert wire.decode_header(packed(**LEAST, vendor={"gain": 3})) == Header(seq=1, session=2)


@pytest.mark.parametrize(
    "fields",
    [
        {"seq": 1},
        {"session": 2},
        {"seq": -1, "session": 2},
        {"seq": 1, "session": -2},
        {"seq": "1", "session": 2},
        {"seq": 1.5, "session": 2},
        {"seq": None, "session": 2},
        {**LEAST, "w": -1},
        {**LEAST, "w": MAX_SIDE + 1},
        {**LEAST, "h": MAX_SIDE + 1},
        {**LEAST, "stride": (1 << 20) + 1},
        {**LEAST, "t_ns": -1},
        {**LEAST, "deadline_ms": -0.5},
        {**LEAST, "deadline_ms": float("nan")},
        {**LEAST, "part": "x" * 129},
        {**LEAST, "part": 7},
        {**LEAST, "fmt": ["mono8"]},
        {**LEAST, "complete": "yes"},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    """A missing, mistyped or out of range value is a WireError that counts as bad_header."""
    with pytest.raises(WireError) as caught:
        wire.decode_header(packed(**fields))
    assert caught.value.counter == "bad_header"


@pytest.mark.parametrize("key", ["seq", "session", "t_ns"])
def test_a_number_of_64_bits_is_the_largest(key: str) -> None:
    """Unsigned 64-bit numbers are taken up to the last one, and MessagePack's own limit refuses the next."""
    assert getattr(wire.decode_header(packed(**{**LEAST, key: 2**64 - 1})), key) == 2**64 - 1
    beyond = packed(**{**LEAST, key: 2**64 - 1}).replace(b"\xcf" + b"\xff" * 8, b"\xc7\x09\x01" + b"\xff" * 9)
    with pytest.raises(WireError):
        wire.decode_header(beyond)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc0",
        b"\x93\x01\x02\x03",
        b"not messagepack",
        b"\xff" * 40,
        packed(**LEAST)[:-1],
        packed(**LEAST) + b"\x00",
        b"\x83" + packed(**LEAST)[1:] + b"\xa4part\xa2\xff\xfe",
        b"\x83" + packed(**LEAST)[1:] + b"\xa4part\xa3\xed\xa0\x80",
        b"\x83" + packed(**LEAST)[1:] + b"\xa1z" + b"\x91" * 4000,
        b"\x81\xc0\xc0",
    ],
)
def test_bytes_that_are_no_header_are_refused(raw: bytes) -> None:
    """Empty, truncated, nested without end, of another type or not UTF-8: each is a WireError."""
    with pytest.raises(WireError):
        wire.decode_header(raw)


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_a_wire_error(raw: bytes) -> None:
    """Whatever comes in any part of a message, only WireError leaves the decoders."""
    for decode in (wire.decode_camera, wire.decode_header, lambda r: wire.decode_imagezmq(r, 1, lambda _: 0)):
        try:
            decode(raw)
        except WireError as error:
            assert error.counter in {"bad_camera_id", "bad_header"}  # noqa: PT017 - not raising is right too


@given(headers, st.data())
def test_a_damaged_header_is_refused_or_still_in_range(header: Header, data: st.DataObject) -> None:
    """One wrong byte leads to a WireError, or to a header whose values are still within their limits."""
    raw = bytearray(bytes(wire.encode("cam1", header, b"")[1]))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        got = wire.decode_header(bytes(raw))
    except WireError:
        return
    assert all(0 <= value < 2**64 for value in (got.seq, got.session, got.t_ns))
    assert max(got.w, got.h) <= MAX_SIDE
    assert got.deadline_ms >= 0


def test_an_oversize_header_is_refused_unread() -> None:
    """A header of more than 4096 bytes is refused; one of exactly so many is read."""
    room = MAX_HEADER_BYTES - len(packed(**LEAST, junk=b"")) - 1  # a longer byte string has one byte more of head
    fitting = packed(**LEAST, junk=bytes(room))
    assert len(fitting) == MAX_HEADER_BYTES
    assert wire.decode_header(fitting) == Header(seq=1, session=2)
    with pytest.raises(WireError, match=f"{MAX_HEADER_BYTES + 1} bytes, at most {MAX_HEADER_BYTES}"):
        wire.decode_header(packed(**LEAST, junk=bytes(room + 1)))


@pytest.mark.parametrize("name", ["a", "Cam-1", "0.top_left", "x" * 64])
def test_a_camera_id_of_safe_characters_is_taken(name: str) -> None:
    """Letters, digits, underscore, dot and minus make a camera id."""
    assert wire.decode_camera(name.encode()) == name


@pytest.mark.parametrize("raw", [b"", b"-cam", b".", b"a b", b"a\n", b"a:b", b"a*", "kamera\u00e4".encode(), b"x" * 65])
def test_any_other_camera_id_is_refused(raw: bytes) -> None:
    """What could break out of a Redis key, a file name or a log line is no camera id."""
    with pytest.raises(WireError) as caught:
        wire.decode_camera(raw)
    assert caught.value.counter == "bad_camera_id"


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        (raw_frame(v=2), 12, "bad_version"),
        (raw_frame(complete=False), 12, "incomplete"),
        (raw_frame(w=100, h=100), 10_000, "too_large"),
        (raw_frame("jpeg"), 5_000, "too_large"),
        (raw_frame("rgb48"), 12, "bad_format"),
        (raw_frame(""), 12, "bad_format"),
        (raw_frame("jpeg"), 0, "bad_size"),
        (raw_frame("png"), 0, "bad_size"),
        (raw_frame(), 11, "bad_size"),
        (raw_frame(), 13, "bad_size"),
        (raw_frame(), 0, "bad_size"),
        (raw_frame("bgr8"), 12, "bad_size"),
        (raw_frame(w=0), 0, "bad_size"),
        (raw_frame(h=0), 0, "bad_size"),
        (raw_frame(w=0, stride=4), 12, "bad_size"),
        (raw_frame(stride=3), 9, "bad_size"),
        (raw_frame(stride=8), 12, "bad_size"),
        (raw_frame("bgr8", stride=11), 33, "bad_size"),
    ],
)
def test_a_frame_with_a_fault_has_its_reason(header: Header, size: int, reason: str) -> None:
    """Each fault of a frame has one reason, and that is one of the closed set."""
    assert wire.pixel_fault(header, size, 4096) == reason
    assert Reason(reason)


@pytest.mark.parametrize("fmt", [*RAW_CHANNELS])
def test_a_raw_frame_of_exactly_its_size_has_no_fault(fmt: str) -> None:
    """Rows times width times channels, or rows times stride where rows are padded."""
    row = 4 * RAW_CHANNELS[fmt]
    assert wire.pixel_fault(raw_frame(fmt), row * 3, 4096) is None
    assert wire.pixel_fault(raw_frame(fmt, stride=row), row * 3, 4096) is None
    assert wire.pixel_fault(raw_frame(fmt, stride=row + 4), (row + 4) * 3, 4096) is None


@pytest.mark.parametrize("fmt", sorted(ENCODED))
def test_an_encoded_frame_may_have_any_size_up_to_the_limit(fmt: str) -> None:
    """Only the limit bounds a JPEG or PNG; whether it can be decoded is found out later."""
    assert wire.pixel_fault(raw_frame(fmt, w=0, h=0), 4096, 4096) is None


@given(headers, st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_every_fault_is_a_known_reason(header: Header, size: int, limit: int) -> None:
    """No header and size lead to anything but None or a documented reason."""
    fault = wire.pixel_fault(header, size, limit)
    assert fault is None or Reason(fault)


def imagezmq(**meta: Any) -> tuple[str, Header]:
    """Decode the JSON part of a message of an imagezmq sender."""
    return wire.decode_imagezmq(json.dumps(meta).encode(), SESSION, len)


def test_an_imagezmq_image_is_a_raw_frame() -> None:
    """Shape and dtype of send_image become size and format; the line numbers the frame."""
    camera, header = imagezmq(msg="cam12", dtype="uint8", shape=[480, 640, 3])
    assert (camera, header) == ("cam12", Header(seq=5, session=SESSION, w=640, h=480, fmt="bgr8"))


@pytest.mark.parametrize(
    ("shape", "fmt"),
    [([48, 64], "mono8"), ([48, 64, 1], "mono8"), ([48, 64, 3], "bgr8"), ([48, 64, 4], "unknown")],
)
def test_an_imagezmq_shape_gives_the_format(shape: list[int], fmt: str) -> None:
    """Gray with or without a channel axis, or BGR; four channels are named, not guessed at."""
    _, header = imagezmq(msg="c", dtype="uint8", shape=shape)
    assert (header.fmt, header.w, header.h) == (fmt, 64, 48)


def test_an_imagezmq_jpeg_has_no_shape() -> None:
    """What send_jpg sends is a JPEG of unknown size."""
    assert imagezmq(msg="c")[1] == Header(seq=1, session=SESSION, fmt="jpeg")


def test_an_imagezmq_text_names_camera_and_part() -> None:
    """The camera id stands before the first bar, the part id after it, at most 128 characters of it."""
    assert imagezmq(msg=" cam1 | tray 7|left ")[0] == "cam1"
    assert imagezmq(msg=" cam1 | tray 7|left ")[1].part == "tray 7|left"
    assert imagezmq(msg="cam1|" + "x" * 200)[1].part == "x" * 128


@pytest.mark.parametrize(
    "meta",
    [
        {"dtype": "float32", "shape": [4, 4]},
        {"dtype": "uint8", "shape": [4]},
        {"dtype": "uint8", "shape": [4, 4, 3, 1]},
        {"dtype": "uint8", "shape": [4, 0]},
        {"dtype": "uint8", "shape": [4, -4]},
        {"dtype": "uint8", "shape": [4, MAX_SIDE + 1]},
        {"dtype": "uint8", "shape": [True, 4]},
        {"dtype": "uint8", "shape": [4.0, 4]},
        {"dtype": "uint8", "shape": "4x4"},
        {"shape": [4, 4]},
    ],
    ids=str,
)
def test_an_imagezmq_frame_of_another_kind_is_named_and_not_guessed(meta: dict[str, Any]) -> None:
    """The part is known, so it is admitted, and its format is one that is answered bad_format."""
    camera, header = imagezmq(msg="cam1", **meta)
    assert camera == "cam1"
    assert wire.pixel_fault(header, 16, 4096) == "bad_format"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"cam1"',
        b"{}",
        b'{"msg": 1}',
        b'{"msg": "no good id"}',
        b'{"msg": ""}',
        b'{"msg": "|part"}',
        b'{"msg": "\\ud800"}',
        b'{"msg": "cam1"',
        b"\xff\xfe",
        b"[" * 4096,
        b'{"msg": "cam1", "x": "' + b"x" * 4096 + b'"}',
    ],
)
def test_an_imagezmq_text_without_a_camera_is_refused(raw: bytes) -> None:
    """No JSON object, no text, no camera id in it, or too long: each is a WireError and uses up no number."""
    asked: list[str] = []

    def number(name: str) -> int:
        asked.append(name)
        return 0

    with pytest.raises(WireError):
        wire.decode_imagezmq(raw, SESSION, number)
    assert not asked


def test_an_imagezmq_part_is_always_text_that_can_be_stored() -> None:
    """A half of a surrogate pair, which JSON may carry and UTF-8 may not, does not get into a record."""
    _, header = wire.decode_imagezmq(b'{"msg": "cam1|a\\ud800b"}', SESSION, lambda _: 0)
    assert header.part.encode()
    assert header.part.startswith("a")
    assert header.part.endswith("b")


@given(
    st.dictionaries(
        st.sampled_from(["msg", "dtype", "shape"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=4),
            max_leaves=6,
        ),
    )
)
def test_any_json_in_an_imagezmq_message_is_a_frame_or_a_wire_error(meta: dict[str, Any]) -> None:
    """Whatever the JSON holds, the outcome is a header that can be published, or a WireError."""
    try:
        _, header = wire.decode_imagezmq(json.dumps(meta).encode(), SESSION, lambda _: 0)
    except WireError:
        return
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(header), type=Header) == header
