"""The report: one file that loads nothing, shows the worst errors, says what was counted, escapes what it is told."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from engines import bundle as bundles
from engines.bundle import Bundle
from tests.support.engine import SIDE, make_store, write_bundle
from tests.support.parts import write_part, write_parts
from train import charts, data
from train.charts import percent
from train.evaluate import Evaluation, evaluate
from train.figures import ClassFigures, Share
from train.gallery import choices
from train.markup import page, tag
from train.pictures import OUTLINE, heated, part_pictures
from train.report import render, write
from train.wording import caught_sentence, good_sentence

QUIET = Console(file=io.StringIO())
VOID = {"meta", "img", "br", "link", "input"}


class Reader(HTMLParser):
    """What a browser would make of a page: elements in order, with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += " ".join(data.split()) + " "

    def all(self, name: str) -> list[dict[str, str]]:
        """Attributes of every element of that name."""
        return [attributes for element, attributes in self.elements if element == name]


@pytest.fixture
def engine(tmp_path: Path) -> Bundle:
    """The brightness engine."""
    return make_store(tmp_path).get("bright")


def evaluated(engine: Bundle, folder: Path) -> Evaluation:
    """The engine on the parts in a folder."""
    return evaluate(engine, data.labelled_samples(folder), "fp32", QUIET)


def texts(element: Element) -> list[str]:
    """Every text in a drawing."""
    return [e.text or "" for e in element.iter("text")]


class TestReport:
    """The whole page."""

    def test_it_is_one_file_that_loads_nothing(self, engine: Bundle, tmp_path: Path) -> None:
        """No script, no link, no address: pictures are inside, and the policy forbids the browser anything else."""
        write(evaluated(engine, write_parts(tmp_path / "parts")), "parts", tmp_path / "r.html")
        text = (tmp_path / "r.html").read_text()
        found = Reader(text)
        assert not found.open
        assert not {name for name, _ in found.elements} & {"script", "link", "iframe", "a", "object", "image", "use"}
        assert not re.search(r"https?:|url\(|@import|\bon\w+=", text)
        assert all(image["src"].startswith("data:image/jpeg;base64,") for image in found.all("img"))
        (policy,) = (meta for meta in found.all("meta") if "http-equiv" in meta)
        assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

    def test_it_says_what_was_counted(self, engine: Bundle, tmp_path: Path) -> None:
        """Shares with their intervals, every figure, every class, the engine's facts, in text that can be read."""
        evaluation = evaluated(engine, write_parts(tmp_path / "parts"))
        text = Reader(render(evaluation, "parts")).text
        for said in (
            "Engine bright@1 on parts",
            "Rejected 1 of 4 good parts (25%; 95% interval 0.6% to 81%). The declared rate of 1% lies within that",
            "Caught 4 of 5 defective parts (80%; 95% interval 28% to 99.5%). Missed 1, all of them dent.",
            "in 95.0% of cases",
            "mean brightness above one half",
            engine.digest,
            "2 defective images have no mask there",
        ):
            assert said in text
        for name in ("Image AUROC", "Image F1-max", "Pixel AP", "AUPRO@0.3", "AUPRO@0.05", "PRO per image"):
            assert name in text
        assert re.search(r"dent 1 of 2 \(50%\) 0\.875 - - 0 ", text)
        assert f"{evaluation.figures.values['aupro']:.3f}" in text

    def test_what_comes_from_outside_is_escaped(self, tmp_path: Path) -> None:
        """Names of files, classes, data sets and engines are text, whatever is in them."""
        hostile = '<img src=x onerror="alert(1)">&amp;'
        written = write_bundle(tmp_path / "b", name=hostile)
        for label, level in (("good", 40), (hostile, 200)):
            write_part(tmp_path / "parts", label, hostile, level)
        found = Reader(render(evaluated(written, tmp_path / "parts"), hostile))
        assert {frozenset(image) for image in found.all("img")} == {frozenset({"src", "alt", "loading"})}
        assert f"Engine {hostile}@{written.version} on {hostile}" in found.text
        assert f"{hostile}/{hostile}.png" in found.text
        assert not found.open

    def test_a_name_that_is_no_unicode_does_not_stop_it(self, engine: Bundle, tmp_path: Path) -> None:
        """File names are bytes on Linux: those that are no UTF-8 are shown with a mark in their place."""
        write_part(tmp_path / "parts", "good", "a\udcff", 40)
        write(evaluated(engine, tmp_path / "parts"), "parts", tmp_path / "r.html")
        assert "good/a?.png" in (tmp_path / "r.html").read_text()

    def test_without_defects_or_masks_it_says_what_is_not_known(self, engine: Bundle, tmp_path: Path) -> None:
        """No curve is drawn of nothing, and the text says why."""
        write_part(tmp_path / "parts", "good", "a", 40)
        found = Reader(render(evaluated(engine, tmp_path / "parts"), "parts"))
        assert "what the engine catches is not known" in found.text
        assert "nothing is known of where the engine sees defects" in found.text
        assert len(found.all("svg")) == 2
        write_part(tmp_path / "parts", "dent", "b", 200)
        assert len(Reader(render(evaluated(engine, tmp_path / "parts"), "parts")).all("svg")) == 3

    @pytest.mark.timeout(60)
    def test_it_stays_small_however_many_and_however_large_the_images(self, engine: Bundle, tmp_path: Path) -> None:
        """Forty large images of noise, the worst that JPEG can be given, make a file under five megabytes."""
        rng = np.random.default_rng(0)
        for k in range(40):
            folder = tmp_path / "parts/test" / ("good" if k % 2 else "dent")
            folder.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (320, 320, 3), dtype=np.uint8) // (1 + k // 2 % 2 * 2)
            cv2.imwrite(str(folder / f"{k}.png"), noise)
        write(evaluated(engine, tmp_path / "parts"), "parts", tmp_path / "r.html")
        assert 1e6 < (tmp_path / "r.html").stat().st_size < 5e6

    def test_the_threshold_is_shown_with_its_evidence(self, engine: Bundle, tmp_path: Path) -> None:
        """What it was calibrated on, when, and what spoke against it, where the manifest says so."""
        evidence = {"source": "line1, early shift", "calibrated": "2026-01-02", "warnings": ("Six scores are equal.",)}
        threshold = msgspec.structs.replace(engine.manifest.threshold, **evidence)
        known = replace(engine, manifest=msgspec.structs.replace(engine.manifest, threshold=threshold))
        text = Reader(render(evaluated(known, write_parts(tmp_path / "parts")), "parts")).text
        assert "calibrated on line1, early shift, 2026-01-02" in text
        assert "warnings Six scores are equal." in text


class TestGallery:
    """Which parts are shown."""

    def names(self, engine: Bundle, folder: Path) -> dict[str, list[str]]:
        """The shown parts' names under each title."""
        evaluation = evaluated(engine, folder)
        return {c.title: [evaluation.samples[k].path.stem for k in c.indices] for c in choices(evaluation)}

    def test_the_worst_errors_come_first(self, engine: Bundle, tmp_path: Path) -> None:
        """False rejects by falling score, misses by rising score; right verdicts are not among them."""
        for k in range(20):
            write_part(tmp_path / "parts", "good", f"g{k:02}", 100 + 5 * k)
            write_part(tmp_path / "parts", "dent", f"d{k:02}", 40 + 7 * k)
        shown = self.names(engine, tmp_path / "parts")
        assert shown["False rejects"] == [f"g{k:02}" for k in range(19, 11, -1)]
        assert shown["Missed defects"] == [f"d{k:02}" for k in range(12)]

    def test_where_there_is_no_error_the_nearest_to_one_are_shown(self, engine: Bundle, tmp_path: Path) -> None:
        """They tell how much room there is."""
        for k in range(6):
            write_part(tmp_path / "parts", "good", f"g{k}", 10 + k)
            write_part(tmp_path / "parts", "dent", f"d{k}", 200 + k)
        shown = self.names(engine, tmp_path / "parts")
        assert shown["False rejects: none"] == ["g5", "g4", "g3", "g2"]
        assert shown["Missed defects: none"] == ["d0", "d1", "d2", "d3", "d4", "d5"]

    def test_random_parts_are_of_every_kind_and_the_same_each_time(self, engine: Bundle, tmp_path: Path) -> None:
        """A rare kind of defect is seen too, and two reports of one evaluation show the same parts."""
        for k in range(30):
            write_part(tmp_path / "parts", "dent", f"d{k}", 200)
            write_part(tmp_path / "parts", "good", f"g{k}", 20)
        write_part(tmp_path / "parts", "crack", "rare", 200)
        shown = self.names(engine, tmp_path / "parts")
        drawn = shown["Defective parts at random"]
        assert "rare" in drawn
        assert len(set(drawn)) == 8
        assert len(set(shown["Good parts at random"])) == 4
        assert self.names(engine, tmp_path / "parts") == shown


class TestPictures:
    """Photo, outline and heatmap."""

    def opened(self, source: str) -> np.ndarray:
        """The picture in a data URI."""
        raw = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))
        return cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)

    def test_the_outline_runs_around_the_mask_and_leaves_it_clear(self, tmp_path: Path) -> None:
        """Cyan along the defect's edges and the image's, the photo itself within, on both pictures."""
        write_part(tmp_path, "dent", "a", 90, masked=True)
        (sample,) = data.labelled_samples(_with_good(tmp_path))[:1]
        photo, heat = (self.opened(s) for s in part_pictures(sample, np.zeros((8, 8), np.uint8), 100))
        assert photo.shape == heat.shape == (280, 280, 3)
        for picture in (photo, heat):
            near = picture.reshape(-1, 3).astype(int) - OUTLINE
            y, x = np.divmod(np.nonzero(np.abs(near).max(1) < 60)[0], 280)
            assert len(x) > 100
            assert np.maximum(x, y).max() <= 150
            assert np.abs(picture[20:120, 20:120].astype(int) - 90).max() < 12

    def test_a_part_without_a_mask_has_no_outline(self, tmp_path: Path) -> None:
        """Nothing is drawn where nothing is known."""
        write_part(tmp_path, "dent", "a", 90)
        (sample,) = data.labelled_samples(_with_good(tmp_path))[:1]
        photo, _ = part_pictures(sample, np.zeros((8, 8), np.uint8), 100)
        assert np.abs(self.opened(photo).astype(int) - 90).max() < 4

    def test_a_tiny_defect_on_a_large_image_still_has_an_outline(self, tmp_path: Path) -> None:
        """One defective pixel of four megapixels is far below a pixel of the picture."""
        write_part(tmp_path, "dent", "a", 90, masked=True)
        cv2.imwrite(str(tmp_path / "test/dent/a.png"), np.full((2000, 2000), 90, np.uint8))
        mask = np.zeros((2000, 2000), np.uint8)
        mask[1000, 1000] = 1
        cv2.imwrite(str(tmp_path / "ground_truth/dent/a_mask.png"), mask)
        (sample,) = data.labelled_samples(_with_good(tmp_path))[:1]
        photo, _ = part_pictures(sample, np.zeros((8, 8), np.uint8), 100)
        near = np.abs(self.opened(photo).astype(int) - OUTLINE).max(2) < 90
        assert near[125:156, 125:156].sum() > 10

    def test_heat_is_clear_below_yellow_at_and_red_above_the_threshold(self) -> None:
        """The colours mean the same in every picture: where the part lies on the way to a reject."""
        photo = np.full((30, 30, 3), (200, 100, 50), np.uint8)
        below, at, above = (heated(photo, np.full((8, 8), level, np.uint8), 100)[15, 15] for level in (50, 100, 255))
        assert len(set(below.tolist())) == 1
        blue, green, red = at.tolist()
        assert red > 180
        assert green > 150
        assert blue < 80
        blue, green, red = above.tolist()
        assert red > 180
        assert max(blue, green) < 80

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 900), (3000, 40)])
    def test_images_of_any_shape_are_shown(self, tmp_path: Path, height: int, width: int) -> None:
        """The longer side has 280 pixels, the shorter one at least one."""
        write_part(tmp_path, "dent", "a", 90)
        cv2.imwrite(str(tmp_path / "test/dent/a.png"), np.full((height, width), 90, np.uint8))
        (sample,) = data.labelled_samples(_with_good(tmp_path))[:1]
        photo, heat = (self.opened(s) for s in part_pictures(sample, np.full((8, 8), 255, np.uint8), 300.0))
        assert max(photo.shape) == 280
        assert photo.shape == heat.shape


class TestCharts:
    """Drawings that do not lie."""

    def test_bars_count_every_part_on_its_side_of_the_threshold(self) -> None:
        """The counts in the bars add up; no bar of a part below the threshold begins beyond it."""
        rng = np.random.default_rng(0)
        good, bad = rng.normal(1, 0.2, 190), rng.normal(2, 0.7, 388)
        drawn = charts.histograms(good, bad, 1.5)
        for kind, values in (("good", good), ("bad", bad)):
            bars = [e for e in drawn.iter("rect") if e.get("class") == kind]
            assert sum(int((e.findtext("title") or "").split()[0]) for e in bars) == len(values)
        assert {"good parts (190)", "defective parts (388)"} <= set(texts(drawn))

    @given(
        st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
        st.lists(st.floats(-1e6, 1e6), max_size=20),
        st.floats(-1e6, 1e6),
    )
    def test_any_scores_can_be_drawn(self, good: list[float], bad: list[float], threshold: float) -> None:
        """Equal, negative, tiny or far apart: everything lies within the drawing."""
        drawn = charts.histograms(np.array(good), np.array(bad), threshold)
        for bar in drawn.iter("rect"):
            left, width = float(bar.get("x", "nan")), float(bar.get("width", "nan"))
            assert -0.01 <= left <= left + width <= charts.WIDTH + 0.01
        for mark in drawn.iter("line"):
            assert 0 <= float(mark.get("x1", "nan")) <= charts.WIDTH

    def test_scores_far_apart_get_a_logarithmic_axis(self) -> None:
        """Good scores near 1 are not one bar beside a defect of 60."""
        good = np.linspace(0.5, 1.5, 50)
        bars = [e for e in charts.histograms(good, np.array([60.0]), 1.6).iter("rect") if e.get("class") == "good"]
        assert len(bars) > 6

    def test_curves_end_at_their_limit_and_the_point_stands_at_the_threshold(self) -> None:
        """The PRO curve is cut at 0.3, between two thresholds too; the ROC's point is where it is said to be."""
        fpr, tpr = np.array([0, 0.1, 0.5, 1.0]), np.array([0, 0.6, 1.0, 1.0])
        ends = [tuple(map(float, p.split(","))) for p in _points(charts.pro(fpr, tpr, 0.3))]
        height = 250 - 0.8 * (250 - 26)
        assert ends[-1] == pytest.approx((charts.WIDTH - 20, height), abs=0.1)
        (point,) = charts.roc(fpr, tpr, (0.1, 0.6)).iter("circle")
        at = float(point.get("cx", "nan")), float(point.get("cy", "nan"))
        assert any(
            at == pytest.approx(tuple(map(float, p.split(","))), abs=0.1)
            for p in _points(charts.roc(fpr, tpr, (0.1, 0.6)))
        )

    def test_a_curve_of_many_points_is_drawn_with_few(self) -> None:
        """Sixteen thousand thresholds are no more than the eye can tell."""
        fpr = np.linspace(0, 1, 1 << 14)
        assert 100 < len(_points(charts.pro(fpr, fpr**0.3, 0.3))) < 1500

    @given(st.floats(1e-9, 1e9), st.floats(1.0001, 1e6))
    def test_ticks_are_few_and_within_the_axis(self, low: float, factor: float) -> None:
        """Round values, rising, none outside."""
        for log in (False, True):
            ticks = charts.Axis(low, low * factor, 0, 1, log=log).ticks()
            assert len(ticks) <= 12
            assert ticks == sorted(set(ticks))
            assert all(low * 0.999999 <= tick <= low * factor * 1.000001 for tick in ticks)

    @pytest.mark.parametrize(
        ("share", "text"), [(0, "0%"), (1, "100%"), (0.005, "0.5%"), (0.35, "35%"), (0.01, "1%"), (0.9965, "99.7%")]
    )
    def test_shares_are_written_as_precisely_as_matters(self, share: float, text: str) -> None:
        """Near 0 and near 1 a tenth of a percent counts."""
        assert percent(share) == text
        assert percent(float("nan")) == "-"


class TestWording:
    """Sentences that say no more than was counted."""

    def test_good_parts_beside_the_declared_rate(self) -> None:
        """More than declared, in agreement, or less: decided by the interval, not by the share alone."""
        assert "more than the declared 1%" in good_sentence(Share(10, 100), 0.01)
        assert "nothing speaks against it" in good_sentence(Share(1, 14), 0.05)
        assert "nothing speaks against it" in good_sentence(Share(0, 14), 0.01)
        assert "less than the declared 20%" in good_sentence(Share(1, 100), 0.2)

    def test_misses_are_laid_to_the_kind_that_has_most(self) -> None:
        """Named where there are several kinds; counted in any case."""
        kinds = {"dent": _kind(Share(9, 10)), "crack": _kind(Share(2, 10))}
        assert caught_sentence(Share(11, 20), kinds).endswith("Missed 9, 8 of them crack.")
        assert caught_sentence(Share(2, 10), {"crack": kinds["crack"]}).endswith("Missed 8.")
        assert caught_sentence(Share(10, 10), {"dent": _kind(Share(10, 10))}).endswith("None was missed.")
        assert "not known" in caught_sentence(Share(0, 0), {})


def test_markup_keeps_text_and_elements_in_order() -> None:
    """Text before, between and after elements stays where it is, escaped; attributes too."""
    made = tag("p", "a<", tag("b", "&"), "c", tag("img", alt='"x"', stroke_width=0.5), "d", class_="k")
    assert '<p class="k">a&lt;<b>&amp;</b>c<img alt="&quot;x&quot;" stroke-width="0.5">d</p>' in page("t", "", made)


def test_a_threshold_elsewhere_is_another_verdict(engine: Bundle, tmp_path: Path) -> None:
    """Verdicts, point and labels follow the manifest's threshold, not the scores."""
    strict = msgspec.structs.replace(engine.manifest.threshold, value=0.99)
    lenient = replace(engine, manifest=msgspec.structs.replace(engine.manifest, threshold=strict))
    text = Reader(render(evaluated(lenient, write_parts(tmp_path / "parts")), "parts")).text
    assert "Rejected 0 of 4 good parts" in text
    assert "Caught 0 of 5 defective parts" in text
    assert "NG: false reject" not in text
    assert text.count("OK: missed") >= 5


def test_an_engine_out_of_a_folder_is_reported_by_its_digest(tmp_path: Path) -> None:
    """A bundle that is in no store has the start of its digest for a version."""
    loose = bundles.load(write_bundle(tmp_path / "b").folder)
    text = Reader(render(evaluated(loose, write_parts(tmp_path / "parts")), "parts")).text
    assert f"Engine bright@{loose.digest[:12]} on parts" in text
    assert f"{SIDE} x {SIDE}, gray" in text


def _with_good(root: Path) -> Path:
    """A test set needs a good part; it sorts behind the defective ones."""
    write_part(root, "good", "z", 20)
    return root


def _kind(caught: Share) -> ClassFigures:
    return ClassFigures(caught.count, 0, 0.9, caught, {})


def _points(drawing: Element) -> list[str]:
    (line,) = drawing.iter("polyline")
    return line.get("points", "").split()
