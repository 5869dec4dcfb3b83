"""The TensorRT double on the simulated driver: the real names, a real model's numbers, and a library that says no."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from engines import cuda, plan
from engines.build import BuildError, Target, compile_engine, parity_gate
from engines.bundle import MODEL, Bundle, Tolerance
from engines.lane import LaneFault
from engines.precision import graph_of
from engines.tensorrt_lane import TensorRtEngine, TensorRtLane
from tests.sim import trt
from tests.sim.driver import OUT_OF_MEMORY, load
from tests.sim.isolation import isolated, missing
from tests.support.network import SIDE, write_network

needs_sim = pytest.mark.skipif(bool(missing()), reason=missing())
MAX_BATCH = 4
LOOSE = Tolerance(score=0.1, heatmap_mean=10.0)


@contextmanager
def engine_of(bundle: Bundle) -> Iterator[tuple[trt.Library, TensorRtEngine]]:
    """The double, installed, and an engine on it; at the end nothing may be left on the device."""
    library = trt.install()
    engine = TensorRtEngine(bundle, max_batch=MAX_BATCH, precision="fp32")
    try:
        yield library, engine
    finally:
        engine.close()
    assert (library.sim.counts().alive(), library.sim.counts().faults()) == ({}, {}), library.sim.reports()


def test_names_and_parameters_are_the_real_ones() -> None:
    """Every public member of the double is one of the real class, and methods take the same parameters."""
    real = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'dmdd-line[rtx]'")
    checked = 0
    for double in trt.CLASSES:
        true = getattr(real, trt.real_name(double))
        members = {name: value for name, value in vars(double).items() if not name.startswith("_")}
        assert set(members) <= set(dir(true)), double
        for name, value in members.items():
            if inspect.isfunction(value):
                expected = _parameters(name, getattr(true, name).__doc__)
                assert list(inspect.signature(value).parameters)[1:] in expected, f"{double.__name__}.{name}"
                checked += 1
    assert checked > 20


def _parameters(name: str, text: str) -> list[list[str]]:
    """Parameters of each overload, from the real method's text, with and without those that have defaults."""
    found = []
    for listed in re.findall(rf"{name}\(self: [\w.]+(?:, )?(.*)\) ->", text):
        names = re.findall(r"(?:^|, )(\w+): [^=,]+(= )?", listed)
        found += [[name for name, _ in names], [name for name, default in names if not default]]
    return found


@needs_sim
class TestNumbers:
    @isolated
    def test_results_are_onnx_runtimes(self, tmp_path: Path) -> None:
        """Through copies, streams and the lane, every batch size gives what ONNX Runtime gives, bit for bit."""
        bundle = write_network(tmp_path)
        session = onnxruntime.InferenceSession(str(bundle.folder / MODEL), providers=["CPUExecutionProvider"])
        frames = np.random.default_rng(0).integers(0, 256, (MAX_BATCH, SIDE, SIDE, 3), np.uint8)
        with engine_of(bundle) as (library, engine):
            library.sim.configure(guard=True, jitter_us=200)
            lane = engine.make_lane()
            for count in (1, 2, 3, 4, 1):
                lane.frames[:count] = frames[:count]
                lane.submit(count)
                lane.wait(10)
                scores, heatmaps = session.run(["score", "heatmap"], {"frames": frames[:count]})
                assert lane.scores[:count].tobytes() == scores.tobytes()
                assert lane.heatmaps[:count].tobytes() == heatmaps.tobytes()
            lane.close()

    @pytest.mark.parametrize(("precision", "node"), [("fp16", "Cast"), ("int8", "QuantizeLinear")])
    @isolated
    def test_rewritten_graphs(self, tmp_path: Path, precision: str, node: str) -> None:
        """fp16 and int8 graphs are built and run as they are: not the float's results, but within its tolerance."""
        trt.install()
        bundle = write_network(tmp_path / "bundle", LOOSE)
        target = Target("tensorrt", precision, lanes=1, max_batch=MAX_BATCH, cache=str(tmp_path / "cache"))
        graph = onnx.load(graph_of(bundle, precision, target.cache_folder))
        assert node in {made.op_type for made in graph.graph.node}
        engine = compile_engine(bundle, target)
        lane = engine.make_lane()
        found = parity_gate(bundle, lane)
        lane.close()
        engine.close()
        assert {difference.batch for difference in found} == {1, 2, 3, 4}
        off = [abs(difference.score - difference.expected) for difference in found]
        assert 1e-7 < max(off) <= bundle.manifest.tolerance.score
        assert all(difference.verdict_agrees for difference in found)
        assert (load().counts().alive(), load().counts().faults()) == ({}, {})

    @isolated
    def test_plans_are_kept(self, tmp_path: Path) -> None:
        """A plan in the cache is loaded and not built again; one of another version is built again."""
        library, bundle = trt.install(), write_network(tmp_path / "bundle")
        built: list[int] = []
        make = functools.partial(TensorRtEngine, bundle, max_batch=2, precision="fp32", cache=tmp_path / "cache")
        for version in ("11.4.0", "11.4.0", "12.0.0"):
            trt.VERSION = version  # type: ignore[misc]
            make(progress=lambda *_: built.append(1)).close()
            built.append(0)
        assert built == [1, 1, 1, 0, 0, 1, 1, 1, 0]
        assert library.sim.counts().alive() == {}


@needs_sim
class TestRefusals:
    @isolated
    def test_shapes_and_addresses(self, tmp_path: Path) -> None:
        """Shapes outside the profile, unknown tensors and missing addresses are answered with False."""
        with engine_of(write_network(tmp_path)) as (_, engine), cuda.attached():
            stream, execution = cuda.Stream(), engine.compiled.create_execution_context()
            assert execution.set_optimization_profile_async(1, stream.handle) is False
            assert execution.set_optimization_profile_async(0, stream.handle) is True
            assert execution.infer_shapes() == ["frames"]
            for count in (0, MAX_BATCH + 1):
                assert execution.set_input_shape("frames", (count, SIDE, SIDE, 3)) is False
            assert execution.set_input_shape("mask", (1,)) is False
            assert execution.set_input_shape("frames", (1, SIDE, SIDE, 3)) is True
            assert execution.set_tensor_address("mask", 1) is False
            assert execution.execute_async_v3(stream.handle) is False
            stream.synchronize()
            del execution
            stream.close()

    @isolated
    def test_memory_that_is_not_there(self, tmp_path: Path) -> None:
        """An address that is no allocation's is refused at the launch, as a fault of the lane with the reason."""
        with engine_of(write_network(tmp_path)) as (_, engine):
            lane = engine.make_lane()
            lane._execution._raw.set_tensor_address("score", 4096)
            with pytest.raises(LaneFault, match="cannot launch"):
                lane.submit(1)
            lane.close()

    @isolated
    def test_no_room(self, tmp_path: Path) -> None:
        """Where the device has no room for activations there is no context, and nothing is left behind."""
        with engine_of(write_network(tmp_path)) as (library, engine):
            library.sim.fail("cuMemAlloc", nth=4, code=OUT_OF_MEMORY)  # after the three buffers
            with pytest.raises(LaneFault, match=r"an execution context.*no memory for activations"):
                engine.make_lane()
            engine.make_lane().close()

    @isolated
    def test_a_graph_that_is_none(self, tmp_path: Path) -> None:
        """What is no ONNX is refused with the parser's words; a build without profile or strong types gives None."""
        library, bundle = trt.install(), write_network(tmp_path / "bundle")
        kit = plan.toolkit()
        builder = kit.trt.Builder(kit.logger)
        network, config = builder.create_network(2), builder.create_builder_config()
        assert kit.trt.OnnxParser(network, kit.logger).parse_from_file(str(bundle.folder / MODEL))
        assert builder.build_serialized_network(network, config) is None
        assert "optimization profile" in str(kit.journal)
        (bundle.folder / MODEL).write_bytes(b"no graph")
        with pytest.raises(BuildError, match="TensorRT cannot read"):
            TensorRtEngine(bundle, max_batch=2, precision="fp32")
        assert library.sim.counts().alive() == {}


@needs_sim
class TestMisuse:
    """What TensorRT forbids and a GPU does not notice is reported."""

    @isolated
    def test_one_context_on_two_streams(self, tmp_path: Path) -> None:
        """Runs of one context share its activations: on two streams they are a race."""
        trt.install()
        bundle = write_network(tmp_path)
        engine = TensorRtEngine(bundle, max_batch=MAX_BATCH, precision="fp32")
        one, two = engine.make_lane(), engine.make_lane()
        assert _races_of(one, two) == 0
        two._execution = one._execution
        assert _races_of(one, two) > 0

    @isolated
    def test_freed_while_it_runs(self, tmp_path: Path) -> None:
        """An engine or a context that is dropped under a queued run is a hazard."""
        trt.install()
        engine = TensorRtEngine(write_network(tmp_path), max_batch=MAX_BATCH, precision="fp32")
        lane: Any = engine.make_lane()
        lane.submit(1)
        lane._execution.close()
        assert load().counts().hazards == 1
        engine.close()
        assert load().counts().hazards == 2
        lane.close()


def _races_of(*lanes: TensorRtLane) -> int:
    load().reset()
    for lane in lanes:
        lane.submit(2)
    for lane in lanes:
        lane.wait(10)
    return load().counts().races
