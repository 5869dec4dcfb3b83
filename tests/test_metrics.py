"""The metrics against exact ones: every pair counted, every threshold tried, regions found by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from train.metrics import PixelMetrics, auroc, average_precision, image_metrics, pro_curve_area

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]


def exact_auroc(scores: list[float], bad: list[bool]) -> float:
    """The share of pairs of a bad and a good one in which the bad one scores higher; ties count one half."""
    pairs = [
        (b, g)
        for b, is_bad in zip(scores, bad, strict=True)
        if is_bad
        for g, x in zip(scores, bad, strict=True)
        if not x
    ]
    return sum(1.0 if b > g else 0.5 if b == g else 0.0 for b, g in pairs) / len(pairs) if pairs else math.nan


def exact_ap(scores: list[float], bad: list[bool]) -> float:
    """Precision at each threshold, weighted by what it adds to recall."""
    if not any(bad):
        return math.nan
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [is_bad for score, is_bad in zip(scores, bad, strict=True) if score >= threshold]
        recall = sum(chosen) / sum(bad)
        total += (recall - before) * sum(chosen) / len(chosen)
        before = recall
    return total


def regions_of(mask: Mask) -> list[set[tuple[int, int]]]:
    """Pixels that touch, at corners too, by flooding."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = []
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
        found.append(region)
    return found


def exact_aupro(maps: list[Map], masks: list[Mask], limit: float) -> float:
    """Every threshold: the share of good pixels above it, and each region's share above it, on average."""
    good = [float(v) for heat, mask in zip(maps, masks, strict=True) for v in heat[~mask]]
    regions = [[float(heat[at]) for at in r] for heat, mask in zip(maps, masks, strict=True) for r in regions_of(mask)]
    if not good or not regions:
        return math.nan
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for heat in maps for v in heat.ravel()}, reverse=True):
        fpr = sum(v >= threshold for v in good) / len(good)
        points.append((fpr, sum(sum(v >= threshold for v in r) / len(r) for r in regions) / len(regions)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def pixel_metrics(maps: list[Map], masks: list[Mask]) -> dict[str, float]:
    """What the class under test makes of these maps."""
    counted = PixelMetrics()
    for heat, mask in zip(maps, masks, strict=True):
        counted.add(heat, mask)
    return counted.result()


def same(got: float, wanted: float) -> bool:
    """Equal to within rounding, or both not defined."""
    return (math.isnan(got) and math.isnan(wanted)) or math.isclose(got, wanted, abs_tol=1e-9)


graded = st.lists(st.tuples(st.integers(0, 6).map(lambda n: n / 4), st.booleans()), min_size=1, max_size=25)
shot = st.tuples(
    arrays.arrays(np.float32, (5, 6), elements=st.sampled_from([0, 1, 2, 60, 128, 254, 255])),
    arrays.arrays(np.bool_, (5, 6), elements=st.sampled_from([False, False, True])),
)


@given(graded)
@example([(0.0, True)])
@example([(0.0, False)])
def test_image_metrics_are_exact(cases: list[tuple[float, bool]]) -> None:
    """With ties, with one class only: the same as counting pairs and thresholds."""
    scores, bad = [score for score, _ in cases], [is_bad for _, is_bad in cases]
    got = image_metrics(np.array(scores), np.array(bad))
    assert same(got["image_auroc"], exact_auroc(scores, bad))
    assert same(got["image_ap"], exact_ap(scores, bad))


def test_image_metrics_of_a_perfect_and_of_a_useless_engine() -> None:
    """The ends of the scale, where anyone knows the answer."""
    bad = np.array([False, False, True, True])
    perfect = image_metrics(np.array([1.0, 2.0, 3.0, 4.0]), bad)
    assert perfect == {"image_auroc": 1.0, "image_ap": 1.0}
    assert image_metrics(np.array([4.0, 3.0, 2.0, 1.0]), bad)["image_auroc"] == 0.0
    assert image_metrics(np.ones(4), bad) == {"image_auroc": 0.5, "image_ap": 0.5}


def test_image_metrics_of_nothing_are_not_defined() -> None:
    """No score is no figure, and no error."""
    got = image_metrics(np.array([]), np.array([], bool))
    assert all(math.isnan(value) for value in got.values())


@given(st.lists(shot, min_size=1, max_size=3))
def test_pixel_metrics_are_exact_on_levels_of_a_heatmap(shots: list[tuple[Map, Mask]]) -> None:
    """AUROC, AP and AUPRO over several maps equal those of an exact sweep over every threshold."""
    maps, masks = [heat for heat, _ in shots], [mask for _, mask in shots]
    got = pixel_metrics(maps, masks)
    scores = [float(v) for heat in maps for v in heat.ravel()]
    bad = [bool(v) for mask in masks for v in mask.ravel()]
    if not any(bad):
        assert got == {}
        return
    assert same(got["pixel_auroc"], exact_auroc(scores, bad))
    assert same(got["pixel_ap"], exact_ap(scores, bad))
    assert same(got["aupro"], exact_aupro(maps, masks, 0.3))
    assert same(got["aupro_0.05"], exact_aupro(maps, masks, 0.05))


def test_aupro_stops_at_the_limit_where_a_threshold_hits_it_exactly() -> None:
    """What lies beyond a false positive rate of 0.3 adds nothing, even where the curve rises at 0.3 itself."""
    heat = np.array([[9, 9, 9, 5, 1, 1, 1, 1, 1, 1, 1]], np.float32)
    mask = np.array([[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]], bool)
    assert pixel_metrics([heat], [mask])["aupro"] == exact_aupro([heat], [mask], 0.3) == 0.0


def test_small_regions_count_as_much_as_large_ones() -> None:
    """One pixel missed of two regions costs half of AUPRO, whatever the size of the other."""
    heat = np.zeros((20, 20), np.float32)
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12] = True
    mask[18, 18] = True
    heat[2:12, 2:12] = 200
    got = pixel_metrics([heat], [mask])
    assert got["pixel_ap"] > 0.98
    assert got["aupro"] == pytest.approx(exact_aupro([heat], [mask], 0.3))
    assert got["aupro"] == pytest.approx(0.5 + 0.5 * 0.15)


def test_pixels_that_touch_at_a_corner_are_one_region() -> None:
    """Eight neighbours, as in the reference implementation."""
    heat = np.zeros((6, 6), np.float32)
    mask = np.zeros((6, 6), bool)
    mask[1, 1] = mask[2, 2] = mask[4, 5] = True
    counted = PixelMetrics()
    counted.add(heat, mask)
    assert counted.region_count == 2


def test_good_images_count_as_good_pixels() -> None:
    """A hot good image lowers every figure."""
    heat, mask = np.zeros((8, 8), np.float32), np.zeros((8, 8), bool)
    heat[2:4, 2:4], mask[2:4, 2:4] = 100, True
    alone = pixel_metrics([heat], [mask])
    both = pixel_metrics([heat, np.full((8, 8), 200, np.float32)], [mask, np.zeros((8, 8), bool)])
    assert alone["pixel_auroc"] == alone["aupro"] == 1.0
    for name, value in both.items():
        assert value < alone[name] - 0.2


def test_memory_does_not_grow_with_the_images() -> None:
    """Adding a map in parts or at once, or many maps, is the same histograms."""
    rng = np.random.default_rng(0)
    heat = rng.integers(0, 256, (40, 30)).astype(np.float32)
    mask = np.zeros((40, 30), bool)
    mask[5:9, 5:9] = mask[25:30, 5:9] = True
    whole, halves = PixelMetrics(), PixelMetrics()
    whole.add(heat, mask)
    for rows in (slice(0, 20), slice(20, 40)):
        halves.add(heat[rows], mask[rows])
    assert whole.result() == halves.result()
    assert whole.good.shape == (1 << 14,)


@pytest.mark.parametrize("seed", range(3))
def test_continuous_maps_are_measured_to_within_a_bin(seed: int) -> None:
    """Enlarged heatmaps have values between the levels: the figures are off by no more than a thousandth."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((16, 16), bool)
    mask[3:6, 3:7] = mask[10:14, 9:12] = True
    heat = (rng.random((16, 16)) * 180 + 60 * mask).astype(np.float32)
    got = pixel_metrics([heat], [mask])
    scores, bad = [float(v) for v in heat.ravel()], [bool(v) for v in mask.ravel()]
    assert got["pixel_auroc"] == pytest.approx(exact_auroc(scores, bad), abs=1e-3)
    assert got["pixel_ap"] == pytest.approx(exact_ap(scores, bad), abs=1e-3)
    assert got["aupro"] == pytest.approx(exact_aupro([heat], [mask], 0.3), abs=1e-3)


def test_empty_histograms_are_not_defined() -> None:
    """Without good or without bad ones there is no figure."""
    none, some = np.zeros(4), np.array([1.0, 0, 2, 0])
    assert math.isnan(auroc(none, some))
    assert math.isnan(auroc(some, none))
    assert math.isnan(average_precision(some, none))
    assert math.isnan(pro_curve_area(none, some))
    assert math.isnan(pro_curve_area(some, none))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_figures_stay_within_their_scale(bins: list[tuple[int, int]]) -> None:
    """Whatever the histograms, a figure is between 0 and 1."""
    good, bad = (np.array(side, float) for side in zip(*bins, strict=True))
    if good.sum() and bad.sum():
        for figure in (auroc(good, bad), average_precision(good, bad), pro_curve_area(good, bad / bad.sum())):
            assert -1e-12 <= figure <= 1 + 1e-12
