"""``python -m pipeline.soak.reader``: reads verdicts as they come, as a PLC gateway would, and writes them down."""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec
import redis

from pipeline.records import Fields, Keys
from pipeline.soak.history import FINAL, Ended, Entry, Latest, Recorder, Told, now
from pipeline.soak.view import VERDICTS

BLOCK_MS: Final = 100
AGAIN_S: Final = 0.05
PAGE: Final = 5000


class Streams:
    """The streams of a line, and how the history names them.

    Args:
        line: Name of the line.
        cameras: All that may send, those that are not in its config too.
    """

    def __init__(self, line: str, cameras: list[str]) -> None:
        self.keys, self.cameras = Keys(line), cameras
        self.names = {self.keys.verdicts(camera).encode(): VERDICTS + camera for camera in cameras}
        self.names |= {self.keys.rejects.encode(): "rejects", self.keys.late.encode(): "late"}


class StreamReader:
    """Reads all streams and confirmed ends; one reply shows all streams at one instant.

    Args:
        client: With a timeout above :data:`BLOCK_MS`.
        streams: What to read.
        recorder: Where it goes.
    """

    def __init__(self, client: redis.Redis, streams: Streams, recorder: Recorder) -> None:
        self._client, self._streams, self._recorder = client, streams, recorder
        self._from: dict[Any, Any] = dict.fromkeys(streams.names, "0-0")
        self._ended: dict[str, bytes] = {}
        self._reads = 0

    def step(self) -> None:
        """Wait for entries for a moment; write down what came.

        Raises:
            redis.RedisError: if Redis does not answer; the next step goes on where this one was.
        """
        # Without COUNT: a reply that was cut short in one stream would show the others as ahead of it.
        reply: Any = self._client.xread(self._from, block=BLOCK_MS) or []
        at, self._reads = now(), self._reads + 1
        for key, entries in reply:
            name = self._streams.names[key]
            self._recorder.add(*(Entry(name, id_.decode(), text(fields), at, self._reads) for id_, fields in entries))
            self._from[key] = entries[-1][0]

    def ends(self) -> None:
        """Look whether the line has confirmed the end of a session.

        Raises:
            redis.RedisError: as :meth:`step`.
        """
        for camera in self._streams.cameras:
            found: Any = self._client.hgetall(self._streams.keys.eos(camera))
            if found and found[b"t_ns"] + found[b"session"] != self._ended.get(camera):
                self._ended[camera] = found[b"t_ns"] + found[b"session"]
                self._recorder.add(Ended(camera, int(found[b"session"]), int(found[b"parts"]), now()))


class Listener:
    """Listens to the channel of rejects.

    Args:
        url: Address of Redis.
        channel: Name of the channel.
        recorder: Where it goes.
    """

    def __init__(self, url: str, channel: str, recorder: Recorder) -> None:
        self._url, self._channel, self._recorder = url, channel, recorder

    def listen(self, stopping: threading.Event) -> None:
        """Write down each message until told to stop or the connection ends."""
        with redis.Redis.from_url(self._url, socket_timeout=5) as client, client.pubsub() as channel:
            channel.subscribe(self._channel)
            while not stopping.is_set():
                message: Any = channel.get_message(timeout=BLOCK_MS / 1000)
                if message and message["type"] == "message":
                    self._recorder.add(Told(msgspec.json.decode(message["data"], type=dict[str, str]), now()))


def collect(client: redis.Redis, streams: Streams, folder: Path) -> None:
    """Write down what Redis holds now, as the end of the history; an earlier such file is replaced."""
    (folder / FINAL).unlink(missing_ok=True)
    with closing(Recorder(folder / FINAL)) as recorder:
        for key, name in streams.names.items():
            after = "-"
            while page := _page(client, key, after):
                recorder.add(*(Entry(name, id_.decode(), text(fields), now(), 0) for id_, fields in page))
                after = "(" + page[-1][0].decode()
        for camera in streams.cameras:
            fields: Any = client.hgetall(streams.keys.latest(camera))
            if fields:
                recorder.add(Latest(camera, text(fields)))


def _page(client: redis.Redis, key: bytes, after: str) -> Any:
    return client.xrange(key, after, "+", PAGE)


def text(fields: dict[bytes, bytes]) -> Fields:
    """Fields as text."""
    return {name.decode(): value.decode() for name, value in fields.items()}


def keep_on(step: Callable[[], None], stopping: threading.Event) -> None:
    """Do something until told to stop, again after a moment where Redis failed."""
    while not stopping.is_set():
        try:
            step()
        except (redis.RedisError, OSError):
            time.sleep(AGAIN_S)


def main() -> None:
    """Read until SIGTERM."""
    parser = argparse.ArgumentParser()
    for option in ("--url", "--line", "--cameras", "--out"):
        parser.add_argument(option, required=True)
    given = parser.parse_args()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    streams = Streams(given.line, given.cameras.split(","))
    folder = Path(given.out)
    with Recorder(folder / "told.jsonl") as told, Recorder(folder / "read.jsonl") as read:
        listener = Listener(given.url, streams.keys.rejects, told)
        thread = threading.Thread(target=keep_on, args=(lambda: listener.listen(stopping), stopping), daemon=True)
        thread.start()
        with redis.Redis.from_url(given.url, socket_timeout=5, socket_connect_timeout=2) as client:
            reader = StreamReader(client, streams, read)

            def turn() -> None:
                reader.step()
                reader.ends()

            keep_on(turn, stopping)
        thread.join(5)


if __name__ == "__main__":
    main()
