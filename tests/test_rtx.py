"""Exported graphs before a real TensorRT parser and builder, TensorRT for RTX's, which needs no GPU to build for one.

It cannot run what it builds here: that numbers are right is the parity gate's to show, on the GPU itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from engines.build import BuildError
from engines.frames import Pixels
from engines.plan import PlanKey, Toolkit, build_plan, kit_of, profiles_for
from engines.precision import half_maker, int8_maker, scopes
from pipeline.simulator import GOOD, Simulator
from tests.support.network import SIDE, write_network
from train.export import Detector, Scales
from train.methods.adps import Adps, AdpsOptions
from train.methods.dmdd import Dmdd, DmddOptions
from train.onnx_export import to_onnx
from train.teacher import Teacher
from train.tiles import Tiling

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'dmdd-line[rtx]'")

MAX_BATCH = 4
CAPABILITIES = ("SM75", "SM86", "SM89", "SM120")
Make = Callable[[Teacher, tuple[int, int]], nn.Module]
METHODS: dict[str, Make] = {
    "dmdd": lambda teacher, size: Dmdd(teacher, size, DmddOptions(prototypes=16, dims=8)),
    "adps": lambda teacher, size: Adps(teacher, size, AdpsOptions(k=4)),
}
SIZES = {"small": (64, 64), "wide": (64, 128)}


@pytest.fixture(scope="module")
def kit() -> Toolkit:
    """The real library, with a logger of its own."""
    return kit_of(trt)


@pytest.fixture(scope="module", params=[(method, size) for method in METHODS for size in SIZES], ids="-".join)
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Any]:
    """One untrained method at one size, exported once: its graph in fp32, fp16 and int8, and the frame's shape."""
    method, size = request.param
    height, width = SIZES[size]
    torch.manual_seed(0)
    teacher = Teacher(strides=(4, 8, 16))
    model = METHODS[method](teacher, (height, width)).eval()
    count = len(model.weights)  # type: ignore[arg-type]
    scales = Scales((0.0,) * count, (1.0,) * count)
    folder = tmp_path_factory.mktemp("graphs")
    detector = Detector(teacher, model, scales, Tiling.of((height, width)))
    paths = {kind: folder / f"{kind}.onnx" for kind in ("fp32", "fp16", "int8")}
    paths["fp32"].write_bytes(to_onnx(detector, (height, width, 3), ("score", "heatmap")))
    groups = scopes(paths["fp32"])
    everything = frozenset(groups)
    paths["fp16"].write_bytes(half_maker(paths["fp32"], groups)(everything))
    paths["int8"].write_bytes(int8_maker(paths["fp32"], groups, _frames(height, width), folder)(everything))
    return paths, (height, width, 3)


def _frames(height: int, width: int) -> Pixels:
    simulator = Simulator("cap", width=width, height=height, seed=3)
    return np.stack([simulator.render(GOOD, np.random.default_rng(index)).image for index in range(2)])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.timeout(600)
def test_builds_for_every_gpu(kit: Toolkit, graphs: tuple[dict[str, Path], Any], precision: str) -> None:
    """Parsed and compiled strongly typed, for batches of 1 to 4 and of 2 alone, for four generations of GPUs."""
    paths, frame = graphs
    key = PlanKey("", trt.__version__, "", "", "", precision, frame, profiles_for(MAX_BATCH, exact=(2,)))
    plan = build_plan(kit, paths[precision], key, configure=_for(*CAPABILITIES))
    assert plan.nbytes > 100_000


def _for(*capabilities: str) -> Callable[[Any], None]:
    """Ask for a plan for GPUs that this machine has not got."""

    def configure(config: Any) -> None:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            assert config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)

    return configure


def test_progress_of_the_real_builder(kit: Toolkit, tmp_path: Path) -> None:
    """The real builder tells how far it is, and ends when a callback raises."""
    graph = write_network(tmp_path / "bundle").model
    key = PlanKey("", trt.__version__, "", "SM89", "", "fp32", (SIDE, SIDE, 3), profiles_for(2))
    told: list[tuple[str, int, int]] = []
    build_plan(kit, graph, key, progress=lambda *step: told.append(step), configure=_for("SM89"))
    assert told
    assert all(0 <= done <= total for _, done, total in told)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(kit, graph, key, progress=interrupt, configure=_for("SM89"))


def test_what_the_parser_does_not_know_is_refused_with_its_reason(kit: Toolkit, tmp_path: Path) -> None:
    """A graph with an unknown operator does not pass: the builder's own words are in the error."""
    model = onnx.load(write_network(tmp_path / "bundle").model)
    model.graph.node[4].op_type = "Unheard"
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    key = PlanKey("", trt.__version__, "", "SM89", "", "fp32", (SIDE, SIDE, 3), profiles_for(2))
    with pytest.raises(BuildError, match="Plugin not found"):
        build_plan(kit, tmp_path / "graph.onnx", key, configure=_for("SM89"))
