"""Graphs in fp16 and int8: a bundle's graph rewritten once, with float32 islands where it has to have them.

One explicitly quantised graph serves TensorRT and OpenVINO: symmetric int8 activations and weights between
``QuantizeLinear`` and ``DequantizeLinear``, float biases. Only convolutions of the networks are rewritten; distances,
statistics, normalisation, fusion and score stay in float32. Which convolutions bear it is found out on the stored
frames, by the tolerances of the parity gate: what does not is a float32 island too.

Rewriting needs the ``quantize`` extra; what runs does not. The rewritten graph is kept in a folder beside a record
of what it was made from, and is used only while it is the very file that was recorded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any, Final

import msgspec
import numpy as np
import structlog

from engines.bundle import MODEL, Bundle, Parity
from engines.frames import FrameError, Pixels, decode_image
from engines.frames import fit as fit_frame

REWRITTEN: Final = ("fp16", "int8")
"""Precisions that need a graph of their own."""
NETWORKS: Final = ("teacher.", "method.")
STATISTICS: Final = ("method.fusion.", "method.prototypes.", "method.places.", "method.whole.")
"""Scopes whose convolutions compute distances: their numbers span more than a short type holds."""
POINTWISE: Final = frozenset({"Relu", "Clip", "Add"})
"""What may stay in half floats between two convolutions that are."""
MARGIN: Final = 0.5
"""Share of the gate's tolerances that a rewritten graph may use up: other hardware rounds otherwise."""
RECIPE: Final = 2
"""Version of the rules in this module; a graph made by other rules is made anew."""
IMAGES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})

log = structlog.get_logger(__name__)
Maker = Callable[[frozenset[str]], bytes]


class PrecisionError(RuntimeError):
    """A graph cannot be had in a precision; the message names the remedy."""


class Record(msgspec.Struct, frozen=True):
    """What a rewritten graph was made from.

    Attributes:
        recipe: :data:`RECIPE`.
        source: SHA-256 of the bundle's graph.
        precision: ``fp16`` or ``int8``.
        sha256: Of the rewritten graph.
        frames: Frames that ranges were measured on.
        frames_sha256: Of their pixels.
        rewritten: Scopes whose convolutions were rewritten.
        islands: Scopes of networks that stay in float32.
        error: Largest difference on the stored frames, as a share of the gate's tolerance.
    """

    recipe: int
    source: str
    precision: str
    sha256: str
    frames: int
    frames_sha256: str
    rewritten: tuple[str, ...]
    islands: tuple[str, ...]
    error: float


def cache_folder() -> Path:
    """Where derived files are kept: systemd's ``CacheDirectory``, or the user's cache."""
    given = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dmdd"


def graph_of(bundle: Bundle, precision: str, folder: Path) -> Path:
    """The graph that computes in ``precision``: the bundle's own, or one rewritten and kept in ``folder``.

    Raises:
        PrecisionError: if it has to be rewritten, and that is not possible here.
    """
    if precision not in REWRITTEN:
        return bundle.model
    path = _path(bundle, precision, folder)
    try:
        record = read_record(path)
        if record.recipe == RECIPE and record.sha256 == sha256(path.read_bytes()).hexdigest():
            return path
        reason = "made by other rules" if record.recipe != RECIPE else "not the file that was recorded"
    except FileNotFoundError:
        reason = "not made yet"
    except (OSError, msgspec.MsgspecError) as error:
        reason = str(error)
    log.warning("graph_rewritten", engine=bundle.label, precision=precision, reason=reason)
    return rewrite(bundle, precision, folder)[0]


def read_record(path: Path) -> Record:
    """Read the record beside a rewritten graph.

    Raises:
        OSError, msgspec.MsgspecError: if there is none, or it is none.
    """
    return msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=Record)


def rewrite(bundle: Bundle, precision: str, folder: Path, images: Path | None = None) -> tuple[Path, Record]:
    """Rewrite a bundle's graph, on its stored frames and those of ``images``, and keep it in ``folder``.

    Raises:
        PrecisionError: if the precision needs no rewriting, the ``quantize`` extra is missing, ``images`` holds no
            image, or no convolution can be rewritten within the gate's tolerances.
    """
    if precision not in REWRITTEN:
        msg = f"{precision} needs no graph of its own, so no images: only {' and '.join(REWRITTEN)} do"
        raise PrecisionError(msg)
    _require_tools()
    parity = bundle.parity()
    frames = parity.frames if images is None else np.concatenate([parity.frames, _read(images, bundle)])
    with TemporaryDirectory() as work:
        groups = scopes(bundle.model)
        half = precision == "fp16"
        make = half_maker(bundle.model, groups) if half else int8_maker(bundle.model, groups, frames, Path(work))
        data, chosen, error = fit(bundle, parity, frozenset(groups), make)
    record = Record(
        RECIPE,
        bundle.manifest.files[MODEL],
        precision,
        sha256(data).hexdigest(),
        len(frames),
        sha256(frames.tobytes()).hexdigest(),
        tuple(sorted(chosen)),
        tuple(sorted(set(groups) - chosen)),
        error,
    )
    path = _path(bundle, precision, folder)
    write_atomically(path, data)
    write_atomically(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    return path, record


def fit(bundle: Bundle, parity: Parity, groups: frozenset[str], make: Maker) -> tuple[bytes, frozenset[str], float]:
    """Rewrite as many groups of convolutions as the tolerances bear: all, or the least sensitive ones.

    Groups are tried one by one; of those in ascending order of their own error, as many are taken as stay within
    :data:`MARGIN` together.

    Raises:
        PrecisionError: if that is none.
    """
    whole = make(groups)
    error = gap(bundle, parity, whole)
    if groups and error <= MARGIN:
        return whole, groups, error
    alone = {group: gap(bundle, parity, make(frozenset({group}))) for group in sorted(groups)}
    ordered = sorted(alone, key=alone.__getitem__)
    taken, best = 0, (b"", frozenset[str](), 0.0)
    low, high = 1, len(ordered) - 1
    while low <= high:
        taken = (low + high) // 2
        some = frozenset(ordered[:taken])
        data = make(some)
        error = gap(bundle, parity, data)
        if error <= MARGIN:
            best, low = (data, some, error), taken + 1
        else:
            high = taken - 1
    if not best[1]:
        msg = f"{bundle.label}: no part of it stays within the gate's tolerances in this precision: run it in fp32"
        raise PrecisionError(msg)
    return best


def gap(bundle: Bundle, parity: Parity, graph: bytes) -> float:
    """Largest difference from the reference on the stored frames, as a share of the gate's tolerance.

    The larger of two: ONNX Runtime computes int8 as the graph says; OpenVINO moves roundings about, and is what runs.
    Of fp16 both round the weights only, as they compute half floats in float32 on a CPU: how a GPU rounds what lies
    between is for the parity gate there to judge.
    """
    tolerance, largest = bundle.manifest.tolerance, 0.0
    for run in (_run, _run_openvino):
        scores, heatmaps = run(graph, parity.frames)
        if not np.isfinite(scores).all():  # half floats overflow
            return math.inf
        off = np.abs(heatmaps.astype(np.int16) - parity.heatmaps).mean((1, 2)).max() / tolerance.heatmap_mean
        largest = max(largest, float(off), float(np.abs(scores - parity.scores).max() / tolerance.score))
    return largest


def scopes(model: Path) -> dict[str, list[str]]:
    """Names of the convolutions that may be rewritten, by scope: three names deep, as ``method.head.fields``."""
    import onnx  # noqa: PLC0415 - the `quantize` extra

    graph = onnx.load(model).graph
    constants = {tensor.name for tensor in graph.initializer}
    found: dict[str, list[str]] = {}
    for node in graph.node:
        weight = node.input[1] if node.op_type == "Conv" else ""
        if weight in constants and weight.startswith(NETWORKS) and not weight.startswith(STATISTICS):
            depth = 4 if weight.startswith("teacher.net.blocks.") else 3
            found.setdefault(".".join(weight.split(".")[:depth]), []).append(node.name)
    return found


def half_maker(model: Path, groups: dict[str, list[str]]) -> Maker:
    """Casts chosen convolutions, and what is pointwise between them, to half floats."""
    import onnx  # noqa: PLC0415 - the `quantize` extra
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415
    from onnxruntime.transformers.onnx_model import OnnxModel  # noqa: PLC0415

    def make(chosen: frozenset[str]) -> bytes:
        graph = onnx.load(model)
        half = _half_nodes(graph.graph, {name for group in chosen for name in groups[group]})
        floats = [node.name for node in graph.graph.node if node.name not in half]
        cast = convert_float_to_float16(graph, keep_io_types=True, op_block_list=[], node_block_list=floats)
        ordered = OnnxModel(cast)
        ordered.topological_sort()  # the casts stand at the end, and ONNX wants producers first
        return bytes(ordered.model.SerializeToString())

    return make


def _half_nodes(graph: Any, convolutions: set[str]) -> set[str]:
    """The convolutions, and pointwise nodes all of whose tensors come from nodes in half floats."""
    constants = {tensor.name for tensor in graph.initializer}
    half, names = set[str](), set(convolutions)
    for node in graph.node:
        inputs = [name for name in node.input if name and name not in constants]
        if node.op_type in POINTWISE and inputs and half.issuperset(inputs):
            names.add(node.name)
        if node.name in names:
            half.update(node.output)
    return names


def int8_maker(model: Path, groups: dict[str, list[str]], frames: Pixels, work: Path) -> Maker:
    """Puts chosen convolutions between quantisation and dequantisation, by ranges measured once on ``frames``."""
    ranges = work / "ranges.json"

    def make(chosen: frozenset[str]) -> bytes:
        out = work / "int8.onnx"
        names = [name for group in sorted(chosen) for name in groups[group]]
        _quantise(model, out, frames, names, ranges)
        return out.read_bytes()

    return make


def _quantise(model: Path, out: Path, frames: Pixels, nodes: list[str], ranges: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # noqa: PLC0415 - an extra

    with _quiet():
        quantize_static(
            str(model),
            str(out),
            _Frames(frames),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            op_types_to_quantize=["Conv"],
            extra_options={
                # TensorRT takes no int32 bias, and no zero points.
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,
                # What float32 reads, distances above all, is not rounded: each convolution quantises its own input.
                "OpTypesToExcludeOutputQuantization": ["Conv"],
            },
            calibration_cache_path=ranges,
        )


class _Frames:
    """Frames one by one, as ONNX Runtime asks for them."""

    def __init__(self, frames: Pixels) -> None:
        self._left = iter(frames[:, None])

    def get_next(self) -> dict[str, Pixels] | None:
        frame = next(self._left, None)
        return None if frame is None else {"frames": frame}


def _run(graph: bytes, frames: Pixels) -> tuple[np.ndarray, np.ndarray]:
    import onnxruntime  # noqa: PLC0415 - the `quantize` extra

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = [session.run(["score", "heatmap"], {"frames": frame}) for frame in frames[:, None]]
    return np.concatenate([score for score, _ in found]), np.concatenate([heatmap for _, heatmap in found])


def _run_openvino(graph: bytes, frames: Pixels) -> tuple[np.ndarray, np.ndarray]:
    from engines.openvino_runtime import ov  # noqa: PLC0415 - half a second to import

    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "1"}
    compiled = core.compile_model(core.read_model(graph), "CPU", settings)
    found = [compiled([frame]) for frame in frames[:, None]]
    return np.concatenate([one["score"] for one in found]), np.concatenate([one["heatmap"] for one in found])


def _read(folder: Path, bundle: Bundle) -> Pixels:
    """Images of a folder, brought to an engine's input as its frames are."""
    shape = bundle.manifest.input.shape
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not paths:
        msg = f"{folder}: no image to calibrate with; give a folder of images of good parts"
        raise PrecisionError(msg)
    frames: Pixels = np.empty((len(paths), *shape), np.uint8)
    for path, frame in zip(paths, frames, strict=True):
        try:
            fit_frame(decode_image(path.read_bytes(), shape[2]), frame)
        except FrameError as error:
            msg = f"{path}: {error}; take it out of the folder"
            raise PrecisionError(msg) from error
    return frames


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it; its folder is made for this user alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _path(bundle: Bundle, precision: str, folder: Path) -> Path:
    return folder / "graphs" / f"{bundle.manifest.files[MODEL][:32]}-{precision}.onnx"


def _require_tools() -> None:
    try:
        import onnx  # noqa: F401, PLC0415
        import onnxruntime  # noqa: F401, PLC0415
    except ImportError as error:
        msg = (
            f"rewriting a graph needs onnx and onnxruntime ({error}): pip install 'dmdd-line[quantize]', or run"
            " `dmdd build` where it is installed and copy the cache folder"
        )
        raise PrecisionError(msg) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice on graphs for its own engine from the log."""
    import logging  # noqa: PLC0415

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
