"""Bundles: what was validated is what is loaded, byte for byte, and anything else is refused with the reason."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engines import bundle
from engines.bundle import (
    CALIBRATION,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MODEL,
    PARITY,
    Bundle,
    BundleError,
    Evidence,
    OutputSpec,
    Parity,
    Recall,
    Threshold,
)
from tests.support.engine import write_bundle

NEW = "new"
THRESHOLD = Threshold(
    0.625,
    0.25,
    3,
    "in words",
    bound=0.5,
    source="three parts",
    calibrated="2026-01-01T00:00:00+00:00",
    recall=Recall(1, 2, 0.1, 0.9, 0.95, {"crack": (1, 2)}),
    warnings=("few",),
)
EMPTY = (("frames", (32, 32, 1), np.uint8), ("scores", (), np.float32), ("heatmaps", (8, 8), np.uint8))
EVIDENCE = Evidence((0.1, 1 / 3, 0.625), {"crack": (0.5, 0.75)}, {"taken": 3})


@pytest.fixture
def written(tmp_path: Path) -> Bundle:
    """A bundle of this test's own."""
    return write_bundle(tmp_path / "bundle")


def change_manifest(folder: Path, **changes: Any) -> None:
    """Replace keys of a manifest."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder: Path) -> str:
    """Why a bundle is not loaded."""
    with pytest.raises(BundleError) as caught:
        bundle.load(folder)
    return str(caught.value)


def test_a_bundle_is_read_as_it_was_written(written: Bundle, tmp_path: Path) -> None:
    """Manifest, model and stored frames come back the same; the digest is that of the manifest."""
    got = bundle.load(written.folder)
    assert got == written
    assert got.manifest.name == "bright"
    assert got.digest == sha256((written.folder / MANIFEST).read_bytes()).hexdigest()
    assert got.version == got.digest[:12]
    assert got.label == f"bright@{got.digest[:12]}"
    assert got.manifest.files == {
        name: sha256((written.folder / name).read_bytes()).hexdigest() for name in (MODEL, PARITY)
    }
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
    parity = Parity(frames, np.array([0.25, 0.75], np.float32), frames[:, ::4, ::4, 0])
    again = bundle.write(tmp_path / NEW, got.manifest, b"model", parity)
    assert again.model.read_bytes() == b"model"
    for name in ("frames", "scores", "heatmaps"):
        assert np.array_equal(getattr(again.parity(), name), getattr(parity, name))


def test_a_bundle_in_a_store_is_labelled_by_its_version(written: Bundle) -> None:
    """The label is what stands in every verdict."""
    assert bundle.load(written.folder, "7").label == "bright@7"


def test_a_bundle_is_never_written_over_another(written: Bundle) -> None:
    """A folder that holds anything is left as it is."""
    before = (written.folder / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="is not empty"):
        bundle.write(written.folder, written.manifest, b"model", written.parity())
    assert (written.folder / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("name", [MODEL, PARITY])
def test_a_changed_file_is_refused(written: Bundle, name: str) -> None:
    """One wrong bit anywhere in a file, or one byte more or less, and the engine is not the validated one."""
    path = written.folder / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    for changed in (
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        whole + b"\0",
        whole[:-1],
        b"",
    ):
        path.write_bytes(changed)
        assert f"{name} is not the file that was validated (SHA-256 differs)" in refusal(written.folder)
    path.write_bytes(whole)
    bundle.load(written.folder)


@pytest.mark.parametrize("name", [MODEL, PARITY])
def test_a_missing_file_is_refused(written: Bundle, name: str) -> None:
    """What is not there is named, with what to do."""
    (written.folder / name).unlink()
    assert refusal(written.folder).endswith(f"{name} is missing; copy the bundle again")


@pytest.mark.parametrize("name", [MODEL, PARITY])
def test_a_manifest_has_to_vouch_for_both_files(written: Bundle, name: str) -> None:
    """A file without a digest could be any file."""
    files = {key: value for key, value in written.manifest.files.items() if key != name}
    change_manifest(written.folder, files=files)
    assert "does not name model.onnx and parity.npz" in refusal(written.folder)


@pytest.mark.parametrize("schema", [0, 2, 99, "1", None, 1.5, [1]])
def test_a_manifest_of_another_schema_is_refused(written: Bundle, schema: Any) -> None:
    """A newer bundle is not guessed at, even where its keys look the same: the remedy is named."""
    change_manifest(written.folder, schema=schema)
    assert f"bundle schema {schema}, this version of dmdd reads 1; upgrade dmdd or rebuild it" in refusal(
        written.folder
    )


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "sub/model.onnx", "..", ".", "", "a\0b", "x" * 5000, "./model.onnx"]
)
def test_a_file_name_that_leaves_the_bundle_is_refused(written: Bundle, name: str) -> None:
    """A manifest cannot make the line read, or vouch for, a file elsewhere."""
    (written.folder.parent / "outside").write_bytes(b"secret")
    (written.folder / "sub").mkdir()
    shutil.copy(written.model, written.folder / "sub")
    digests = {**written.manifest.files, name: sha256(b"secret").hexdigest()}
    change_manifest(written.folder, files=digests)
    assert refusal(written.folder)


def test_a_path_in_a_manifest_is_told_apart_from_a_missing_file(written: Bundle) -> None:
    """A bundle that reaches outside is called what it is."""
    change_manifest(written.folder, files={**written.manifest.files, "../outside": "0"})
    assert "file name '../outside' in its manifest leaves the bundle; do not use it" in refusal(written.folder)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"\xff\xfe\x00",
        b'{"schema": 1}',
        b'{"schema": 1, "name": "\xff"}',
        b'{"schema": 1, "name": "\\ud800"}',
        b"[" * 100_000,
        b'{"schema":' * 100_000,
        b'{"schema": 1, "x": ' + b"[" * 100_000,
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_a_manifest_that_is_none_is_refused(written: Bundle, raw: bytes) -> None:
    """Garbage, JSON of another kind, nested without end: always a BundleError."""
    (written.folder / MANIFEST).write_bytes(raw)
    assert str(written.folder) in refusal(written.folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": 5}, "name"),
        ({"surprise": 1}, "surprise"),
        ({"input": {"height": 32}}, "input"),
        ({"output": None}, "output"),
        ({"threshold": {"value": "high"}}, "threshold"),
        ({"files": {MODEL: 5}}, "files"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_manifest_with_a_wrong_value_says_where(written: Bundle, changes: dict[str, Any], said: str) -> None:
    """The key is named; a key that this version does not know is an error too."""
    change_manifest(written.folder, **changes)
    message = refusal(written.folder)
    assert "not a valid manifest" in message
    assert said in message


def test_an_oversized_manifest_is_refused_unread(written: Bundle) -> None:
    """No manifest is larger than a mebibyte."""
    path = written.folder / MANIFEST
    whole = path.read_bytes()
    path.write_bytes(whole + b" " * (MAX_MANIFEST_BYTES - len(whole)))
    bundle.load(written.folder)
    path.write_bytes(whole + b" " * (MAX_MANIFEST_BYTES - len(whole) + 1))
    assert "larger than any manifest is" in refusal(written.folder)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    """Nor is a folder that does not exist, nor a file."""
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        assert f"{folder}: not an engine bundle" in refusal(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@example(None)
def test_no_damage_to_a_manifest_goes_unnoticed(written: Bundle, data: st.DataObject | None) -> None:
    """Wrong bytes in a manifest are a BundleError, or show as another digest: never another kind of error."""
    path = written.folder / MANIFEST
    whole = path.read_bytes()
    raw = bytearray(whole)
    if data is not None:
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        got = bundle.load(written.folder)
    except BundleError:
        assert raw != whole
    else:
        assert (got.digest == written.digest) == (raw == whole)
    finally:
        path.write_bytes(whole)


def test_stored_frames_cannot_hold_code(written: Bundle) -> None:
    """A pickled array is refused when it is read, even where the manifest vouches for it."""
    np.savez(written.folder / PARITY, frames=np.array([{}], object), scores=np.zeros(1), heatmaps=np.zeros(1))
    digest = sha256((written.folder / PARITY).read_bytes()).hexdigest()
    change_manifest(written.folder, files={**written.manifest.files, PARITY: digest})
    with pytest.raises(ValueError, match="allow_pickle"):
        bundle.load(written.folder).parity()


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "weights.pkl", "sub"])
def test_a_file_that_the_manifest_does_not_name_is_refused(written: Bundle, name: str) -> None:
    """Nothing travels along unverified; the message names it and what to do."""
    if name == "sub":
        (written.folder / name).mkdir()
    else:
        (written.folder / name).write_bytes(b"")
    assert f"{name} is not named in its manifest; remove it" in refusal(written.folder)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("input", "resize", "nearest"),
        ("input", "dtype", "float32"),
        ("input", "colour", "rgb"),
        ("input", "channels", 4),
        ("input", "height", 0),
        ("input", "width", 20_000),
        ("output", "heatmap", "float32"),
        ("output", "score", "float16"),
        ("output", "scale", "linear"),
        ("output", "width", -1),
        ("output", "high", -7.0),
        ("threshold", "value", 1e999),
    ],
)
def test_an_engine_that_would_run_otherwise_than_validated_is_refused(
    written: Bundle, section: str, key: str, value: Any
) -> None:
    """What this version does not do is not passed over in silence: pixels would be prepared in another way."""
    manifest = json.loads((written.folder / MANIFEST).read_text())
    change_manifest(written.folder, **{section: {**manifest[section], key: value}})
    assert str(written.folder) in refusal(written.folder)


def test_the_manifest_states_everything_that_a_run_needs(written: Bundle) -> None:
    """Input, output, threshold and origin stand in the file in full, defaults included."""
    stored = json.loads((written.folder / MANIFEST).read_text())
    assert set(stored["input"]) == {"height", "width", "channels", "colour", "resize", "dtype"}
    assert set(stored["output"]) == {"height", "width", "low", "high", "score", "heatmap", "scale"}
    assert {"method", "backbone", "weights_licence", "data_sha256"} <= set(stored["training"])
    assert {"value", "false_reject_rate", "samples", "statement", "bound", "confidence"} <= set(stored["threshold"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": np.zeros(3, np.float32)}, "frames are"),
        ({"scores": np.zeros(4, np.float64)}, "scores are float64"),
        ({"heatmaps": np.zeros((4, 9, 8), np.uint8)}, "heatmaps are"),
        ({"frames": np.zeros((4, 32, 32, 3), np.uint8)}, "frames are"),
        ({"scores": np.full(4, np.nan, np.float32)}, "not finite"),
        ({name: np.zeros((0, *rest), kind) for name, rest, kind in EMPTY}, "no frames"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_stored_frames_that_do_not_fit_the_manifest_are_refused(
    written: Bundle, change: dict[str, Any], said: str
) -> None:
    """A gate over no frames, or of other sizes, would prove nothing."""
    parity = written.parity()
    arrays = {"frames": parity.frames, "scores": parity.scores, "heatmaps": parity.heatmaps, **change}
    np.savez(written.folder / PARITY, **arrays)
    digest = sha256((written.folder / PARITY).read_bytes()).hexdigest()
    change_manifest(written.folder, files={**written.manifest.files, PARITY: digest})
    with pytest.raises(BundleError, match=said):
        bundle.load(written.folder).parity()


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"text", b"\x93NUMPY"], ids=repr)
def test_stored_frames_that_are_none_are_refused(written: Bundle, raw: bytes) -> None:
    """Even where the manifest vouches for the file: a BundleError, and never an attempt to run it."""
    (written.folder / PARITY).write_bytes(raw)
    change_manifest(written.folder, files={**written.manifest.files, PARITY: sha256(raw).hexdigest()})
    with pytest.raises(BundleError, match="not the stored frames"):
        bundle.load(written.folder).parity()


def test_a_bundle_in_a_store_has_the_name_that_it_has_there(written: Bundle) -> None:
    """Two stores' names for one engine are not confused in the records."""
    assert bundle.load(written.folder, "7", "caps").label == "caps@7"


def test_a_manifest_is_text_that_people_can_read(written: Bundle) -> None:
    """Indented JSON with every key, ending in a newline."""
    text = (written.folder / MANIFEST).read_text()
    assert text.endswith("}\n")
    assert '\n  "threshold": {\n' in text
    assert set(json.loads(text)) == {field.encode_name for field in msgspec.structs.fields(bundle.Manifest)}


@pytest.mark.parametrize(("value", "level"), [(-5.0, 0), (1.0, 0), (2.0, 127.5), (4.0, 255), (9.0, 255)], ids=str)
def test_a_level_of_the_heatmap_is_a_place_between_low_and_high(value: float, level: float) -> None:
    """Levels are logarithmic between the ends, halfway at log 2 of log 4 here, and stay within them."""
    assert OutputSpec(height=1, width=1, low=1.0, high=4.0).level(value) == pytest.approx(level)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=2, unique=True).map(sorted))
def test_a_hotter_place_never_has_a_lower_level(values: list[float]) -> None:
    """What is above the threshold in the map is not below it in the heatmap."""
    cold, hot = (OutputSpec(height=1, width=1, low=-2.0, high=7.5).level(value) for value in values)
    assert 0 <= cold <= hot <= 255


def test_the_folder_is_made_durable(tmp_path: Path) -> None:
    """Any folder can be synchronised, and no file is left open."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        bundle.sync_folder(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_bundle_keeps_its_threshold_with_the_evidence(written: Bundle, tmp_path: Path) -> None:
    """Every figure and score comes back as it was written, to the last digit, and the manifest vouches for them."""
    manifest = msgspec.structs.replace(written.manifest, threshold=THRESHOLD)
    got = bundle.write(tmp_path / NEW, manifest, b"model", written.parity(), EVIDENCE)
    assert bundle.load(got.folder).manifest.threshold == THRESHOLD
    assert got.evidence() == EVIDENCE
    assert set(got.manifest.files) == {MODEL, PARITY, CALIBRATION}
    (got.folder / CALIBRATION).write_bytes((got.folder / CALIBRATION).read_bytes().replace(b"0.625", b"0.525"))
    assert f"{CALIBRATION} is not the file that was validated" in refusal(got.folder)


def test_another_threshold_leaves_the_model_as_it_is(written: Bundle, tmp_path: Path) -> None:
    """Model and stored frames are the same bytes; nothing else of the manifest changes; the original stays."""
    got = bundle.with_threshold(written, tmp_path / NEW, THRESHOLD, EVIDENCE)
    assert got.manifest.threshold == THRESHOLD
    assert got.evidence() == EVIDENCE
    for name in (MODEL, PARITY):
        assert (got.folder / name).read_bytes() == (written.folder / name).read_bytes()
        assert got.manifest.files[name] == written.manifest.files[name]
    changed = {"threshold": written.manifest.threshold, "files": written.manifest.files}
    assert msgspec.structs.replace(got.manifest, **changed) == written.manifest
    assert bundle.load(written.folder) == written


def test_a_threshold_can_be_replaced_again(written: Bundle, tmp_path: Path) -> None:
    """The second evidence takes the place of the first."""
    first = bundle.with_threshold(written, tmp_path / "first", THRESHOLD, EVIDENCE)
    later = Evidence((1.0, 2.0))
    second = bundle.with_threshold(first, tmp_path / "second", msgspec.structs.replace(THRESHOLD, value=2.0), later)
    assert second.evidence() == later
    assert second.manifest.files[MODEL] == written.manifest.files[MODEL]


def test_a_model_that_changed_since_it_was_verified_gets_no_new_threshold(written: Bundle, tmp_path: Path) -> None:
    """What is copied is verified against the digest of what was loaded; a full folder is left alone."""
    written.model.write_bytes(b"other")
    with pytest.raises(BundleError, match="SHA-256 differs"):
        bundle.with_threshold(written, tmp_path / NEW, THRESHOLD, EVIDENCE)
    with pytest.raises(BundleError, match="is not empty"):
        bundle.with_threshold(written, written.folder, THRESHOLD, EVIDENCE)


def test_a_bundle_without_evidence_is_read(written: Bundle) -> None:
    """A bundle of an earlier version states value, rate, samples and statement, and has no scores."""
    change_manifest(
        written.folder,
        threshold={"value": 0.5, "false_reject_rate": 0.01, "samples": 4, "statement": "at most 0.01"},
    )
    got = bundle.load(written.folder)
    assert got.evidence() is None
    assert got.manifest.threshold == Threshold(0.5, 0.01, 4, "at most 0.01")
    assert (got.manifest.threshold.bound, got.manifest.threshold.recall) == (None, None)


def test_the_packaged_engine_is_read() -> None:
    """The demo's engine loads with every version of the program."""
    packaged = bundle.load(Path(bundle.__file__).parent / "demo")
    assert packaged.manifest.threshold.samples > 0
    assert "at most" in packaged.manifest.threshold.statement


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b'{"scores": ["a"]}', b"\xff", b"[" * 100_000], ids=lambda raw: repr(raw[:9])
)
def test_evidence_that_is_none_is_refused(written: Bundle, tmp_path: Path, raw: bytes) -> None:
    """Even where the manifest vouches for the file."""
    got = bundle.with_threshold(written, tmp_path / NEW, THRESHOLD, EVIDENCE)
    (got.folder / CALIBRATION).write_bytes(raw)
    change_manifest(got.folder, files={**got.manifest.files, CALIBRATION: sha256(raw).hexdigest()})
    with pytest.raises(BundleError, match="not the evidence of a threshold"):
        bundle.load(got.folder).evidence()
