"""Commands to a running line, over Redis: one stream in, one stream of answers out.

Who may write the command stream is Redis's to decide, by an ACL: see ``docs/contracts.md``. A command is answered
once, under its own stream id. What was sent before the line started is answered, but never carried out.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any, Final

import msgspec
import redis

from pipeline.entries import StreamIds
from pipeline.records import Fields, Keys

ACTIONS: Final = ("activate", "rollback")
KEPT: Final = 1000
"""Answers that are kept in Redis, and request ids that are remembered."""
MAX_TEXT: Final = 128


class Command(msgspec.Struct, frozen=True):
    """One command.

    Attributes:
        id: Its stream id, given by Redis.
        request: The sender's own id, by which a command that is sent twice is known; may be empty.
        action: ``activate`` or ``rollback``.
        engine: ``name``, or ``name@version`` to activate.
        fault: Why it is no command, in words; empty for one that is well-formed.
    """

    id: str
    request: str
    action: str
    engine: str
    fault: str = ""


class Commands:
    """The command channel. Used by one thread, with a Redis client that fails fast.

    Args:
        client: The Redis client.
        keys: Names of this line's keys.
    """

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self.commands, self.results = f"{keys.prefix}:commands", f"{keys.prefix}:results"
        self._position = ""
        self._unsent: list[tuple[str, Fields]] = []
        self._answered: OrderedDict[str, Fields] = OrderedDict()

    def open(self) -> None:
        """Go on after the newest command; refuse what no run of the line has answered.

        Raises:
            redis.RedisError: if Redis does not answer; :meth:`next` does it then.
        """
        recent: Any = self._client.xrevrange(self.results, count=KEPT)
        for _, raw in reversed(recent):
            fields = {key.decode(): value.decode() for key, value in raw.items()}
            if fields.get("request"):
                self._answered[fields["request"]] = fields
        answered = StreamIds.parse(recent[0][0].decode()) if recent else (0, 0)
        waiting: Any = self._client.xrevrange(self.commands, count=KEPT)
        for raw_id, raw in reversed(waiting):
            command = _parse(raw_id, raw)
            if StreamIds.parse(command.id) > answered:
                self.answer(command, "refused", "older than this run of the line: not carried out now; send it again")
        self._position = waiting[0][0].decode() if waiting else "0-0"
        self._flush()

    def next(self) -> Command | None:
        """The next command to carry out, None if there is none; what is to be refused unread is answered here.

        Raises:
            redis.RedisError: if Redis does not answer; nothing is lost by it.
        """
        if not self._position:
            self.open()
        self._flush()
        while True:
            found: Any = self._client.xread({self.commands: self._position}, count=1)
            if not found:
                return None
            command = _parse(*found[0][1][0])
            self._position = command.id
            earlier = self._answered.get(command.request)
            if earlier is not None:
                self._queue(command, {**earlier, "detail": f"repeated; answered before: {earlier['detail']}"})
            elif command.fault:
                self.answer(command, "refused", command.fault)
            else:
                return command
            self._flush()

    def answer(self, command: Command, result: str, detail: str, running: str = "") -> None:
        """Answer a command; where Redis is away, at the next :meth:`next`.

        Args:
            command: The command.
            result: ``done`` or ``refused``.
            detail: What was done, or why not.
            running: ``name@version`` of the engine that works now.
        """
        fields = {
            "v": "1",
            "request": command.request,
            "action": command.action,
            "engine": command.engine,
            "result": result,
            "detail": detail,
            "running": running,
            "t_ns": str(time.time_ns()),
        }
        self._queue(command, fields)

    def flush(self) -> None:
        """Send what is answered; leave it for later where Redis is away."""
        try:
            self._flush()
        except redis.RedisError:
            return

    def _queue(self, command: Command, fields: Fields) -> None:
        self._unsent.append((command.id, fields))
        if command.request:
            self._answered[command.request] = fields
            while len(self._answered) > KEPT:
                self._answered.popitem(last=False)

    def _flush(self) -> None:
        while self._unsent:
            command_id, fields = self._unsent[0]
            try:
                entry: Any = dict(fields)
                self._client.xadd(self.results, entry, id=command_id, maxlen=KEPT, approximate=True)
            except redis.ResponseError as error:
                if "equal or smaller" not in str(error):  # else it is in: only Redis's answer was lost
                    raise
            self._unsent.pop(0)


def _parse(raw_id: bytes, raw: dict[bytes, bytes]) -> Command:
    text = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in raw.items()}
    fields = {key: value[: MAX_TEXT + 1] for key, value in text.items()}
    action, engine = fields.get("action", ""), fields.get("engine", "")
    fault = ""
    if action not in ACTIONS:
        fault = f"action {action[:MAX_TEXT]!r}: {' or '.join(ACTIONS)}"
    elif not engine or len(engine) > MAX_TEXT:
        fault = "engine: name, or name@version; at most 128 characters"
    request = fields.get("request", "")[:MAX_TEXT]
    return Command(raw_id.decode(), request, action[:MAX_TEXT], engine[:MAX_TEXT], fault)
