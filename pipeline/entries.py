"""Spoolable entries: what one record becomes in Redis, with ids fixed once and for all."""

from __future__ import annotations

import time
from typing import Any, Final

import cv2
import msgspec
import numpy as np
import redis
import structlog

from engines.frames import FrameError, Pixels
from pipeline.config import Camera
from pipeline.config import Redis as RedisSettings
from pipeline.decode import image_of
from pipeline.parts import Finding, Part, Verdict
from pipeline.records import Fields, Keys, fields_of, stream_id
from pipeline.wire import ENCODED

log = structlog.get_logger(__name__)

REJECT: Final = "reject"
RECORD: Final = "record"
LATE: Final = "late"
EOS: Final = "eos"
PICTURE: Final = "picture"
PIECE_BYTES: Final = 256 << 10
"""Larger pictures are sent in pieces, so that none takes longer than Redis may take to answer."""
JPEG_QUALITY: Final = 90


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One record on its way into one stream.

    Attributes:
        kind: ``reject``, ``record``, ``late``, ``eos`` or ``picture``.
        key: The stream (for ``eos``: the hash, for ``picture``: the string).
        id: Explicit stream id (for ``eos``: greater than any; for ``picture``: none).
        fields: The record's fields (for ``picture``: ``t_ns``, when it was made).
        blob: The bytes of a picture.
    """

    kind: str
    key: str
    id: str
    fields: Fields
    blob: bytes = b""


class StreamIds:
    """Ids for the streams that carry all cameras: milliseconds and a counter, growing whatever the clock does."""

    LAST: Final = f"{(1 << 64) - 1}-{(1 << 64) - 1}"

    def __init__(self) -> None:
        self._last = (0, 0)

    def raise_to(self, newest: tuple[int, int]) -> None:
        """Never give an id up to ``newest`` again."""
        self._last = max(self._last, newest)

    def next(self) -> str:
        """The next id."""
        now = time.time_ns() // 1_000_000
        self._last = (now, 0) if now > self._last[0] else (self._last[0], self._last[1] + 1)
        return f"{self._last[0]}-{self._last[1]}"

    @staticmethod
    def parse(text: str) -> tuple[int, int]:
        """``ms-seq`` as a pair that compares as Redis compares ids."""
        left, _, right = text.partition("-")
        return int(left), int(right)

    @staticmethod
    def newest(client: redis.Redis, key: str) -> tuple[int, int]:
        """The newest id in a stream, ``(0, 0)`` if there is none."""
        found: Any = client.xrevrange(key, count=1)
        if not found:
            return 0, 0
        newest = found[0][0]
        return StreamIds.parse(newest.decode() if isinstance(newest, bytes) else newest)


class Maker:
    """Makes entries from parts, and Redis commands from entries.

    Args:
        keys: Names of the line's keys.
        settings: ``[redis]``.
        cameras: ``[cameras]``, to decode the images of rejects.

    Attributes:
        published: Rejects of an earlier run, by camera, session and seq, whose records it could not write:
            theirs is the part's one verdict.
    """

    def __init__(self, keys: Keys, settings: RedisSettings, cameras: dict[str, Camera]) -> None:
        self._keys, self._settings, self._cameras = keys, settings, cameras
        self.reject_ids, self.late_ids = StreamIds(), StreamIds()
        self.published: dict[tuple[str, str, str], Fields] = {}
        self._json = msgspec.json.Encoder()

    def reject(self, part: Part) -> list[Entry]:
        """The entry of the fast path: no blob, so that nothing has to be encoded first.

        Nothing for a part whose reject an earlier run has published.
        """
        if _identity(part) in self.published:
            return []
        return [Entry(REJECT, self._keys.rejects, self.reject_ids.next(), self._fields(part))]

    def record(self, part: Part) -> list[Entry]:
        """The entry of the camera's own stream; or the end of its stream."""
        header = part.header
        if header.eos:
            fields = {"session": str(header.session), "parts": str(header.seq), "t_ns": str(time.time_ns())}
            return [Entry(EOS, self._keys.eos(part.camera), StreamIds.LAST, fields)]
        earlier = self.published.pop(_identity(part), None)
        return [Entry(RECORD, self._keys.verdicts(part.camera), stream_id(part), earlier or self._fields(part))]

    def keeps_pictures(self, part: Part) -> bool:
        """Whether heatmap or image of a part are to be stored."""
        return self._keeps_frame(part) or (part.finding is not None and self._keeps_heatmap(part.finding))

    def pictures(self, part: Part) -> list[Entry]:
        """The entries of a part's heatmap and image; encoding them takes time."""
        made = {"t_ns": str(time.time_ns())}
        return [Entry(PICTURE, key, "", made, blob) for key, blob in self._blobs(part).items()]

    def late(self, part: Part, finding: Finding) -> Entry:
        """The entry of a result that came after the part's verdict."""
        fields = fields_of(part, finding, late=True)
        fields["t_verdict_ns"] = str(time.time_ns())
        return Entry(LATE, self._keys.late, self.late_ids.next(), fields)

    def commands(self, pipe: Any, entry: Entry, *, tell: bool = True) -> None:
        """Append the commands of a reject, record, late result or end of stream to a pipeline.

        Args:
            pipe: The pipeline.
            entry: What to write.
            tell: Whether subscribers of the channel are told of a reject.
        """
        settings, fields = self._settings, dict(entry.fields)
        if entry.kind == EOS:
            pipe.hset(entry.key, mapping=fields)
            return
        longest = settings.verdicts_maxlen if entry.kind == RECORD else settings.rejects_maxlen
        pipe.xadd(entry.key, fields, id=entry.id, maxlen=longest, approximate=True)
        if entry.kind == RECORD:
            pipe.hset(self._keys.latest(fields["camera"]), mapping=fields)
        if entry.kind == REJECT and tell:
            pipe.publish(entry.key, self._json.encode(fields))

    def picture_commands(self, entry: Entry) -> list[tuple[Any, ...]]:
        """The commands that store a picture, one after the other; none if it would have lapsed by now."""
        age = max(time.time_ns() - int(entry.fields["t_ns"]), 0) // 1_000_000_000
        left, blob = self._settings.blob_ttl_s - age, entry.blob
        if left <= 0:
            return []
        if len(blob) <= PIECE_BYTES:
            return [("SET", entry.key, blob, "EX", left)]
        pieces = [
            ("SETRANGE", entry.key, start, blob[start : start + PIECE_BYTES])
            for start in range(0, len(blob), PIECE_BYTES)
        ]
        return [*pieces, ("EXPIRE", entry.key, left)]

    def _fields(self, part: Part) -> Fields:
        assert part.finding is not None  # noqa: S101 - only answered parts come here
        return fields_of(
            part,
            part.finding,
            heatmap=self._keys.heatmap(part) if self._keeps_heatmap(part.finding) else "",
            frame=self._keys.frame(part) if self._keeps_frame(part) else "",
        )

    def _keeps_heatmap(self, finding: Finding) -> bool:
        policy = self._settings.heatmaps
        if finding.heatmap is None or policy == "never":
            return False
        return policy == "all" or _rejected(finding) or (policy == "sampled" and finding.sampled)

    def _keeps_frame(self, part: Part) -> bool:
        policy, finding = self._settings.frames, part.finding
        if finding is None or policy == "never" or part.pixels is None or part.camera not in self._cameras:
            return False
        return finding.verdict is Verdict.NG or (policy == "sampled" and finding.sampled)

    def _blobs(self, part: Part) -> dict[str, bytes]:
        blobs = {}
        if part.finding is not None and part.finding.heatmap is not None and self._keeps_heatmap(part.finding):
            blobs[self._keys.heatmap(part)] = _encoded(".png", part.finding.heatmap, [])
        if self._keeps_frame(part) and (image := self._image(part)):
            blobs[self._keys.frame(part)] = image
        return blobs

    def _image(self, part: Part) -> bytes:
        """The part's image as a file: JPEG and PNG as they came, raw pixels as JPEG."""
        if part.header.fmt in ENCODED:
            return bytes(part.pixels)
        try:
            image = image_of(part.header, part.pixels, self._cameras[part.camera], 3)
            return _encoded(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        except (FrameError, cv2.error) as error:
            log.warning("frame_not_stored", camera=part.camera, seq=part.seq, error=str(error))
            return b""


def _identity(part: Part) -> tuple[str, str, str]:
    return part.camera, str(part.header.session), str(part.seq)


def _rejected(finding: Finding) -> bool:
    return finding.verdict is not Verdict.OK


def _encoded(suffix: str, image: Pixels, options: list[int]) -> bytes:
    done, encoded = cv2.imencode(suffix, image, options)
    return np.asarray(encoded).tobytes() if done else b""
