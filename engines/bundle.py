"""What an engine is on disk: a folder with a manifest, an ONNX graph and frames with expected results.

``manifest.json`` states everything that running the engine needs and the SHA-256 of every other file but the
signature, which vouches for the manifest (``engines/signing.py``). A file that is not named there is refused.
Nothing in a bundle is pickled; nothing in it is executed before it has been verified.
"""

from __future__ import annotations

import math
import os
import shutil
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from engines.frames import RESIZE_RULE, InputSpec, Pixels

SCHEMA: Final = 1
MANIFEST: Final = "manifest.json"
MODEL: Final = "model.onnx"
PARITY: Final = "parity.npz"
CALIBRATION: Final = "calibration.json"
SIGNATURE: Final = "signature.json"
MAX_MANIFEST_BYTES: Final = 1 << 20
MAX_NAME: Final = 64
MAX_PARITY_BYTES: Final = 1 << 30
"""Stored frames and results, unpacked."""
MAX_SIDE: Final = 16384


class BundleError(ValueError):
    """A bundle that must not be run; the message says why and what to do."""


class OutputSpec(msgspec.Struct, frozen=True):
    """What an engine gives: a float32 score a part and a uint8 heatmap ``(height, width)``.

    A heatmap level is ``log1p(value - low) / log1p(high - low) * 255`` of the anomaly map's value, clipped to
    0..255: fine steps where good parts lie, room for values far above them. ``score`` and ``heatmap`` are the types,
    ``scale`` is that rule's name.
    """

    height: int
    width: int
    low: float
    high: float
    score: str = "float32"
    heatmap: str = "uint8"
    scale: str = "log1p"

    def level(self, value: float) -> float:
        """The heatmap level, 0..255, of an anomaly map's value."""
        return min(math.log1p(max(value - self.low, 0.0)) / math.log1p(self.high - self.low), 1.0) * 255


class Recall(msgspec.Struct, frozen=True):
    """How many known defective parts lie above a threshold.

    Attributes:
        caught: Defective parts above the threshold.
        defects: Defective parts in all.
        low: Lower end of the exact (Clopper-Pearson) interval of the share that is caught.
        high: Its upper end.
        confidence: Confidence of the interval.
        classes: ``(caught, defects)`` of each kind of defect.
    """

    caught: int
    defects: int
    low: float
    high: float
    confidence: float
    classes: dict[str, tuple[int, int]] = {}


class Threshold(msgspec.Struct, frozen=True):
    """Above ``value`` a part is NG. The rest is the evidence for it; ``engines/calibration.py`` fills it in.

    Attributes:
        value: The threshold; a part whose score equals it is OK.
        false_reject_rate: The declared rate: a new good part is rejected with at most this probability.
        samples: Good parts behind it.
        statement: What is known about the rate, in words.
        bound: This engine's own false-reject rate is at most this, with ``confidence``; None if unknown.
        confidence: Confidence of ``bound``.
        source: What the good parts were.
        calibrated: When the threshold was chosen, ISO 8601.
        recall: What it catches of known defects; None if there were none to look at.
        warnings: What spoke against it when it was chosen, in words.
    """

    value: float
    false_reject_rate: float
    samples: int
    statement: str
    bound: float | None = None
    confidence: float = 0.9
    source: str = ""
    calibrated: str = ""
    recall: Recall | None = None
    warnings: tuple[str, ...] = ()


class Evidence(msgspec.Struct, frozen=True):
    """The scores that a threshold was chosen from, so that anyone can choose it again: ``calibration.json``.

    Attributes:
        scores: Scores of the good parts, ascending.
        defects: Scores of the defective parts, ascending, by kind of defect.
        counts: What became of every candidate, by name.
    """

    scores: tuple[float, ...]
    defects: dict[str, tuple[float, ...]] = {}
    counts: dict[str, int] = {}


class Training(msgspec.Struct, frozen=True):
    """Where an engine comes from."""

    method: str
    backbone: str
    weights_licence: str
    images: int
    data_sha256: str
    seed: int
    settings: dict[str, Any] = {}


class Tolerance(msgspec.Struct, frozen=True):
    """How far a compiled engine may be from the reference on the stored frames."""

    score: float = 0.02
    heatmap_mean: float = 1.0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is known about an engine."""

    schema: int = SCHEMA
    name: str
    created: str
    input: InputSpec
    output: OutputSpec
    threshold: Threshold
    training: Training
    tolerance: Tolerance = Tolerance()
    files: dict[str, str] = {}


@dataclass(frozen=True)
class Parity:
    """Stored frames with the reference model's results on them.

    Attributes:
        frames: uint8 ``(n, H, W, C)``.
        scores: float32 ``(n,)``.
        heatmaps: uint8 ``(n, h, w)``.
    """

    frames: Pixels
    scores: NDArray[np.float32]
    heatmaps: Pixels


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        folder: Where it lies.
        manifest: What it says of itself.
        digest: SHA-256 of the manifest's bytes, and through it of every file.
        version: Its number in the store, or the start of its digest elsewhere.
        name: Its name in the store; empty elsewhere, where its own name counts.
    """

    folder: Path
    manifest: Manifest
    digest: str
    version: str
    name: str = ""

    @property
    def model(self) -> Path:
        """The ONNX graph: uint8 frames in; score and uint8 heatmap out."""
        return self.folder / MODEL

    @property
    def label(self) -> str:
        """``name@version``, as it stands in every verdict."""
        return f"{self.name or self.manifest.name}@{self.version}"

    def parity(self) -> Parity:
        """Load the stored frames and expected results; nothing in the file can be code.

        Raises:
            BundleError: if they are not of this form, or not of the sizes that the manifest states.
        """
        path = self.folder / PARITY
        try:
            _check_archive(path)
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                found = Parity(stored["frames"], stored["scores"], stored["heatmaps"])
        except Exception as error:  # zipfile and NumPy name no set of errors for damaged files
            msg = f"{path}: not the stored frames of an engine ({error}); build the bundle again"
            raise BundleError(msg) from error
        if wrong := _misfit(found, self.manifest):
            msg = f"{path}: {wrong}; build the bundle again"
            raise BundleError(msg)
        return found

    def evidence(self) -> Evidence | None:
        """Load the scores behind the threshold; None for a bundle that was made without them.

        Raises:
            BundleError: if they are not of this form.
        """
        if CALIBRATION not in self.manifest.files:
            return None
        path = self.folder / CALIBRATION
        try:
            return msgspec.json.decode(path.read_bytes(), type=Evidence)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            msg = f"{path}: not the evidence of a threshold: {error}"
            raise BundleError(msg) from error


def write(folder: Path, manifest: Manifest, model: bytes, parity: Parity, evidence: Evidence | None = None) -> Bundle:
    """Write a bundle into the new or empty ``folder`` and return it, verified.

    Raises:
        BundleError: if ``folder`` is not empty.
    """
    _make_empty(folder)
    (folder / MODEL).write_bytes(model)
    np.savez_compressed(folder / PARITY, frames=parity.frames, scores=parity.scores, heatmaps=parity.heatmaps)
    return _complete(folder, manifest, {name: _digest(folder / name) for name in (MODEL, PARITY)}, evidence)


def with_threshold(source: Bundle, folder: Path, threshold: Threshold, evidence: Evidence) -> Bundle:
    """Write ``source`` with another threshold into the new or empty ``folder`` and return it, verified.

    Every other file is the same, byte for byte: it is verified against the digest in the manifest of ``source``.

    Raises:
        BundleError: if ``folder`` is not empty, or a file of ``source`` has changed since it was loaded.
    """
    _make_empty(folder)
    files = {name: digest for name, digest in source.manifest.files.items() if name != CALIBRATION}
    for name in files:
        shutil.copyfile(source.folder / name, folder / name)
    return _complete(folder, msgspec.structs.replace(source.manifest, threshold=threshold), files, evidence)


def _make_empty(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        msg = f"{folder} is not empty: a bundle is never written over another"
        raise BundleError(msg)


def _complete(folder: Path, manifest: Manifest, files: dict[str, str], evidence: Evidence | None) -> Bundle:
    """Write evidence and manifest beside the files that are there."""
    if evidence is not None:
        (folder / CALIBRATION).write_bytes(msgspec.json.encode(evidence) + b"\n")
        files = {**files, CALIBRATION: _digest(folder / CALIBRATION)}
    text = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, files=files)), indent=2)
    (folder / MANIFEST).write_bytes(text + b"\n")
    return load(folder)


def load(folder: Path, version: str | None = None, name: str = "") -> Bundle:
    """Read and verify a bundle. Who signed it is another question: see ``engines/signing.py``.

    Args:
        folder: Where it lies.
        version: Its version, where it lies in a store.
        name: Its name there.

    Raises:
        BundleError: if a file is missing, altered or unnamed, or the manifest is of another schema, or asks for
            something that this version does not do.
    """
    manifest, digest = _read_manifest(folder)
    if not {MODEL, PARITY} <= set(manifest.files):
        msg = f"{folder}: its manifest does not name {MODEL} and {PARITY}: build the bundle again"
        raise BundleError(msg)
    if wrong := _unsupported(manifest):
        msg = f"{folder}: {wrong}: upgrade dmdd, or build the bundle again"
        raise BundleError(msg)
    _check_files(folder, manifest.files)
    return Bundle(folder, manifest, digest, version or digest[:12], name)


def _check_files(folder: Path, files: dict[str, str]) -> None:
    """Refuse a folder that is not, byte for byte, what its manifest names."""
    for name, expected in files.items():
        if Path(name).name != name or len(name) > MAX_NAME:
            msg = f"{folder}: file name {name!r} in its manifest leaves the bundle; do not use it"
            raise BundleError(msg)
        if not (folder / name).is_file():
            msg = f"{folder}: {name} is missing; copy the bundle again"
            raise BundleError(msg)
        if _digest(folder / name) != expected:
            msg = f"{folder}: {name} is not the file that was validated (SHA-256 differs); copy the bundle again"
            raise BundleError(msg)
    extra = sorted({path.name for path in folder.iterdir()} - {MANIFEST, SIGNATURE, *files})
    if extra:
        msg = f"{folder}: {', '.join(extra[:3])} is not named in its manifest; remove it, or copy the bundle again"
        raise BundleError(msg)


def _unsupported(manifest: Manifest) -> str:
    """What a manifest asks for that would run otherwise than it was validated; empty if nothing."""
    frames, output, threshold = manifest.input, manifest.output, manifest.threshold
    sides = (frames.height, frames.width, output.height, output.width)
    if not all(1 <= side <= MAX_SIDE for side in sides):
        return f"sizes {sides} of input and output are not all between 1 and {MAX_SIDE}"
    if (frames.colour, frames.channels) not in {("mono", 1), ("bgr", 3)}:
        return f"input {frames.colour!r} with {frames.channels} channels; frames are mono with 1 or bgr with 3"
    if (frames.resize, frames.dtype) != (RESIZE_RULE, "uint8"):
        return f"input {frames.dtype!r}, resized by {frames.resize!r}; frames are 'uint8', by {RESIZE_RULE!r}"
    if (output.score, output.heatmap, output.scale) != ("float32", "uint8", "log1p"):
        return f"output {output.score!r}, {output.heatmap!r}, {output.scale!r}; known are 'float32', 'uint8', 'log1p'"
    if not (math.isfinite(threshold.value) and math.isfinite(output.high - output.low) and output.low < output.high):
        return f"threshold {threshold.value:g} and heatmap range {output.low:g} to {output.high:g} make no sense"
    return ""


def _check_archive(path: Path) -> None:
    """Refuse stored frames that would take more memory than they hold: by what they unpack to, or by their shapes."""
    with zipfile.ZipFile(path) as archive:
        total = sum(info.file_size for info in archive.infolist())
        if total > MAX_PARITY_BYTES:
            msg = f"would unpack to {total} bytes, at most {MAX_PARITY_BYTES}"
            raise ValueError(msg)
        for info in archive.infolist():
            with archive.open(info) as member:
                np.lib.format.read_magic(member)
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            if math.prod(shape) * dtype.itemsize > info.file_size:
                msg = f"{info.filename}: its head says {shape}, which its {info.file_size} bytes cannot hold"
                raise ValueError(msg)


def _misfit(parity: Parity, manifest: Manifest) -> str:
    """How stored frames and results differ from what the manifest states; empty if they do not."""
    count, sizes = len(parity.scores) if parity.scores.ndim else 0, manifest.output
    expected: dict[str, tuple[NDArray[Any], type, tuple[int, ...]]] = {
        "frames": (parity.frames, np.uint8, (count, *manifest.input.shape)),
        "scores": (parity.scores, np.float32, (count,)),
        "heatmaps": (parity.heatmaps, np.uint8, (count, sizes.height, sizes.width)),
    }
    for name, (found, dtype, shape) in expected.items():
        if found.dtype != dtype or found.shape != shape:
            return f"{name} are {found.dtype} {found.shape}, expected {np.dtype(dtype)} {shape}"
    if not count or not np.isfinite(parity.scores).all():
        return "there are no frames, or scores that are not finite numbers"
    return ""


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            msg = f"{path}: larger than any manifest is"
            raise BundleError(msg)
        raw = path.read_bytes()
    except OSError as error:
        msg = f"{folder}: not an engine bundle ({error.strerror}: {MANIFEST})"
        raise BundleError(msg) from error
    try:
        schema = msgspec.json.decode(raw, type=dict[str, Any]).get("schema")
        if schema != SCHEMA:
            msg = f"{folder}: bundle schema {schema}, this version of dmdd reads {SCHEMA}; upgrade dmdd or rebuild it"
            raise BundleError(msg)
        return msgspec.json.decode(raw, type=Manifest), sha256(raw).hexdigest()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        msg = f"{path}: not a valid manifest: {error}"
        raise BundleError(msg) from error


def _digest(path: Path) -> str:
    total = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
