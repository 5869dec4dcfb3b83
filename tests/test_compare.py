"""Comparisons: each cell measured once by a process of its own, whatever happens, and one honest table."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from engines import bundle as bundles
from engines.bundle import Bundle
from engines.frames import InputSpec
from pipeline.cli import app
from pipeline.demo import ENGINE
from train import commands, compare
from train.cell import code_digests, engine_options, measure, size_of
from train.commands import Options
from train.compare import ROOT, Cell, ComparisonError, Measurement, Outcome, Task, Variant, plan, run, stored, variants
from train.comparison import Spread, as_json, markdown, rows_of
from train.data import DataError, labelled_samples
from train.evaluate import evaluate
from train.macs import graph_macs
from train.onnx_export import to_onnx

FAKE = "tests.support.contenders:Brightness"
SIDE = 64


def write(path: Path, image: np.ndarray) -> None:
    """An image file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def write_set(root: Path, *, masks: bool = True, level: int = 40) -> Path:
    """Gray parts of one level with a little texture; defects are bright squares."""
    rng = np.random.default_rng(5)

    def part() -> np.ndarray:
        return rng.integers(level - 4, level + 5, (SIDE, SIDE), np.uint8)

    for index in range(4):
        write(root / "train" / "good" / f"{index}.png", part())
        write(root / "test" / "good" / f"{index}.png", part())
        defective, mask = part(), np.zeros((SIDE, SIDE), np.uint8)
        defective[8 : 16 + index, 8:20], mask[8 : 16 + index, 8:20] = level + 60, 255
        write(root / "test" / "dent" / f"{index}.png", defective)
        if masks:
            write(root / "ground_truth" / "dent" / f"{index}_mask.png", mask)
    return root


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled data set of twelve tiny images, seen by all and changed by none."""
    return write_set(tmp_path_factory.mktemp("data") / "parts")


def cells(*folders: Path, seeds: int = 1, **options: Any) -> list[Cell]:
    """A plan for the fake method."""
    return plan(folders, [(Variant("fake", FAKE, options), {"size": str(SIDE)})], seeds)


def silent(_: str) -> None:
    """Say nothing."""


def results(outcomes: list[Outcome]) -> list[Measurement]:
    """The results of outcomes that all have one."""
    found = [outcome.result for outcome in outcomes if outcome.result is not None]
    assert len(found) == len(outcomes), [outcome.problem for outcome in outcomes]
    return found


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that has to come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(process: int) -> bool:
    """Whether a process still runs, the dead that nobody has asked for apart."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestVariants:
    """What a user writes after ``--methods``."""

    def test_names_and_options(self) -> None:
        """Options stand in brackets, and commas within them do not end a method."""
        found = variants("dmdd, dmdd[steps=30,rate=1e-3] ,patchcore[coreset=0.01],my.module:Class")
        assert [v.label for v in found] == [
            "dmdd",
            "dmdd[steps=30,rate=1e-3]",
            "patchcore[coreset=0.01]",
            "my.module:Class",
        ]
        assert [v.method for v in found] == ["dmdd", "dmdd", "patchcore", "my.module:Class"]
        assert found[1].options == {"steps": "30", "rate": "1e-3"}
        assert [bool(v.contender) for v in found] == [False, False, True, True]

    @pytest.mark.parametrize("text", ["", " , ", "dmdd[steps]", "dmdd[=3]", "dmdd[a=1", "dmdd,dmdd", "dm dd"])
    def test_what_is_no_list_of_methods_is_refused(self, text: str) -> None:
        """The message shows what was not understood."""
        with pytest.raises(ComparisonError, match="method"):
            variants(text)

    def test_peers_are_classes_that_exist(self) -> None:
        """Every peer's class stands in its module, whether or not its library is installed."""
        for place in compare.PEERS.values():
            module, _, name = place.partition(":")
            tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


class TestPlan:
    """Which cells there are, and what makes one another."""

    def test_every_method_on_every_set_with_every_seed(self, parts: Path, tmp_path: Path) -> None:
        """Sets first, then methods, then seeds; each cell has a name of its own."""
        other = write_set(tmp_path / "others")
        asked = [(Variant("a", FAKE, {}), {}), (Variant("b", FAKE, {"noise": "1"}), {"size": "64"})]
        planned = plan([parts, other], asked, 2)
        assert [(c.dataset, c.label, c.seed) for c in planned] == [
            (dataset, label, seed) for dataset in ("parts", "others") for label in "ab" for seed in (0, 1)
        ]
        assert len({cell.name for cell in planned}) == 8
        assert planned[2].options == {"size": "64", "noise": "1"}

    def test_what_decides_a_result_decides_its_name(self, parts: Path) -> None:
        """Seed, method, options and the data's content; not the label, not where the data lie."""
        (cell,) = cells(parts)
        others = [{"seed": 1}, {"method": "x:Y"}, {"options": {}}, {"data_sha256": "0"}, {"dataset": "z"}]
        names = {msgspec.structs.replace(cell, **other).name for other in others}
        assert len(names | {cell.name}) == len(others) + 1
        assert msgspec.structs.replace(cell, label="x", folder="y").name == cell.name

    def test_a_mask_that_was_redrawn_is_other_data(self, tmp_path: Path) -> None:
        """A result for other truth is not taken for one of this."""
        root = write_set(tmp_path / "parts")
        (before,) = cells(root)
        write(root / "ground_truth" / "dent" / "0_mask.png", np.full((SIDE, SIDE), 255, np.uint8))
        (after,) = cells(root)
        assert before.digest != after.digest

    def test_sets_of_one_name_are_refused(self, parts: Path, tmp_path: Path) -> None:
        """Their rows could not be told apart."""
        with pytest.raises(ComparisonError, match="rename"):
            cells(parts, write_set(tmp_path / "parts"))

    def test_a_folder_without_labels_is_refused(self, tmp_path: Path) -> None:
        """Before anything is trained."""
        with pytest.raises(DataError, match="expected test/good"):
            cells(tmp_path)


class TestRun:
    """Cells in processes of their own."""

    def test_a_cell_is_measured_and_written(self, parts: Path, tmp_path: Path) -> None:
        """Bright squares are found perfectly; the file says on what, how, by which code and at which cost."""
        (cell,) = cells(parts, color="blue")
        (result,) = results(run([cell], tmp_path, say=silent))
        for name in ("image_auroc", "image_ap", "pixel_auroc", "aupro"):
            assert result.figures[name] == pytest.approx(1.0)
        assert result.images == {"train": 4, "good": 4, "defective": 4}
        assert (result.gmacs, result.megabytes) == (0.25, 1.5)
        assert result.train_seconds is not None
        assert result.train_seconds < 60
        assert result.about["told"] == {"color": "blue"}
        assert {"train/figures.py", "engines/frames.py"} <= set(result.code)
        assert stored(cell, tmp_path) == result
        assert (tmp_path / "cells" / f"{cell.name}.json").is_file()

    def test_without_masks_there_are_image_figures_alone(self, tmp_path: Path) -> None:
        """What cannot be measured is left out, not invented."""
        (result,) = results(run(cells(write_set(tmp_path / "bare", masks=False)), tmp_path, say=silent))
        assert result.figures["image_auroc"] == 1.0
        assert "pixel_auroc" not in result.figures

    def test_what_is_measured_is_kept(self, parts: Path, tmp_path: Path) -> None:
        """The same command measures only what is missing or damaged, and all of it when told so."""
        trace = tmp_path / "trace"
        planned = cells(parts, seeds=3, noise="30", trace=str(trace))

        def measured() -> int:
            before = len(trace.read_text().splitlines()) if trace.exists() else 0
            results(run(planned, tmp_path, say=silent))
            return len(trace.read_text().splitlines()) - before

        assert measured() == 3
        assert measured() == 0
        (tmp_path / "cells" / f"{planned[0].name}.json").unlink()
        (tmp_path / "cells" / f"{planned[1].name}.json").write_text('{"cell": {')
        assert measured() == 2
        assert [o.result is not None for o in run(planned, tmp_path, fresh=True, say=silent)] == [True] * 3
        assert len(trace.read_text().splitlines()) == 8

    def test_a_failure_costs_its_own_cell_alone(self, parts: Path, tmp_path: Path) -> None:
        """The others are measured; the reason and the log are named; the next run tries again."""
        said: list[str] = []
        planned = cells(parts, seeds=3, fail_seed="1")
        outcomes = run(planned, tmp_path, say=said.append)
        assert [outcome.result is None for outcome in outcomes] == [False, True, False]
        assert "the lamp | is broken" in outcomes[1].problem
        assert str(tmp_path / "logs") in outcomes[1].problem
        assert "FAILED" in said[1]
        assert len(said) == 3
        text = markdown(outcomes)
        assert "**Missing:** parts, fake, seed 1" in text
        assert rows_of(outcomes)[0].seeds == [0, 2]

    def test_two_at_a_time_share_the_cpus(self, parts: Path, tmp_path: Path) -> None:
        """Both run at once, on CPUs of their own where there are enough."""
        trace, hold = tmp_path / "trace", tmp_path / "go"
        planned = cells(parts, seeds=2, trace=str(trace), hold=str(hold))

        def both_run() -> bool:
            return trace.exists() and len(trace.read_text().splitlines()) == 2

        opener = threading.Thread(target=lambda: (until(both_run), hold.touch()))
        opener.start()
        found = results(run(planned, tmp_path, jobs=2, say=silent))
        opener.join()
        every = os.sched_getaffinity(0)
        one, other = (set(result.about["affinity"]) for result in found)
        if len(every) > 1:
            assert one | other == every
            assert not one & other
        assert [int(r.about["threads"]) <= len(r.about["affinity"]) for r in found] == [True, True]

    @pytest.mark.timeout(120)
    def test_killed_it_leaves_nothing_behind_and_goes_on(self, parts: Path, tmp_path: Path) -> None:
        """After SIGKILL its process ends too; the same command keeps what was done and does the rest."""
        trace, hold, out = tmp_path / "trace", tmp_path / "go", tmp_path / "out"
        method = f"{FAKE}[trace={trace},hold={hold}]"
        command = [sys.executable, "-m", "pipeline", "compare", str(parts), "--methods", method, "--seeds", "2"]
        command += ["--size", str(SIDE), "--out", str(out)]
        hold.touch()
        first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert first.stderr is not None
        with first:
            assert "1 of 2" in first.stderr.readline()
            hold.unlink()
            until(lambda: len(trace.read_text().splitlines()) == 2)
            first.send_signal(signal.SIGKILL)
        child = int(trace.read_text().splitlines()[-1])
        until(lambda: not alive(child))
        (kept,) = (out / "cells").iterdir()
        written = kept.stat().st_mtime_ns
        hold.touch()
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        assert "1 of 2: parts" in second.stderr
        assert "kept" in second.stderr.splitlines()[0]
        assert kept.stat().st_mtime_ns == written
        assert len(list((out / "cells").iterdir())) == 2
        assert "| parts | " in second.stdout


class TestOwnMethods:
    """A method of this project is measured as the engine that it becomes."""

    def test_an_engine_is_trained_and_measured(
        self, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was asked for is what is trained; figures, cost and settings are those of the bundle, which stays."""
        asked: list[Any] = []

        def build(folder: Path, method: str, name: str, options: Options, work: Path, target: Path, _: Any) -> Bundle:
            asked.extend([folder, method, name, options, work])
            shutil.copytree(ENGINE, target)
            return bundles.load(target)

        monkeypatch.setattr(commands, "build_bundle", build)
        (cell,) = plan([parts], [(Variant("dmdd", "dmdd", {"steps": "7"}), {"size": "128"})], 1)
        cell = msgspec.structs.replace(cell, seed=3)
        task = Task(cell, str(tmp_path / "x.json"), str(tmp_path / "work"), [0])
        result = measure(task)
        assert asked == [parts, "dmdd", "parts", Options(steps=7, size=(128, 128), seed=3), tmp_path / "work"]
        bundle = bundles.load(tmp_path / "work" / "bundle")
        figures = evaluate(bundle, labelled_samples(parts), "fp32", Console(file=io.StringIO())).figures.values
        assert result.figures == pytest.approx(figures)
        assert {"image_auroc", "pixel_ap", "pro_per_image"} <= set(figures)
        assert result.megabytes == bundle.model.stat().st_size / 1e6
        assert result.gmacs == graph_macs(bundle.model) / 1e9 > 0.1
        assert result.train_seconds is not None
        assert result.about["backbone"] == bundle.manifest.training.backbone
        assert measure(task).train_seconds is None, "a run that was taken up again has no training time"

    def test_an_unknown_method_or_option_is_refused(self, parts: Path, tmp_path: Path) -> None:
        """The message names those that there are."""
        for method, options, message in [
            ("dmd", {}, "dmdd"),
            ("dmdd", {"step": "3"}, "steps"),
            (FAKE, {"seed": 3}, "seed"),
        ]:
            (cell,) = plan([parts], [(Variant("x", method, options), {})], 1)
            with pytest.raises(ComparisonError, match=message):
                measure(Task(cell, str(tmp_path / "x"), str(tmp_path / "work"), [0]))

    def test_options_in_words_become_values(self) -> None:
        """Numbers, pairs, tuples, paths; what is the method's own goes to the method, with its letters as they are."""
        text = {"size": "320x64", "steps": "9", "rate": "1e-3", "strides": "4+8", "weights": "a/b.pth", "seed": 3}
        wanted = Options(size=(320, 64), steps=9, rate=1e-3, strides=(4, 8), weights=Path("a/b.pth"), seed=3)
        assert engine_options("dmdd", text) == wanted
        assert engine_options("dmdd", {}) == Options()
        own = engine_options("adps", {"k": "4", "split_after": "input+s1", "steps": "5"})
        assert own == Options(steps=5, choices={"k": "4", "split_after": "input+s1"})
        with pytest.raises(ComparisonError, match="steps"):
            engine_options("dmdd", {"steps": "many"})

    @pytest.mark.parametrize(("text", "size"), [("256", (256, 256)), (128, (128, 128)), ("320x64", (320, 64))])
    def test_sizes(self, text: Any, size: tuple[int, int]) -> None:
        """Width first."""
        assert size_of(text) == size_of(size) == size

    def test_no_size(self) -> None:
        """Words that are no size are refused."""
        with pytest.raises(ComparisonError, match="WIDTHxHEIGHT"):
            size_of("large")


class TestTable:
    """What stands in the table."""

    @pytest.fixture
    def outcomes(self, parts: Path) -> list[Outcome]:
        """Two methods, three seeds, made up."""
        made = []
        for label, values in (("steady", (0.8, 0.8, 0.8)), ("wild", (0.6, 0.75, 0.9))):
            for seed, value in enumerate(values):
                (cell,) = plan([parts], [(Variant(label, FAKE, {"noise": "1"}), {})], 1)
                cell = msgspec.structs.replace(cell, seed=seed)
                figures = {"image_auroc": value, "pixel_ap": None}
                result = Measurement(
                    cell=cell,
                    created="2026-01-02T03:04:05+00:00",
                    code={"train/a.py": "1"},
                    figures=figures,
                    train_seconds=None if seed else 12.0,
                    gmacs=0.5,
                    megabytes=None,
                    images={},
                    about={"torch": "2", "cpus": 2},
                )
                made.append(Outcome(cell, result))
        return made

    def test_mean_and_range(self, outcomes: list[Outcome]) -> None:
        """The best mean is bold; what is not defined is a dash; the costs follow."""
        steady, wild = (line for line in markdown(outcomes).splitlines() if line.startswith("| parts"))
        assert steady.startswith("| parts | steady | 3 | **0.800** (0.800 to 0.800) | - |")
        assert wild.startswith("| parts | wild | 3 | 0.750 (0.600 to 0.900) | - |")
        assert wild.endswith("| 12 | 0.50 | - |")

    def test_every_line_has_all_columns(self, outcomes: list[Outcome]) -> None:
        """Whatever a message or a name holds, the table stays a table."""
        odd = replace(outcomes[0], result=None, problem="a | b\nc")
        lines = [line for line in markdown([odd, *outcomes]).splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        assert "a \\| b c" in markdown([odd])

    def test_json_has_rows_and_cells(self, outcomes: list[Outcome]) -> None:
        """Mean, range and sample standard deviation, and every cell."""
        document = json.loads(as_json([*outcomes, Outcome(outcomes[0].cell, None, "broken")]))
        spread = document["rows"][1]["figures"]["image_auroc"]
        assert spread == {
            "mean": pytest.approx(0.75),
            "least": 0.6,
            "largest": 0.9,
            "deviation": pytest.approx(0.15),
            "count": 3,
        }
        assert len(document["cells"]) == 6
        assert document["missing"][0]["problem"] == "broken"

    def test_one_seed_has_no_deviation(self) -> None:
        """A spread of one value is not zero; of none it is nothing."""
        one = Spread.of([0.5, None, float("nan")])
        assert one is not None
        assert (one.mean, one.count) == (0.5, 1)
        assert np.isnan(one.deviation)
        assert Spread.of([None, float("nan")]) is None

    def test_code_that_changed_is_told(self, outcomes: list[Outcome]) -> None:
        """Cells of two states of the code are not passed off as one comparison."""
        assert "changed" not in markdown(outcomes)
        first = outcomes[0].result
        assert first is not None
        changed = replace(outcomes[0], result=msgspec.structs.replace(first, code={"train/a.py": "2"}))
        assert "**The code changed between cells** (train/a.py)" in markdown([changed, *outcomes[1:]])

    def test_source_files_are_known_by_their_content(self) -> None:
        """Of this project's modules those that are imported, by path."""
        found = code_digests()
        assert {"train/cell.py", "train/compare.py", "pipeline/cli.py"} <= set(found)
        assert all(len(digest) == 64 for digest in found.values())


class TestCommand:
    """``dmdd compare``."""

    def test_it_writes_and_prints_the_table(self, parts: Path, tmp_path: Path) -> None:
        """Exit code 0 when every cell has a result, 1 when one has none."""
        words = ["compare", str(parts), "--size", str(SIDE), "--seeds", "2", "--out", str(tmp_path), "--methods"]
        whole = CliRunner().invoke(app, [*words, f"{FAKE}[noise=3]"])
        assert whole.exit_code == 0, whole.output
        assert (tmp_path / "comparison.md").read_text().strip() in whole.output
        assert len(json.loads((tmp_path / "comparison.json").read_text())["cells"]) == 2
        assert CliRunner().invoke(app, [*words, f"{FAKE}[fail_seed=1]"]).exit_code == 1

    @pytest.mark.skipif(find_spec("anomalib") is not None, reason="the peers are installed here")
    def test_peers_that_are_not_installed_are_named(self, parts: Path) -> None:
        """Before anything is trained, with what to install."""
        found = CliRunner().invoke(app, ["compare", str(parts), "--methods", "dmdd,padim"])
        assert "pip install 'dmdd-line[peers]'" in str(found.exception)


class TestMacs:
    """Multiply-accumulates of a graph."""

    def test_they_are_torchs_own_count(self, tmp_path: Path) -> None:
        """Plain, strided, grouped and transposed convolutions and a matrix product."""
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.Conv2d(8, 8, 5, padding=2, groups=4),
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 6, 2, stride=2),
            nn.Flatten(2),
            nn.Linear(32 * 32, 10),
        ).eval()

        class Whole(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, frames: torch.Tensor) -> torch.Tensor:
                return self.net(frames.float().permute(0, 3, 1, 2))

        with FlopCounterMode(display=False) as counter:
            Whole()(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
        (tmp_path / "net.onnx").write_bytes(to_onnx(Whole(), (32, 32, 3), ["y"]))
        assert graph_macs(tmp_path / "net.onnx") == counter.get_total_flops() // 2

    def test_an_unknown_shape_is_no_zero(self, tmp_path: Path) -> None:
        """What cannot be counted is an error."""
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        weight = helper.make_tensor_value_info("w", TensorProto.FLOAT, ["k", 4])
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "k"]), weight]
        graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
        onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
        with pytest.raises(ValueError, match="not known"):
            graph_macs(tmp_path / "g.onnx")


@pytest.mark.skipif(find_spec("anomalib") is None, reason="needs the `peers` extra")
class TestPeers:
    """Models of another library on our teacher."""

    SIZE = 256
    SPEC = InputSpec(SIZE, SIZE, 3, "bgr")

    @pytest.fixture(params=["PatchCore", "Padim", "SuperSimpleNet"])
    def peer(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Each peer, without a network."""
        import socket

        from benchmarks import peers

        def refuse(*_: object) -> None:
            raise AssertionError("a peer wants the network")

        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        options: dict[str, Any] = {"steps": 3, "batch": 2} if request.param == "SuperSimpleNet" else {}
        return getattr(peers, request.param)(self.SPEC, 0, **options)

    def test_it_sees_what_the_teacher_sees(self, peer: Any) -> None:
        """Weights and normalisation are the teacher's: the same features of the same frames."""
        frames = np.random.default_rng(0).integers(0, 256, (2, self.SIZE, self.SIZE, 3), np.uint8)
        teacher = peer._teacher(torch.from_numpy(frames))
        extractor = next(m for m in peer._model.modules() if type(m).__name__ == "TimmFeatureExtractor")
        found = extractor(peer._images(frames))
        for wanted, got in zip(teacher, found.values(), strict=True):
            assert torch.allclose(wanted, got, atol=1e-4)

    def test_it_learns_and_finds(self, peer: Any) -> None:
        """Shapes are right; what was fitted tells good parts from a part with a bright square."""
        rng = np.random.default_rng(1)
        good = rng.integers(36, 45, (8, self.SIZE, self.SIZE, 3), np.uint8)
        bad = good[:2].copy()
        bad[:, 64:160, 64:160] = 220
        peer.fit(good)
        scores, maps = peer.predict(np.concatenate([good[:2], bad]))
        assert maps.shape == (4, self.SIZE, self.SIZE)
        assert scores.shape == (4,)
        assert np.isfinite(maps).all()
        if type(peer).__name__ != "SuperSimpleNet":  # three steps teach it nothing
            assert scores[2:].min() > scores[:2].max()
            assert maps[2:, 80:144, 80:144].mean() > maps[2:, 192:, 192:].mean()
        facts = peer.facts()
        assert facts.gmacs is not None
        assert facts.gmacs > 0.01

    def test_a_seed_is_reproducible(self) -> None:
        """The same coreset from the same seed."""
        from benchmarks.peers import PatchCore

        good = np.random.default_rng(2).integers(0, 256, (3, self.SIZE, self.SIZE, 3), np.uint8)
        banks = []
        for _ in range(2):
            peer = PatchCore(self.SPEC, 7, coreset="0.1")
            peer.fit(good)
            banks.append(peer._model.memory_bank)
        assert torch.equal(*banks)
        assert len(banks[0]) == int(0.1 * 3 * (self.SIZE // 8) ** 2)
