"""Histories of soaks that never were: what senders, line and readers would have written down."""

from __future__ import annotations

import hashlib
from typing import Any

from pipeline.soak.frames import part_of
from pipeline.soak.history import End, Ended, Entry, Event, Failed, History, Latest, Sent, Told
from pipeline.soak.view import VERDICTS

MS = 1_000_000
DEADLINE_MS = 500.0
START = 1_700_000_000_000 * MS


class Story:
    """Tells a history in which every promise is kept, part by part.

    Each fate is a method; each gives the sequence number that it used up.
    """

    FATES = ("good", "bad", "broken", "lost", "unsent", "skipped", "late", "doubled", "swapped")

    def __init__(self, *cameras: str) -> None:
        self.cameras = cameras or ("cam1", "cam2")
        self.history = History(dict.fromkeys(self.cameras, DEADLINE_MS))
        self._t, self._read, self._ids = 0, 1, 0
        self._session = {camera: START + number * MS for number, camera in enumerate(self.cameras)}
        self._seq = dict.fromkeys(self.cameras, 0)
        self._waiting: dict[str, list[int]] = {camera: [] for camera in self.cameras}

    # Fates.

    def good(self, camera: str) -> int:
        """Sent, and OK."""
        return self._judged(camera, "OK", "below_threshold")

    def bad(self, camera: str) -> int:
        """Sent, and NG."""
        return self._judged(camera, "NG", "above_threshold")

    def broken(self, camera: str) -> int:
        """Sent so that nobody may judge it."""
        seq = self._send(camera, "UNKNOWN")
        self._answer(camera, seq, "UNKNOWN", "bad_size")
        return seq

    def lost(self, camera: str) -> int:
        """Sent, and never arrived; seen when the next one comes, or the end."""
        return self._miss(camera, self._send(camera, "OK"))

    def unsent(self, camera: str) -> int:
        """Not sent, as the sender knows."""
        seq = self._send(camera, "OK")
        self.history.failed.append(Failed(camera, self._session[camera], seq, self._now()))
        return self._miss(camera, seq)

    def skipped(self, camera: str) -> int:
        """A number without a frame."""
        self._seq[camera] += 1
        return self._miss(camera, self._seq[camera] - 1)

    def late(self, camera: str) -> int:
        """Sent, not judged in time, and judged later."""
        seq = self._send(camera, "OK")
        self._answer(camera, seq, "UNKNOWN", "deadline", latency_us=int(DEADLINE_MS * 1000))
        self._enter("late", self._fields(camera, seq, "OK", "below_threshold", late="1"))
        return seq

    def doubled(self, camera: str) -> int:
        """Sent twice, answered once."""
        seq = self._send(camera, "OK")
        self.history.sent.append(self.history.sent[-1])
        self._answer(camera, seq, "OK", "below_threshold")
        return seq

    def swapped(self, camera: str) -> int:
        """Sent behind its successor, when it had been given up; both numbers are answered."""
        seq = self._send(camera, "OK")
        self._send(camera, "OK")
        self._answer(camera, seq, "UNKNOWN", "missing_frame")
        self._answer(camera, seq + 1, "OK", "below_threshold")
        return seq

    def jump(self, camera: str, numbers: int) -> int:
        """So many numbers without frames that one record stands for all."""
        self._seq[camera] += numbers
        seq = self._seq[camera] - 1
        self._answer(camera, seq, "UNKNOWN", "sequence_jump", part="")
        return seq

    # What else happens.

    def turn(self) -> None:
        """Let the reader's next reply begin."""
        self._read += 1

    def end(self, camera: str) -> None:
        """End a session, and let the line confirm it."""
        self._catch_up(camera)
        session, parts = self._session[camera], self._seq[camera]
        self.history.ends.append(End(camera, session, parts, self._now()))
        self.history.ended.append(Ended(camera, session, parts, self._now()))

    def begin(self, camera: str) -> None:
        """Begin the next session."""
        self._waiting[camera].clear()  # what was lost at the end of a session without an end is never noticed
        self._session[camera] += 60_000 * MS
        self._seq[camera] = 0

    def die(self) -> None:
        """Let the line be killed."""
        self.history.events.append(Event("exited", self._now(), "-9"))

    def close(self) -> History:
        """End every camera's session, and everything."""
        for camera in self.cameras:
            self.end(camera)
            records = [e for e in self.history.final if e.stream == VERDICTS + camera]
            self.history.latest += [Latest(camera, records[-1].fields)] if records else []
        return self.history

    # The parts of it.

    def _judged(self, camera: str, verdict: str, reason: str) -> int:
        seq = self._send(camera, verdict)
        self._answer(camera, seq, verdict, reason)
        return seq

    def _now(self) -> int:
        self._t += MS
        return self._t

    def _send(self, camera: str, expect: str) -> int:
        seq, session = self._seq[camera], self._session[camera]
        self._seq[camera] += 1
        digest = hashlib.sha256(f"{camera} {session} {seq}".encode()).hexdigest()
        score = (0.6 if expect == "NG" else 0.2) + int(digest[:8], 16) / 2**32 / 10
        self.history.sent.append(Sent(camera, session, seq, self._now(), part_of(digest), digest, score, expect))
        return seq

    def _miss(self, camera: str, seq: int) -> int:
        self._waiting[camera].append(seq)
        return seq

    def _catch_up(self, camera: str) -> None:
        """Answer what never came: the line has just noticed."""
        waiting, self._waiting[camera] = self._waiting[camera], []
        for seq in waiting:
            self._answer(camera, seq, "UNKNOWN", "missing_frame", part="")

    def _answer(self, camera: str, seq: int, verdict: str, reason: str, **changes: Any) -> None:
        self._catch_up(camera)
        fields = self._fields(camera, seq, verdict, reason, **changes)
        if verdict != "OK":
            self._enter("rejects", fields)
            self.history.told.append(Told(fields, self._now()))
        self._enter(VERDICTS + camera, fields, f"{self._session[camera] // MS}-{seq}")

    def _fields(self, camera: str, seq: int, verdict: str, reason: str, **changes: Any) -> dict[str, str]:
        session, arrival = self._session[camera], START + self._now()
        sent = next(
            (s for s in reversed(self.history.sent) if (s.camera, s.session, s.seq) == (camera, session, seq)), None
        )
        latency = changes.pop("latency_us", 2000)
        fields: dict[str, Any] = {
            "camera": camera, "session": session, "seq": seq, "part": sent.part if sent else "", "verdict": verdict,
            "reason": reason, "score": f"{sent.score:.6g}" if sent and verdict != "UNKNOWN" else "",
            "t_arrival_ns": arrival, "t_verdict_ns": arrival + latency * 1000, "latency_us": latency,
            "deadline_ns": arrival + int(DEADLINE_MS * MS), "late": "0", **changes,
        }  # fmt: skip
        return {name: str(value) for name, value in fields.items()}

    def _enter(self, stream: str, fields: dict[str, str], entry_id: str = "") -> None:
        self._ids += 1
        entry = Entry(stream, entry_id or f"{self._ids}-0", fields, self._now(), self._read)
        self.history.final.append(entry)
        self.history.live.append(entry)
