"""Graphs in fp16 and int8: what is rewritten, what stays in float32, and that only the validated file is used."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from engines import precision
from engines.bundle import MODEL, Bundle, Tolerance
from engines.precision import MARGIN, PrecisionError, cache_folder, gap, graph_of, read_record, rewrite, scopes
from tests.support.network import SIDE, write_network

LOOSE = Tolerance(score=0.1, heatmap_mean=10.0)
FUSION = "method.fusion.layers.0"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network that bears short types."""
    return write_network(tmp_path_factory.mktemp("network") / "bundle", LOOSE)


def nodes_by_output(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Which node makes which tensor."""
    return {output: node for node in graph.node for output in node.output}


def test_networks_may_be_rewritten_and_statistics_never(bundle: Bundle) -> None:
    """Convolutions of teacher and head are candidates, by scope; the fusion's, which sees distances, is none."""
    assert scopes(bundle.model) == {
        "teacher.net.conv_stem": ["teacher.net.conv_stem"],
        "teacher.net.blocks.0": ["teacher.net.blocks.0.0.conv"],
        "method.head.exit": ["method.head.exit.0"],
    }


def test_int8_is_symmetric_with_float_biases(bundle: Bundle, tmp_path: Path) -> None:
    """All zero points are 0, all types int8, no bias is quantised: what TensorRT's parser takes."""
    path, _ = rewrite(bundle, "int8", tmp_path)
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert pairs
    for node in pairs:
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    made = nodes_by_output(graph)
    for node in (node for node in graph.node if node.op_type == "Conv"):
        short = node.name != FUSION
        assert (made.get(node.input[1]) is not None) == short, node.name
        assert constants[node.input[2]].dtype == np.float32, node.name
        assert (made[node.input[0]].op_type == "DequantizeLinear") == short, node.name


def test_fp16_keeps_inputs_outputs_and_statistics(bundle: Bundle, tmp_path: Path) -> None:
    """Networks compute in half floats, what is pointwise between them too; ports and statistics stay as they were."""
    path, _ = rewrite(bundle, "fp16", tmp_path)
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    weights = {node.name: types[node.input[1]] for node in graph.node if node.op_type == "Conv"}
    assert weights.pop(FUSION) == TensorProto.FLOAT
    assert set(weights.values()) == {TensorProto.FLOAT16}
    assert [port.type.tensor_type.elem_type for port in (*graph.input, *graph.output)] == [
        TensorProto.UINT8,
        TensorProto.FLOAT,
        TensorProto.UINT8,
    ]
    relu = next(node for node in graph.node if node.op_type == "Relu")
    assert nodes_by_output(graph)[relu.input[0]].op_type == "Conv"  # no cast between


@pytest.mark.parametrize("kind", precision.REWRITTEN)
def test_a_rewritten_graph_stays_well_within_tolerance(bundle: Bundle, tmp_path: Path, kind: str) -> None:
    """On the stored frames it uses up at most the stated share of the tolerance, and its record says how much."""
    path, record = rewrite(bundle, kind, tmp_path)
    measured = gap(bundle, bundle.parity(), path.read_bytes())
    assert 0 < record.error <= MARGIN
    assert measured == pytest.approx(record.error)
    assert record == read_record(path)
    assert record.source == bundle.manifest.files[MODEL]
    assert record.islands == ()


def test_what_does_not_bear_it_is_an_island(tmp_path: Path) -> None:
    """A head that takes small differences of large numbers stays in float32; the rest is rewritten."""
    wide = write_network(tmp_path / "wide", Tolerance(score=0.2, heatmap_mean=20.0), fragile=True)
    parity, groups = wide.parity(), scopes(wide.model)
    make = precision.int8_maker(wide.model, groups, parity.frames, tmp_path)
    make(frozenset(groups))  # measures the ranges
    alone = {group: gap(wide, parity, make(frozenset({group}))) for group in groups}
    worst = max(alone, key=alone.__getitem__)
    scale = alone[worst] / (2 * MARGIN)
    strict = write_network(tmp_path / "strict", Tolerance(0.2 * scale, 20.0 * scale), fragile=True)
    path, record = rewrite(strict, "int8", tmp_path / "cache")
    assert worst in record.islands
    assert record.rewritten
    assert gap(strict, parity, path.read_bytes()) <= MARGIN


def test_nothing_that_bears_it_is_said(tmp_path: Path) -> None:
    """Where no part stays within tolerance there is no graph, and the remedy is named."""
    strict = write_network(tmp_path / "bundle", Tolerance(1e-9, 1e-9))
    with pytest.raises(PrecisionError, match="run it in fp32"):
        rewrite(strict, "int8", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_float_graphs_are_the_bundles_own(bundle: Bundle, tmp_path: Path) -> None:
    """fp32 and bf16 run the very file that is in the bundle."""
    assert graph_of(bundle, "fp32", tmp_path) == graph_of(bundle, "bf16", tmp_path) == bundle.model
    assert list(tmp_path.iterdir()) == []


def test_a_rewritten_graph_serves_without_the_tools(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once made, it runs where neither onnx nor onnxruntime is installed; making it there names the extra."""
    path, _ = rewrite(bundle, "int8", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert graph_of(bundle, "int8", tmp_path) == path
    with pytest.raises(PrecisionError, match=r"dmdd-line\[quantize\]"):
        graph_of(bundle, "fp16", tmp_path)


@pytest.mark.parametrize("harm", ["graph", "record", "rules"])
def test_only_the_recorded_file_is_used(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that was altered, has no legible record, or was made by other rules is made anew, which is said."""
    path, record = rewrite(bundle, "int8", tmp_path)
    original = path.read_bytes()
    if harm == "graph":
        path.write_bytes(original[:-3] + b"bad")
    if harm == "record":
        path.with_suffix(".json").write_bytes(b"{}")
    if harm == "rules":
        monkeypatch.setattr(precision, "RECIPE", record.recipe + 1)
    assert graph_of(bundle, "int8", tmp_path) == path
    assert path.read_bytes() == original
    assert "graph_rewritten" in capsys.readouterr().out


class TestImages:
    def test_widen_the_ranges(self, bundle: Bundle, tmp_path: Path) -> None:
        """A folder of images adds to the stored frames, brought to the engine's size; the record counts them."""
        folder = tmp_path / "images" / "deep"
        folder.mkdir(parents=True)
        for level in (0, 255):
            cv2.imwrite(str(folder / f"{level}.png"), np.full((2 * SIDE, SIDE, 3), level, np.uint8))
        _, plain = rewrite(bundle, "int8", tmp_path / "a")
        _, wider = rewrite(bundle, "int8", tmp_path / "b", tmp_path / "images")
        assert wider.frames == plain.frames + 2
        assert wider.frames_sha256 != plain.frames_sha256
        assert wider.sha256 != plain.sha256

    def test_none_is_refused(self, bundle: Bundle, tmp_path: Path) -> None:
        """A folder without images is refused before anything is measured."""
        with pytest.raises(PrecisionError, match="no image to calibrate with"):
            rewrite(bundle, "int8", tmp_path / "cache", tmp_path)

    def test_a_broken_one_is_named(self, bundle: Bundle, tmp_path: Path) -> None:
        """An image that cannot be decoded is named, not left out in silence."""
        (tmp_path / "broken.png").write_bytes(b"no picture")
        with pytest.raises(PrecisionError, match=r"broken\.png"):
            rewrite(bundle, "int8", tmp_path / "cache", tmp_path)


def test_the_cache_is_the_services_own_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The CacheDirectory that systemd gives comes first, then the user's cache folder."""
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/dmdd:/var/cache/other")
    assert cache_folder() == Path("/var/cache/dmdd")
    monkeypatch.delenv("CACHE_DIRECTORY")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dmdd"
