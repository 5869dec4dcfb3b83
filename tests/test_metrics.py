"""The metrics against exact ones: every pair counted, every threshold tried, regions found by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from train.metrics import (
    LinearScale,
    PixelMetrics,
    RankScale,
    Scale,
    auroc,
    average_precision,
    f1_max,
    image_metrics,
    image_pro_area,
    pro_curve_area,
    rate_curve,
)

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


def exact_f1_max(scores: list[float], bad: list[bool]) -> float:
    """The harmonic mean of precision and recall, at the threshold where it is largest."""
    if not any(bad):
        return math.nan
    found = []
    for threshold in set(scores):
        chosen = [is_bad for score, is_bad in zip(scores, bad, strict=True) if score >= threshold]
        precision, recall = sum(chosen) / len(chosen), sum(chosen) / sum(bad)
        found.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return max(found)


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


def pro_points(maps: list[Map], masks: list[Mask]) -> list[tuple[float, float]]:
    """Every threshold: the share of good pixels above it, and each region's share above it, on average."""
    good = [float(v) for heat, mask in zip(maps, masks, strict=True) for v in heat[~mask]]
    regions = [[float(heat[at]) for at in r] for heat, mask in zip(maps, masks, strict=True) for r in regions_of(mask)]
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for heat in maps for v in heat.ravel()}, reverse=True):
        fpr = sum(v >= threshold for v in good) / len(good)
        points.append((fpr, sum(sum(v >= threshold for v in r) / len(r) for r in regions) / len(regions)))
    return points


def exact_aupro(maps: list[Map], masks: list[Mask], limit: float) -> float:
    """Area under those points up to the limit, the curve being a straight line between two of them."""
    if all(mask.all() for mask in masks) or not any(mask.any() for mask in masks):
        return math.nan
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(pro_points(maps, masks)):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def exact_pro_per_image(maps: list[Map], masks: list[Mask]) -> float:
    """Of each defective image alone: area up to the largest rate below 0.3, over that rate; then the mean."""
    found = []
    for heat, mask in zip(maps, masks, strict=True):
        if not mask.any() or mask.all():
            continue
        points = [(fpr, pro) for fpr, pro in pro_points([heat], [mask]) if fpr < 0.3]
        last = points[-1][0]
        area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))
        found.append(area / last if last else points[-1][1])
    return sum(found) / len(found) if found else math.nan


def pixel_metrics(maps: list[Map], masks: list[Mask], scale: Scale | None = None) -> dict[str, float]:
    """What the class under test makes of these maps."""
    counted = PixelMetrics(scale)
    for heat, mask in zip(maps, masks, strict=True):
        counted.add(heat, mask)
    return counted.result()


def exact_pixel_metrics(maps: list[Map], masks: list[Mask]) -> dict[str, float]:
    """Every pixel figure by an exact sweep over every threshold."""
    scores = [float(v) for heat in maps for v in heat.ravel()]
    bad = [bool(v) for mask in masks for v in mask.ravel()]
    return {
        "pixel_auroc": exact_auroc(scores, bad),
        "pixel_ap": exact_ap(scores, bad),
        "pixel_f1_max": exact_f1_max(scores, bad),
        "aupro": exact_aupro(maps, masks, 0.3),
        "aupro_0.05": exact_aupro(maps, masks, 0.05),
        "pro_per_image": exact_pro_per_image(maps, masks),
    }


def all_same(got: dict[str, float], wanted: dict[str, float]) -> bool:
    """The same names, each with the same value."""
    return got.keys() == wanted.keys() and all(same(got[name], wanted[name]) for name in wanted)


def same(got: float, wanted: float) -> bool:
    """Equal to within rounding, or both not defined."""
    return (math.isnan(got) and math.isnan(wanted)) or math.isclose(got, wanted, abs_tol=1e-9)


graded = st.lists(st.tuples(st.integers(0, 6).map(lambda n: n / 4), st.booleans()), min_size=1, max_size=25)
shot = st.tuples(
    arrays.arrays(np.float32, (5, 6), elements=st.sampled_from([0, 1, 2, 60, 128, 254, 255])),
    arrays.arrays(np.bool_, (5, 6), elements=st.sampled_from([False, False, True])),
)
float_shot = st.tuples(
    arrays.arrays(np.float32, (4, 5), elements=st.floats(width=32, allow_nan=False)),
    arrays.arrays(np.bool_, (4, 5), elements=st.sampled_from([False, False, True])),
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
    assert same(got["image_f1_max"], exact_f1_max(scores, bad))


def test_image_metrics_of_a_perfect_and_of_a_useless_engine() -> None:
    """The ends of the scale, where anyone knows the answer."""
    bad = np.array([False, False, True, True])
    perfect = image_metrics(np.array([1.0, 2.0, 3.0, 4.0]), bad)
    assert perfect == {"image_auroc": 1.0, "image_ap": 1.0, "image_f1_max": 1.0}
    assert image_metrics(np.array([4.0, 3.0, 2.0, 1.0]), bad)["image_auroc"] == 0.0
    useless = image_metrics(np.ones(4), bad)
    assert useless == {"image_auroc": 0.5, "image_ap": 0.5, "image_f1_max": pytest.approx(2 / 3)}


def test_image_metrics_of_nothing_are_not_defined() -> None:
    """No score is no figure, and no error."""
    got = image_metrics(np.array([]), np.array([], bool))
    assert all(math.isnan(value) for value in got.values())


@given(st.lists(shot, min_size=1, max_size=3))
def test_pixel_metrics_are_exact_on_levels_of_a_heatmap(shots: list[tuple[Map, Mask]]) -> None:
    """Every figure over several maps equals that of an exact sweep over every threshold."""
    maps, masks = [heat for heat, _ in shots], [mask for _, mask in shots]
    got = pixel_metrics(maps, masks)
    if not any(mask.any() for mask in masks):
        assert got == {}
        return
    assert all_same(got, exact_pixel_metrics(maps, masks))


@given(st.lists(float_shot, min_size=1, max_size=3))
def test_maps_of_any_range_are_exact_on_a_scale_fitted_to_them(shots: list[tuple[Map, Mask]]) -> None:
    """Negative, tiny, huge and infinite values keep their order: no figure depends on the range."""
    maps, masks = [heat for heat, _ in shots], [mask for _, mask in shots]
    got = pixel_metrics(maps, masks, RankScale.fitted(shots))
    if any(mask.any() for mask in masks):
        assert all_same(got, exact_pixel_metrics(maps, masks))


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
    """A hot good image lowers every figure but the one that looks at defective images alone."""
    heat, mask = np.zeros((8, 8), np.float32), np.zeros((8, 8), bool)
    heat[2:4, 2:4], mask[2:4, 2:4] = 100, True
    alone = pixel_metrics([heat], [mask])
    both = pixel_metrics([heat, np.full((8, 8), 200, np.float32)], [mask, np.zeros((8, 8), bool)])
    assert alone["pixel_auroc"] == alone["aupro"] == 1.0
    assert both.pop("pro_per_image") == alone["pro_per_image"] == 1.0
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
    pooled = whole.result().keys() - {"pro_per_image"}
    assert {name: whole.result()[name] for name in pooled} == {name: halves.result()[name] for name in pooled}
    assert whole.good.shape == (1 << 14,)


@pytest.mark.parametrize("seed", range(3))
def test_continuous_maps_are_measured_to_within_a_bin(seed: int) -> None:
    """Enlarged heatmaps have values between the levels: the figures are off by no more than a thousandth."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((16, 16), bool)
    mask[3:6, 3:7] = mask[10:14, 9:12] = True
    heat = (rng.random((16, 16)) * 180 + 60 * mask).astype(np.float32)
    assert pixel_metrics([heat], [mask]) == pytest.approx(exact_pixel_metrics([heat], [mask]), abs=1e-3)


@pytest.mark.parametrize("skew", [1.0, 20.0])
def test_few_bins_on_many_values_cost_little_however_they_are_spread(skew: float) -> None:
    """A probability map, nearly all of it next to zero, is measured as well as an even one with equal bins is not."""
    rng = np.random.default_rng(1)
    masks = [rng.random((64, 64)) < 0.03 for _ in range(6)]
    maps = [((rng.random(mask.shape) + 0.3 * mask) / 1.3) ** skew for mask in masks]
    shots = list(zip(maps, masks, strict=True))
    exact = pixel_metrics(maps, masks, RankScale.fitted(shots))
    coarse = pixel_metrics(maps, masks, RankScale.fitted(shots, bins=1 << 9))
    assert RankScale.fitted(shots).bins > 20_000
    assert RankScale.fitted(shots, bins=1 << 9).bins <= 1 << 9
    assert coarse == pytest.approx(exact, abs=4e-3)
    if skew > 1:
        even = pixel_metrics(maps, masks, LinearScale(0.0, 1.0, 1 << 9))
        assert abs(even["pixel_auroc"] - exact["pixel_auroc"]) > 4e-3


@pytest.mark.parametrize(("scale", "change"), [(RankScale, np.exp), (RankScale, lambda heat: heat**3 - 1e4)])
def test_a_rank_scale_sees_nothing_but_the_order(scale: type[RankScale], change: Callable[[Map], Map]) -> None:
    """Any rising function of the maps gives the very same figures: no method profits by how it spreads its values."""
    rng = np.random.default_rng(2)
    masks = [rng.random((20, 20)) < 0.05 for _ in range(3)]
    maps = [rng.integers(0, 60, mask.shape) / 10 + mask for mask in masks]
    changed = [change(heat) for heat in maps]
    before = pixel_metrics(maps, masks, scale.fitted(zip(maps, masks, strict=True)))
    assert pixel_metrics(changed, masks, scale.fitted(zip(changed, masks, strict=True))) == before


def test_a_scale_refuses_what_it_would_have_to_clip() -> None:
    """Values outside the range and values that are no numbers are errors with a remedy, not saturated figures."""
    mask = np.zeros((2, 2), bool)
    for value in (-0.1, 255.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="give the true range, or a RankScale"):
            PixelMetrics().add(np.full((2, 2), value), mask)
    with pytest.raises(ValueError, match="have no order"):
        PixelMetrics(RankScale(np.array([0.0, 1.0]))).add(np.full((2, 2), np.nan), mask)
    assert LinearScale(-1.0, 1.0, 4).index(np.array([-1.0, -0.5, 0.0, 1.0])).tolist() == [0, 1, 2, 3]


def test_pro_per_image_forgives_an_image_that_is_too_high_as_a_whole() -> None:
    """Each image has a threshold of its own there; in the pooled figure it has not, and the good pixels cost."""
    heat, mask = np.zeros((20, 20), np.float32), np.zeros((20, 20), bool)
    heat[5:9, 5:9], mask[5:9, 5:9] = 50, True
    got = pixel_metrics([heat, heat + 100], [mask, mask])
    assert got["pro_per_image"] == 1.0
    assert got["aupro"] < 0.8


def test_pro_per_image_stops_below_the_limit() -> None:
    """A threshold at a rate of exactly 0.3 is not below it: the area ends at the rate before, and is divided by it."""
    negatives = np.array([7.0, 1.0, 2.0])
    regions = np.array([0.0, 0.8, 0.2])
    assert image_pro_area(negatives, regions) == pytest.approx(0.1)
    assert pro_curve_area(negatives, regions) == pytest.approx((0.2 * 0.1 + 0.1 * 0.6) / 0.3)


def test_figures_of_parts_are_joined_as_if_counted_together() -> None:
    """Histograms by class, joined, are those of one count over all images."""
    rng = np.random.default_rng(4)
    shots = [(rng.integers(0, 256, (12, 12)).astype(np.float32), rng.random((12, 12)) < 0.1) for _ in range(4)]
    parts, whole = [PixelMetrics() for _ in shots], PixelMetrics()
    for part, shot_of_part in zip(parts, shots, strict=True):
        part.add(*shot_of_part)
        whole.add(*shot_of_part)
    joined = parts[0].joined(*parts[1:])
    assert joined.result() == pytest.approx(whole.result(), abs=1e-12)
    assert parts[0].region_count < joined.region_count == whole.region_count


def test_curves_go_from_nothing_to_everything() -> None:
    """Both rates start at 0, above every score, and end at 1, below every score; an empty side is not a number."""
    fpr, tpr = rate_curve(np.array([3.0, 1.0]), np.array([1.0, 4.0]))
    assert fpr.tolist() == [0, 0.25, 1]
    assert tpr.tolist() == [0, 0.8, 1]
    assert math.isnan(rate_curve(np.zeros(2), np.ones(2))[0][-1])


def test_empty_histograms_are_not_defined() -> None:
    """Without good or without bad ones there is no figure."""
    none, some = np.zeros(4), np.array([1.0, 0, 2, 0])
    assert math.isnan(auroc(none, some))
    assert math.isnan(auroc(some, none))
    assert math.isnan(average_precision(some, none))
    assert math.isnan(f1_max(some, none))
    assert math.isnan(pro_curve_area(none, some))
    assert math.isnan(image_pro_area(none, some))
    assert math.isnan(image_pro_area(some, none))
    assert math.isnan(pro_curve_area(some, none))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_figures_stay_within_their_scale(bins: list[tuple[int, int]]) -> None:
    """Whatever the histograms, a figure is between 0 and 1."""
    good, bad = (np.array(side, float) for side in zip(*bins, strict=True))
    if good.sum() and bad.sum():
        regions = bad / bad.sum()
        overlaps = pro_curve_area(good, regions), image_pro_area(good, regions)
        for figure in (auroc(good, bad), average_precision(good, bad), f1_max(good, bad), *overlaps):
            assert -1e-12 <= figure <= 1 + 1e-12
