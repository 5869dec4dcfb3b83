"""The papers' protocols: public layouts become ours, settings are the papers', figures stand beside figures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from benchmarks import layouts, papers
from benchmarks.layouts import kolektor, mvtec, visa
from benchmarks.papers import FIGURES, PUBLISHED, SETS, beside, settings
from train import data
from train.cell import engine_options
from train.compare import Cell, Measurement, Outcome
from train.data import DataError


def image(path: Path, *, defect: bool = False, mask: bool = False) -> Path:
    """A tiny image, or a mask whose first pixel is defective."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((8, 8), 0 if mask else 90, np.uint8)
    pixels[0, 0] = 3 if defect else pixels[0, 1]
    cv2.imwrite(str(path), pixels)
    return path


def write_visa(root: Path) -> Path:
    """VisA as it is published: images by label, the split in a table."""
    rows = []
    for name in ("candle", "pcb1"):
        for k, split in enumerate(("train", "train", "test")):
            image(root / name / "Data/Images/Normal" / f"{k}.JPG")
            rows.append((name, split, "normal", f"{name}/Data/Images/Normal/{k}.JPG", ""))
        image(root / name / "Data/Images/Anomaly/000.JPG")
        image(root / name / "Data/Masks/Anomaly/000.png", defect=True, mask=True)
        rows.append(
            (name, "test", "anomaly", f"{name}/Data/Images/Anomaly/000.JPG", f"{name}/Data/Masks/Anomaly/000.png")
        )
    (root / "split_csv").mkdir()
    with (root / "split_csv/1cls.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("object", "split", "label", "image", "mask"), *rows])
    return root


def write_kolektor(root: Path) -> Path:
    """KolektorSDD2: truth beside every image, defects in both splits."""
    for split, first in (("train", 10000), ("test", 20000)):
        for k in range(3):
            image(root / split / f"{first + k}.png")
            image(root / split / f"{first + k}_GT.png", defect=k == 0, mask=True)
    return root


def write_mvtec(root: Path) -> Path:
    """Two categories, and what else lies in the folder."""
    for name in ("bottle", "cable"):
        image(root / name / "train/good/0.png")
        image(root / name / "test/good/0.png")
        image(root / name / "test/crack/0.png")
        image(root / name / "ground_truth/crack/0_mask.png", defect=True, mask=True)
    (root / "readme.txt").write_text("licence")
    (root / "meta").mkdir()
    return root


def summary(folder: Path) -> tuple[int, list[tuple[str, bool]]]:
    """Good images to train on; class of each test image and whether its mask shows a defect."""
    samples = data.labelled_samples(folder)
    masked = [s.mask is not None and bool(data.load_mask(s.mask, 8, 8).any()) for s in samples]
    return len(data.good_images(folder)), [(s.label, m) for s, m in zip(samples, masked, strict=True)]


class TestLayouts:
    """Public data sets as `dmdd` reads them."""

    def test_mvtec_and_mpdd_are_read_as_they_are(self, tmp_path: Path) -> None:
        """Every category; or one, where its folder is given."""
        root = write_mvtec(tmp_path / "mvtec")
        found = mvtec(root, tmp_path / "links")
        assert [folder.name for folder in found] == ["bottle", "cable"]
        assert mvtec(root / "cable", tmp_path) == [root / "cable"]
        assert summary(found[0]) == (1, [("crack", True), ("good", False)])
        assert not (tmp_path / "links").exists()

    def test_visa_by_its_own_split(self, tmp_path: Path) -> None:
        """The table says what is trained on; masks of small values are masks."""
        found = visa(write_visa(tmp_path / "visa"), tmp_path / "links")
        assert [folder.name for folder in found] == ["candle", "pcb1"]
        assert summary(found[0]) == (2, [("defect", True), ("good", False)])

    def test_visa_as_its_authors_script_splits_it(self, tmp_path: Path) -> None:
        """That is MVTec's layout, below ``1cls`` or not."""
        write_mvtec(tmp_path / "visa" / "1cls")
        assert len(visa(tmp_path / "visa", tmp_path)) == len(visa(tmp_path / "visa" / "1cls", tmp_path)) == 2

    def test_kolektor_learns_from_good_images_alone(self, tmp_path: Path) -> None:
        """Truth is no image; defective images of the training part are left out."""
        (found,) = kolektor(write_kolektor(tmp_path / "k"), tmp_path / "links")
        assert summary(found) == (2, [("defect", True), ("good", False), ("good", False)])

    def test_links_are_made_anew(self, tmp_path: Path) -> None:
        """An image that has left the data set has left its links, too."""
        root = write_kolektor(tmp_path / "k")
        (found,) = kolektor(root, tmp_path / "links")
        (root / "train" / "10002.png").unlink()
        (again,) = kolektor(root, tmp_path / "links")
        assert found == again
        assert summary(again)[0] == 1

    def test_what_is_no_data_set_is_refused(self, tmp_path: Path) -> None:
        """Each layout says what it expected."""
        (tmp_path / "empty").mkdir()
        for layout in (mvtec, visa, kolektor):
            with pytest.raises(DataError, match=r"expected|no good images"):
                layout(tmp_path / "empty", tmp_path / "links")

    def test_what_is_incomplete_is_refused(self, tmp_path: Path) -> None:
        """A file that the split names and a truth that is gone are found before any training."""
        root = write_visa(tmp_path / "visa")
        (root / "candle/Data/Masks/Anomaly/000.png").unlink()
        with pytest.raises(DataError, match="unpack"):
            visa(root, tmp_path / "links")
        (write_kolektor(tmp_path / "k") / "test/20001_GT.png").unlink()
        with pytest.raises(DataError, match="20001_GT"):
            kolektor(tmp_path / "k", tmp_path / "links")

    def test_another_table_is_refused(self, tmp_path: Path) -> None:
        """Its columns are named."""
        (tmp_path / "split_csv").mkdir()
        (tmp_path / "split_csv/1cls.csv").write_text("a,b\n1,2\n")
        with pytest.raises(DataError, match="object, split, label"):
            visa(tmp_path, tmp_path / "links")


class TestProtocols:
    """What is trained, and what is printed."""

    def test_settings_are_the_papers(self) -> None:
        """Backbone, size, batch, rate and length; the steps of 300 epochs follow from the images."""
        dmdd = settings("dmdd", 200, 0)
        assert (dmdd["backbone"], dmdd["size"], dmdd["batch"], dmdd["steps"]) == ("wide_resnet50_2", "256", 16, 5000)
        adps = settings("adps", 209, 0)
        assert (adps["batch"], adps["rate"], adps["steps"]) == (32, 1e-4, 300 * 7)
        assert settings("adps", 209, 50)["steps"] == settings("dmdd", 209, 50)["steps"] == 50

    @pytest.mark.parametrize("method", ["dmdd", "adps"])
    def test_settings_are_options_that_exist(self, method: str) -> None:
        """Training takes them."""
        options = engine_options(method, settings(method, 100, 0))
        assert (options.size, options.strides) == ((256, 256), (4, 8, 16))
        assert options.choices == ({"k": 8} if method == "adps" else {})

    def test_published_figures_have_counterparts(self) -> None:
        """Every claim is of a data set that can be run, and stands beside a figure that is measured."""
        for claim in PUBLISHED:
            assert claim.dataset in SETS
            assert set(claim.ours) <= set(FIGURES)

    def test_figures_stand_side_by_side(self) -> None:
        """Mean over categories, each the mean of its seeds; the claim where there is one; what is missing is told."""
        cell = Cell("f", "bottle", "dmdd", "dmdd", 0, {}, "d")
        base = Measurement(
            cell=cell, created="2026-01-01", code={}, figures={}, train_seconds=1.0, gmacs=None, megabytes=None,
            images={}, about={},
        )  # fmt: skip
        outcomes = []
        for dataset, value in (("bottle", 0.9), ("bottle", 1.0), ("cable", 0.75)):
            place = msgspec.structs.replace(cell, dataset=dataset)
            result = msgspec.structs.replace(base, cell=place, figures={"pixel_auroc": value, "pro_per_image": None})
            outcomes.append(Outcome(place, result))
        text = beside("dmdd", "mvtec", [*outcomes, Outcome(cell, None, "x")])
        rows = {line.split(" | ")[0].lstrip("| "): line for line in text.splitlines() if line.startswith("|")}
        assert rows[FIGURES["pixel_auroc"]].endswith("| 85.00 | 98.85 (pixel AUROC) |")
        assert rows[FIGURES["pro_per_image"]].endswith("| - | 96.13 (PRO) |")
        assert rows[FIGURES["aupro"]].endswith("| - | 96.13 (PRO) |")
        assert rows[FIGURES["image_auroc"]].endswith("| - | - |")
        assert "2 categories, 1 cells MISSING" in text

    def test_the_command_runs_every_category(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """From the folder to the two tables; the training itself is another test's."""
        seen: list[Cell] = []

        def measured(cells: list[Cell], out: Path, **_: Any) -> list[Outcome]:
            seen.extend(cells)
            out.mkdir(parents=True, exist_ok=True)
            return [Outcome(cell, None, "not run") for cell in cells]

        monkeypatch.setattr(papers, "run", measured)
        weights = tmp_path / "w.pth"
        weights.touch()
        words = ["visa", str(write_visa(tmp_path / "visa")), "--out", str(tmp_path / "out"), "--seeds", "2"]
        assert papers.main([*words, "--weights", str(weights)]) == 1
        assert [(cell.dataset, cell.seed) for cell in seen] == [("candle", 0), ("candle", 1), ("pcb1", 0), ("pcb1", 1)]
        assert seen[0].options["weights"] == str(weights)
        assert (tmp_path / "out" / "visa-dmdd.md").read_text() == capsys.readouterr().out
        assert (tmp_path / "out" / "visa-dmdd.json").is_file()

    def test_an_error_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """With what was expected."""
        with pytest.raises(SystemExit) as ended:
            papers.main(["mvtec", str(tmp_path), "--out", str(tmp_path / "out")])
        assert ended.value.code == 2
        assert "expected CATEGORY/train/good" in capsys.readouterr().err

    def test_every_layout_is_used(self) -> None:
        """No adapter without a protocol."""
        assert {layout for _, layout in SETS.values()} == {layouts.mvtec, layouts.visa, layouts.kolektor}
