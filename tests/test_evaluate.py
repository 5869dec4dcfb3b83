"""``dmdd evaluate``: the compiled engine on labelled images, figures that can be foreseen, files that can be read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from engines.store import Store
from pipeline.cli import app
from tests.support.engine import SIDE, make_store
from tests.support.parts import write_part, write_parts
from train import data
from train.data import DataError
from train.evaluate import Evaluation, as_json, evaluate
from train.figures import Share
from train.metrics import PixelMetrics

QUIET = Console(file=io.StringIO())
FIGURES = {
    "engine", "images", "image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro",
    "aupro_0.05", "pro_per_image", "threshold", "good_rejected", "good_rejected_interval", "defects_caught",
    "defects_caught_interval", "latency_p50_ms", "latency_p99_ms", "classes",
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in which the brightness engine is active; its threshold is one half."""
    return make_store(tmp_path)


def evaluated(store: Store, folder: Path) -> Evaluation:
    """The engine on the parts in a folder."""
    return evaluate(store.get("bright"), data.labelled_samples(folder), "fp32", QUIET)


def run(store: Store, folder: Path, *options: str) -> None:
    """The command, as a user types it."""
    result = CliRunner().invoke(app, ["evaluate", "bright", str(folder), "--store", str(store.root), *options])
    assert result.exit_code == 0, result.output


def test_scores_verdicts_and_classes_are_those_of_the_engine(store: Store, tmp_path: Path) -> None:
    """The engine's score is the part's brightness; the counts follow from that, class by class."""
    found = evaluated(store, write_parts(tmp_path / "parts"))
    by_name = {s.path.stem: v * 255 for s, v in zip(found.samples, found.inspection.scores, strict=True)}
    wanted = {"a": 20, "b": 40, "c": 60, "d": 150, "e": 180, "f": 200, "g": 250, "h": 100, "i": 230}
    assert by_name == pytest.approx(wanted, abs=0.01)
    assert found.good_rejected == Share(1, 4)
    assert found.defects_caught == Share(4, 5)
    assert found.figures.classes["stain"].caught == Share(3, 3)
    assert found.figures.classes["dent"].caught == Share(1, 2)
    assert found.figures.values["image_auroc"] == pytest.approx(19 / 20)
    assert (found.inspection.seconds > 0).all()


def test_pixel_figures_compare_the_enlarged_heatmap_with_the_mask(store: Store, tmp_path: Path) -> None:
    """Measured anew from the heatmaps, at the size of the engine's input, without the images that have no mask."""
    found = evaluated(store, write_parts(tmp_path / "parts"))
    counted = PixelMetrics()
    for sample, heatmap in zip(found.samples, found.inspection.heatmaps, strict=True):
        if sample.label != "dent":
            mask = np.zeros((SIDE, SIDE), bool)
            mask[: SIDE // 2, : SIDE // 2] = sample.label == "stain"
            counted.add(cv2.resize(heatmap.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_LINEAR), mask)
    assert found.figures.values.items() >= counted.result().items()
    assert found.figures.values["pixel_ap"] == pytest.approx(0.25, abs=1e-6)


def test_json_names_every_figure_that_is_promised(store: Store, tmp_path: Path) -> None:
    """Every figure and every class, in JSON that any reader takes."""
    run(store, write_parts(tmp_path / "parts"), "--no-report", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    assert figures.keys() == FIGURES
    assert figures["images"] == 9
    assert figures["good_rejected"] == 0.25
    assert figures["good_rejected_interval"] == pytest.approx([0.0063, 0.8059], abs=1e-4)
    assert figures["classes"]["dent"] == {"images": 2, "masked": 0, "image_auroc": 0.875, "caught": 0.5}
    assert figures["classes"]["stain"]["pixel_ap"] == figures["pixel_ap"]


def test_what_is_not_defined_is_null(store: Store, tmp_path: Path) -> None:
    """Without a defective part there is no AUROC and no share caught: null, since NaN is not JSON."""
    write_part(tmp_path / "parts", "good", "a", 20)
    figures = json.loads(as_json(evaluated(store, tmp_path / "parts")), parse_constant=pytest.fail)
    assert figures["image_auroc"] is figures["defects_caught"] is None
    assert figures["good_rejected"] == 0
    assert figures["classes"] == {}
    assert "pixel_ap" not in figures


def test_the_report_goes_where_it_is_wanted(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default into the current folder, named after engine and version; elsewhere with --report; else nowhere."""
    parts = write_parts(tmp_path / "parts")
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    run(store, parts, "--no-report")
    assert set(tmp_path.iterdir()) == before
    run(store, parts, "--report", "other.html")
    run(store, parts)
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"other.html", "evaluation-bright-1.html"}


def test_the_output_says_what_the_figures_mean(store: Store, tmp_path: Path) -> None:
    """The figures by name, then good parts rejected and defects caught in a sentence each."""
    parts = write_parts(tmp_path / "parts")
    options = ["evaluate", "bright", str(parts), "--store", str(store.root), "--no-report"]
    output = " ".join(CliRunner().invoke(app, options).output.split())
    assert "pro_per_image" in output
    assert "Rejected 1 of 4 good parts (25%" in output
    assert "Caught 4 of 5 defective parts (80%" in output
    assert "dent: 1 of 2 caught" in output


def test_an_image_that_cannot_be_read_is_named(store: Store, tmp_path: Path) -> None:
    """The message names the file; nothing is measured without it."""
    parts = write_parts(tmp_path / "parts")
    (parts / "test/good/z.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"z\.png"):
        evaluated(store, parts)


def test_evaluation_and_report_need_no_torch(store: Store, tmp_path: Path) -> None:
    """The command works where the train extra is not installed."""
    parts = write_parts(tmp_path / "parts")
    script = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'timm', 'onnx', 'matplotlib'): sys.modules[name] = None\n"
        "from pipeline.cli import main; main()"
    )
    arguments = ["evaluate", "bright", str(parts), "--store", str(store.root), "--report", str(tmp_path / "r.html")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, cwd=tmp_path, env=environment, timeout=60)
    assert (tmp_path / "r.html").stat().st_size > 10_000
