"""Sends a recording to a line again, and collects its new verdicts.

Messages are sent bit for bit as they were recorded; in the header the session alone is another one, as a line takes
each number of a session once. Part ids, numbers, gaps and broken frames stay what they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import redis
import zmq

from pipeline import wire
from pipeline.camera import IPC_HOLD_S
from pipeline.parts import Reason
from pipeline.recording import Message, Recording, RecordingError
from pipeline.records import Fields, Keys
from pipeline.recovery import RedisUnreachableError
from pipeline.wire import Header

READ_MS: Final = 50
RETRY_S: Final = 0.1
MOST: Final = 500
JOIN_S: Final = 1.0
SESSION: Final = b"\xa7session"
"""The header's key as MessagePack writes it."""
Name = tuple[str, int, int]
"""Camera, session as it was recorded, and number of a part."""


@dataclass(frozen=True)
class Replaying:
    """How to send.

    Attributes:
        address: ZeroMQ address of the line.
        pattern: ``push`` or ``pub``.
        bind: Whether to bind the address, for a line that connects to cameras.
        speed: Multiple of the original pace; 0 for as fast as the line answers.
        window: At speed 0, most frames that wait for their verdicts.
        patience_s: Seconds without a verdict, or a frame taken, after which the line counts as absent.
    """

    address: str
    pattern: str = "push"
    bind: bool = False
    speed: float = 1.0
    window: int = 16
    patience_s: float = 15.0


class Replayer:
    """Replays a recording once.

    Args:
        recording: What to send.
        settings: How.
        client: A patient Redis client; the caller closes it.
        keys: Names of the keys of the line that is sent to.

    Attributes:
        sent: Messages of the recording that were sent.
        spans: Of each recorded camera and session, the least and greatest number that was sent.
        verdicts: New records, by the name of the recorded part.
    """

    def __init__(self, recording: Recording, settings: Replaying, client: redis.Redis, keys: Keys) -> None:
        self._recording, self._settings, self._client, self._keys = recording, settings, client, keys
        self._sessions: dict[tuple[str, int], int] = {}
        self._recorded: dict[tuple[str, str], int] = {}
        self._at: dict[str, str] = {}
        self._waiting: set[Name] = set()
        self._ended: set[tuple[str, int]] = set()
        self._strangers: set[str] = set()
        self._redis_error = ""
        self._moved = time.monotonic()
        self.sent = 0
        self.spans: dict[tuple[str, int], tuple[int, int]] = {}
        self.verdicts: dict[Name, Fields] = {}

    def run(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Send everything, and wait until the line has ended every session.

        Args:
            progress: Told how many messages are sent, now and then.

        Raises:
            RecordingError: if the line takes no frames, or does not answer.
            zmq.ZMQError: if the address cannot be used.
        """
        self._begin()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.PUB if self._settings.pattern == "pub" else zmq.PUSH)
        try:
            socket.sndhwm = 1000 if self._settings.pattern == "pub" else 4
            (socket.bind if self._settings.bind else socket.connect)(self._settings.address)
            if self._settings.pattern == "pub":
                time.sleep(JOIN_S)  # what is published before the line has joined is lost
            self._send_all(socket, progress)
            self._end_sessions(socket)
            progress(self.sent)
            self._until(self._is_over, "confirms the end of the sessions")
        finally:
            if self._settings.address.startswith("ipc:"):
                time.sleep(IPC_HOLD_S)
            context.destroy(linger=0)

    def _begin(self) -> None:
        """Learn which cameras there are, and where their verdict streams stand."""
        cameras = {camera for message in self._recording.messages() if (camera := message.named()[0])}
        if not cameras:
            msg = "the recording has no frames"
            raise RecordingError(msg)
        try:
            for key in map(self._keys.verdicts, sorted(cameras)):
                found: Any = self._client.xrevrange(key, count=1)
                self._at[key] = found[0][0].decode() if found else "0-0"
        except redis.RedisError as error:
            msg = f"Redis does not answer: {error}; start it, or correct its address"
            raise RedisUnreachableError(msg) from error

    def _send_all(self, socket: zmq.Socket[bytes], progress: Callable[[int], None]) -> None:
        start, first = time.monotonic(), None
        for message in self._recording.messages():
            first = message.mono_ns if first is None else first
            if self._settings.speed:
                self._pace(start + (message.mono_ns - first) / 1e9 / self._settings.speed)
            else:
                self._until(lambda: len(self._waiting) < self._settings.window, "gives verdicts")
            self._send(socket, self._renewed(message))
            self.sent += 1
            if self.sent % 50 == 0:
                progress(self.sent)

    def _pace(self, due: float) -> None:
        """Read verdicts until a message is due."""
        while (left := due - time.monotonic()) > 0.002:
            self._read(min(READ_MS, max(1, int(left * 500))))
        self._moved = time.monotonic()
        time.sleep(max(0.0, due - time.monotonic()))

    def _send(self, socket: zmq.Socket[bytes], parts: list[bytes]) -> None:
        self._until(lambda: socket.poll(0, zmq.POLLOUT), f"takes frames at {self._settings.address}")
        socket.send_multipart(parts, copy=False)
        self._moved = time.monotonic()

    def _renewed(self, message: Message) -> list[bytes]:
        """The message with its session replaced; as it is where the line cannot read it."""
        camera, header = message.named()
        if header is None:
            return message.parts
        session = self._session_of(camera, header)
        if header.eos:
            self._ended.add((camera, header.session))
        else:
            self._note(camera, header)
        return [message.parts[0], with_session(message.parts[1], session), *message.parts[2:]]

    def _session_of(self, camera: str, header: Header) -> int:
        known = self._sessions.get((camera, header.session))
        if known is None:
            known = max(time.time_ns(), max(self._sessions.values(), default=0) + 1_000_000)
            self._sessions[camera, header.session] = known
            self._recorded[camera, str(known)] = header.session
        return known

    def _note(self, camera: str, header: Header) -> None:
        """Remember that a part is under way, unless its number comes again."""
        low, high = self.spans.get((camera, header.session), (header.seq, -1))
        self.spans[camera, header.session] = min(low, header.seq), max(high, header.seq)
        name = (camera, header.session, header.seq)
        if header.seq > high and name not in self.verdicts:
            self._waiting.add(name)

    def _end_sessions(self, socket: zmq.Socket[bytes]) -> None:
        """End the last session of each camera, where the recording did not: it was stopped before."""
        for camera, session in dict(self._sessions.keys()).items():
            if (camera, session) not in self._ended:
                seq = self.spans[camera, session][1] + 1
                header = Header(seq=seq, session=self._sessions[camera, session], eos=True)
                self._send(socket, [bytes(part) for part in wire.encode(camera, header, b"")])

    def _place(self, name: Name) -> tuple[int, int]:
        """Where a part stands among the new ones of its camera."""
        return self._sessions[name[:2]], name[2]

    def _is_over(self) -> bool:
        """Whether the line has confirmed the end of each camera's last session, and all its records are read."""
        last = {camera: str(session).encode() for (camera, _), session in self._sessions.items()}
        for camera in self._strangers:  # the line ends no session of a camera that it does not have
            last.pop(camera)
        ended = all(self._client.hget(self._keys.eos(camera), "session") == session for camera, session in last.items())
        return ended and not self._read(1)

    def _until(self, condition: Callable[[], Any], what: str) -> None:
        """Read verdicts until a condition holds."""
        while not self._holds(condition):
            self._read(READ_MS)
            if time.monotonic() - self._moved > self._settings.patience_s:
                raise RecordingError(self._absence(what))

    def _absence(self, what: str) -> str:
        cameras = ", ".join(sorted({camera for camera, _ in self._sessions}))
        error = f" Redis: {self._redis_error.rstrip('.')}." if self._redis_error else ""
        return (
            f"for {self._settings.patience_s:g} s no line {what}.{error} Does it run, with this address, this Redis,"
            f" and the cameras {cameras}? It must not list parts (expected) for them"
        )

    def _holds(self, condition: Callable[[], Any]) -> bool:
        try:
            return bool(condition())
        except redis.RedisError as error:
            self._redis_error = str(error)
            return False

    def _read(self, block_ms: int) -> bool:
        """Take new verdicts; say whether there were any. Redis may be away for a while."""
        try:
            found: Any = self._client.xread(self._at, count=MOST, block=block_ms)  # type: ignore[arg-type]
        except redis.RedisError as error:
            self._redis_error = str(error)
            time.sleep(RETRY_S)
            return False
        self._redis_error = ""
        for raw, entries in found or ():
            for identifier, fields in entries:
                self._at[raw.decode()] = identifier.decode()
                self._take({name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()})
        return bool(found)

    def _take(self, record: Fields) -> None:
        session = self._recorded.get((record.get("camera", ""), record.get("session", "")))
        if session is None:
            return
        name = (record["camera"], session, int(record["seq"]))
        self.verdicts[name] = record
        if record["reason"] == Reason.UNKNOWN_CAMERA:
            self._strangers.add(name[0])
        place = (int(record["session"]), name[2])  # records are in order: none comes for those before it
        self._waiting = {one for one in self._waiting if one[0] != name[0] or self._place(one) > place}
        self._moved = time.monotonic()


def with_session(header: bytes, session: int) -> bytes:
    """A header with another session, all else bit for bit.

    Args:
        header: MessagePack map that :func:`pipeline.wire.decode_header` takes.
        session: The new session.
    """
    wanted = {**msgspec.msgpack.decode(header), "session": session}
    value, at = msgspec.msgpack.encode(session), header.find(SESSION)
    while at >= 0:
        begin = at + len(SESSION)
        changed = header[:begin] + value + header[begin + _length(header, begin) :]
        if _is(changed, wanted):
            return changed
        at = header.find(SESSION, at + 1)
    return msgspec.msgpack.encode(wanted)  # a key that is written in another way


def _length(header: bytes, at: int) -> int:
    """Bytes of the unsigned MessagePack integer at a place; 1 where there is none."""
    return {0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}.get(
        int.from_bytes(header[at : at + 1]), 1
    )


def _is(header: bytes, wanted: dict[str, Any]) -> bool:
    try:
        return bool(msgspec.msgpack.decode(header) == wanted)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
