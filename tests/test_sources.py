"""Where frames come from: folders, video files, the simulator."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.config import Camera
from pipeline.decode import image_of
from pipeline.simulator import Simulator
from pipeline.sources import FolderSource, Frame, SimulatorSource, SourceError, VideoSource, open_source
from pipeline.wire import Header, decode_header, encode, pixel_fault


def picture(path: Path, level: int = 100) -> Path:
    """An image file of 6x4 pixels of one level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((4, 6, 3), level, np.uint8))
    return path


def film(path: Path, frames: int = 5) -> Path:
    """A video of 64x48 pixels whose frames grow brighter."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.full((48, 64, 3), 20 + 40 * number, np.uint8))
    writer.release()
    return path


def sent(frame: Frame) -> np.ndarray:
    """The frame as the line decodes it, having passed every check on its way."""
    header = Header(seq=0, session=0, w=frame.w, h=frame.h, fmt=frame.fmt, part=frame.part, truth=frame.truth)
    parts = encode("cam1", header, frame.pixels)
    pixels = bytes(parts[2])
    got = decode_header(bytes(parts[1]))
    assert pixel_fault(got, len(pixels), 1 << 20) is None
    return image_of(got, pixels, Camera(), 3)


def opened(address: object, **options: Any) -> SimulatorSource | FolderSource | VideoSource:
    """Open a source as the command line does."""
    base: dict[str, Any] = {"name": "cam1", "size": (64, 48), "seed": 0, "defects": 0.0, "loop": False}
    return open_source(str(address), **{**base, **options})


def test_a_flat_folder_has_names_and_no_truth(tmp_path: Path) -> None:
    """Files in the order of their names, each named as its part."""
    for name in ("b.png", "a.jpg", "c.JPEG"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    frames = list(FolderSource(tmp_path).frames())
    assert [(f.part, f.truth, f.fmt) for f in frames] == [
        ("a.jpg", "", "jpeg"),
        ("b.png", "", "png"),
        ("c.JPEG", "", "jpeg"),
    ]
    assert not any(f.simulated for f in frames)


def test_a_folder_of_classes_tells_the_truth(tmp_path: Path) -> None:
    """As in MVTec AD: the folder of an image is its class, at any depth; masks are no frames."""
    for name in ("test/good/0.png", "test/crack/0.png", "ground_truth/crack/0_mask.png", "train/good/0.png"):
        picture(tmp_path / name)
    frames = list(FolderSource(tmp_path).frames())
    assert [(f.part, f.truth) for f in frames] == [
        ("test/crack/0.png", "crack"),
        ("test/good/0.png", "good"),
        ("train/good/0.png", "good"),
    ]
    assert [f.truth for f in FolderSource(tmp_path / "test").frames()] == ["crack", "good"]


def test_jpeg_and_png_files_are_sent_as_they_are(tmp_path: Path) -> None:
    """No camera process decodes and encodes what the line can read."""
    for name in ("a.jpg", "b.png"):
        path = picture(tmp_path / name, 77)
        (frame,) = [f for f in FolderSource(tmp_path).frames() if f.part == name]
        assert frame.pixels == path.read_bytes()
        assert sent(frame).shape == (4, 6, 3)


@pytest.mark.parametrize("suffix", [".bmp", ".tiff", ".webp", ".TIF"])
def test_other_files_are_sent_as_raw_pixels(tmp_path: Path, suffix: str) -> None:
    """What the line's format does not name is decoded at the camera."""
    picture(tmp_path / f"a{suffix}", 77)
    (frame,) = FolderSource(tmp_path).frames()
    assert (frame.w, frame.h, frame.fmt) == (6, 4, "bgr8")
    assert np.abs(sent(frame).astype(int) - 77).max() <= 2


def test_a_file_that_cannot_be_read_is_still_a_part(tmp_path: Path) -> None:
    """It is sent as it is, so that the line answers it, and the next one follows."""
    (tmp_path / "a.bmp").write_bytes(b"no image")
    picture(tmp_path / "b.png")
    broken, whole = FolderSource(tmp_path).frames()
    assert pixel_fault(Header(seq=0, session=0, fmt=broken.fmt), len(broken.pixels), 100) == "bad_size"
    assert whole.part == "b.png"


def test_a_folder_named_like_an_image_is_no_image(tmp_path: Path) -> None:
    """Some tools keep a folder for each image."""
    picture(tmp_path / "a.png" / "b.png")
    assert [f.part for f in FolderSource(tmp_path).frames()] == ["a.png/b.png"]


def test_names_that_the_wire_cannot_carry_are_made_fit(tmp_path: Path) -> None:
    """Names too long, or not in UTF-8, become part ids that the line accepts."""
    picture(tmp_path / ("c" * 200) / ("x" * 200 + ".png"))
    (tmp_path / "good").mkdir()
    odd = bytes(tmp_path / "good") + b"/\xff\xfe.png"
    with open(odd, "wb") as stream:  # noqa: PTH123 - a name in bytes
        stream.write(picture(tmp_path / "plain.png").read_bytes())
    (tmp_path / "plain.png").unlink()
    frames = list(FolderSource(tmp_path).frames())
    assert len(frames) == 2
    for frame in frames:
        assert sent(frame).shape == (4, 6, 3)
    assert frames[0].part.endswith("x.png")


def test_a_folder_is_sent_once_or_for_ever(tmp_path: Path) -> None:
    """With loop the first file follows the last."""
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    assert [f.part for f in FolderSource(tmp_path).frames()] == ["a.png", "b.png"]
    endless = FolderSource(tmp_path, loop=True).frames()
    assert [f.part for f in itertools.islice(endless, 5)] == ["a.png", "b.png", "a.png", "b.png", "a.png"]


def test_a_folder_without_images_says_what_it_looks_for(tmp_path: Path) -> None:
    """Masks alone are no images."""
    picture(tmp_path / "ground_truth" / "a.png")
    with pytest.raises(SourceError, match=r"no images in it \(\.bmp, \.jpeg, \.jpg, \.png"):
        opened(tmp_path)


def test_a_video_is_sent_frame_by_frame(tmp_path: Path) -> None:
    """All frames in order, raw, and then the end."""
    source = opened(film(tmp_path / "film.avi"))
    frames = list(source.frames())
    assert [(f.w, f.h, f.fmt) for f in frames] == [(64, 48, "bgr8")] * 5
    levels = [float(sent(f).mean()) for f in frames]
    assert np.allclose(levels, [20, 60, 100, 140, 180], atol=4)
    assert list(source.frames()) == []


def test_a_video_starts_again_with_loop(tmp_path: Path) -> None:
    """The first frame follows the last, without an end."""
    frames = opened(film(tmp_path / "film.avi", 3), loop=True).frames()
    levels = [float(sent(f).mean()) for f in itertools.islice(frames, 7)]
    assert np.allclose(levels, [20, 60, 100, 20, 60, 100, 20], atol=4)
    frames.close()  # type: ignore[attr-defined]


def test_the_frames_of_a_video_are_kept_apart(tmp_path: Path) -> None:
    """A frame that waits to be sent is not overwritten by the next one."""
    first, *rest = opened(film(tmp_path / "film.avi")).frames()
    assert len(rest) == 4
    assert abs(float(sent(first).mean()) - 20) < 4


def test_a_stream_that_stops_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no file is not at its end when it gives nothing: it is opened again, with growing pauses."""
    source = VideoSource(str(film(tmp_path / "film.avi", 2)))
    source._file = False
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    opens = iter([None, None, source._open()])
    monkeypatch.setattr(source, "_open", lambda: next(opens))
    levels = [float(sent(f).mean()) for f in itertools.islice(source.frames(), 4)]
    assert np.allclose(levels, [20, 60, 20, 60], atol=4)
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("address", ["none.avi", "no/such/folder", "nonsense"])
def test_what_cannot_be_opened_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """A wrong name is an error at once, not a camera that never sends."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="OpenCV cannot open it"):
        opened(address)


def test_a_file_that_is_no_video_says_so(tmp_path: Path) -> None:
    """Nor is it taken for one that has no frames."""
    path = tmp_path / "film.avi"
    path.write_bytes(b"no video")
    with pytest.raises(SourceError, match="OpenCV cannot open it"):
        opened(path)


def test_the_simulator_sends_its_parts_with_their_truth() -> None:
    """Raw pixels, named and marked as simulated, the same as the simulator's own."""
    frames = opened("sim:cap", seed=4, defects=0.5).frames()
    simulator = Simulator("cap", width=64, height=48, seed=4, defects=0.5)
    for index, frame in enumerate(itertools.islice(frames, 6)):
        shot = simulator.shot(index)
        assert (frame.part, frame.truth, frame.simulated) == (f"cam1-{index}", shot.label, True)
        assert np.array_equal(sent(frame), shot.image)


def test_the_simulators_default_is_the_washer() -> None:
    """``sim`` alone is enough."""
    frame = next(opened("sim").frames())
    assert np.array_equal(sent(frame), Simulator("washer", width=64, height=48, defects=0.0).shot(0).image)


def test_a_product_that_is_not_simulated_says_which_are() -> None:
    """An error of the simulator is one of the source."""
    with pytest.raises(SourceError, match="product 'bolt': one of washer, cap, plate"):
        opened("sim:bolt")
    with pytest.raises(SourceError, match="at least 32 pixels"):
        opened("sim", size=(8, 8))
