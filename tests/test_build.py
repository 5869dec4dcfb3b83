"""From a bundle to an engine: targets and precisions that there are, refusals of those that there are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engines.build import BuildError, ParityError, Target, compile_engine, parity_gate
from engines.bundle import Bundle, Tolerance
from engines.openvino_lane import PRECISIONS, OpenVinoEngine
from engines.openvino_runtime import ov
from pipeline import cli_engines, service
from pipeline.config import parse
from tests.support.network import write_network

LOOSE = Tolerance(score=0.1, heatmap_mean=10.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small network with a wide tolerance."""
    return write_network(tmp_path_factory.mktemp("network") / "bundle", LOOSE)


def target(cache: Path, precision: str, kind: str = "openvino") -> Target:
    """A target of one lane that keeps what it derives in a folder of the test's own."""
    return Target(kind, precision, lanes=1, max_batch=3, threads=1, cache=str(cache))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvino_is_told_its_precision(bundle: Bundle, tmp_path: Path, precision: str) -> None:
    """Whatever the processor has, OpenVINO computes in what was asked for, never in what it would take by itself."""
    engine = compile_engine(bundle, target(tmp_path, precision))
    assert isinstance(engine, OpenVinoEngine)
    hint = engine._compiled.get_property("INFERENCE_PRECISION_HINT")  # type: ignore[union-attr]
    supported = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    expected = "bf16" if precision == "bf16" and "BF16" in supported else "f32"
    assert hint.get_type_name() == expected
    engine.close()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_passes_the_gate_at_every_batch_size(bundle: Bundle, tmp_path: Path, precision: str) -> None:
    """A quantised engine reproduces the float reference within tolerance, and is not the float engine."""
    engine = compile_engine(bundle, target(tmp_path, precision))
    lane = engine.make_lane()
    differences = parity_gate(bundle, lane)
    lane.close()
    engine.close()
    assert {d.batch for d in differences} == {1, 2, 3}
    largest = max(abs(d.score - d.expected) for d in differences)
    assert (largest < 1e-5) == (precision == "fp32")


def test_int8_really_runs_in_int8(bundle: Bundle, tmp_path: Path) -> None:
    """OpenVINO takes the quantised convolutions as such: their weights are 8 bits in what it runs."""
    engine = compile_engine(bundle, target(tmp_path, "int8"))
    assert isinstance(engine, OpenVinoEngine)
    nodes = engine._compiled.get_runtime_model().get_ops()  # type: ignore[union-attr]
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in nodes
        if "onv" in str(node.get_rt_info()["layerType"].astype(str))
    ]
    assert kinds
    assert any(kind in {"i8", "u8"} for kind in kinds)
    engine.close()


def test_a_coarse_engine_is_refused(tmp_path: Path) -> None:
    """The gate has the last word: a graph that was made under a wide tolerance fails under a narrow one."""
    wide = write_network(tmp_path / "wide", LOOSE)
    compile_engine(wide, target(tmp_path, "int8")).close()
    narrow = write_network(tmp_path / "narrow", Tolerance(1e-7, 1e-7))
    engine = compile_engine(narrow, target(tmp_path, "int8"))
    lane = engine.make_lane()
    with pytest.raises(ParityError, match="choose a higher precision"):
        parity_gate(narrow, lane)
    lane.close()
    engine.close()


@pytest.mark.parametrize(("kind", "precision"), [("openvino", "fp16"), ("tensorrt", "bf16"), ("cpu", "fp32")])
def test_what_there_is_not_is_refused(bundle: Bundle, tmp_path: Path, kind: str, precision: str) -> None:
    """A precision or target that is not offered is refused, with those that are."""
    with pytest.raises(BuildError, match=r"fp32|openvino or tensorrt"):
        compile_engine(bundle, target(tmp_path, precision, kind))


def test_what_is_built_ahead_is_what_the_line_looks_for() -> None:
    """``dmdd build --config`` and the line read the same target from a config: a plan's name depends on all of it."""
    engine = {"target": "tensorrt", "precision": "fp16", "lanes": 3, "max_batch": 5, "exact_batches": [1, 2]}
    config = parse({"cameras": {"cam1": {}}, "engine": {**engine, "cache": "plans", "threads": 1}})
    expected = Target("tensorrt", "fp16", 3, 5, 1, "plans", (1, 2))
    assert service._target(config) == cli_engines._target(config, None, None, None, None) == expected


def test_int8_without_the_tools_names_the_extra(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a graph has to be quantised and the tools are missing, the error says what to install."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BuildError, match=r"dmdd-line\[quantize\]"):
        compile_engine(bundle, target(tmp_path, "int8"))
