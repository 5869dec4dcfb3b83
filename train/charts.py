"""Charts as inline SVG. Colours are CSS variables of the page, so that they follow its light or dark look."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree.ElementTree import Element

import numpy as np

from train.markup import tag
from train.metrics import Floats

WIDTH, HEIGHT = 440, 300
"""Size in units of the drawing. It is narrow so that letters stay readable where a phone scales it down."""
BARS: Final = 44
LOG_FROM: Final = 12.0
"""Scores are drawn on a logarithmic axis where the largest is this many times the smallest."""


@dataclass(frozen=True)
class Axis:
    """A range of values on a range of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies in the drawing."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def split(self, count: int) -> Floats:
        """Ends of ``count`` intervals that look equally wide, ``(count + 1,)``."""
        if self.log:
            return np.geomspace(self.low, self.high, count + 1)
        return np.linspace(self.low, self.high, count + 1)

    def ticks(self, count: int = 5) -> list[float]:
        """About ``count`` round values within the range."""
        return _log_ticks(self.low, self.high) if self.log else _round_ticks(self.low, self.high, count)

    def _scaled(self, value: float) -> float:
        return math.log(max(value, self.low)) if self.log else value


def histograms(good: Floats, defective: Floats, threshold: float) -> Element:
    """Scores of good parts above those of defective ones, on one axis, with the threshold through both."""
    x = _score_axis(np.concatenate([good, defective, [threshold]]))
    upper, lower = Axis(0, 1, 132, 50), Axis(0, 1, 250, 168)
    line = x.at(threshold)
    return _chart(
        f"Score histograms of {len(good)} good and {len(defective)} defective parts, threshold {threshold:.3g}",
        tag("rect", x=line, y=26, width=x.end - line, height=224, class_="beyond"),
        *_bars(good, x, upper, "good", "good parts"),
        *_bars(defective, x, lower, "bad", "defective parts"),
        *_x_ticks(x, 250, "score"),
        tag("line", x1=line, x2=line, y1=26, y2=250, class_="threshold"),
        _threshold_label(line, x, threshold),
    )


def roc(fpr: Floats, tpr: Floats, point: tuple[float, float]) -> Element:
    """The ROC curve of image scores with the point at which the threshold works.

    Args:
        fpr: Share of good parts rejected, ascending, ``(n,)``.
        tpr: Share of defective parts caught, ascending, ``(n,)``.
        point: Both at the threshold.
    """
    x, y = Axis(0, 1, 52, WIDTH - 20), Axis(0, 1, 250, 26)
    caught, rejected = f"{percent(point[1])} caught", f"{percent(point[0])} of good rejected"
    return _chart(
        f"ROC curve; at the threshold {caught}, {rejected}",
        *_grid(x, y, "good parts rejected", "defective parts caught"),
        *_curve(x, y, fpr, tpr),
        tag("circle", cx=x.at(point[0]), cy=y.at(point[1]), r=5.5, class_="point"),
        *_beside(x.at(point[0]), y.at(point[1]), ["at the threshold:", caught, rejected]),
    )


def pro(fpr: Floats, overlap: Floats, limit: float) -> Element:
    """Mean overlap of the defects' regions over the share of good pixels marked, up to ``limit``."""
    x, y = Axis(0, limit, 52, WIDTH - 20), Axis(0, 1, 250, 26)
    kept = fpr < limit
    xs, ys = np.append(fpr[kept], limit), np.append(overlap[kept], np.interp(limit, fpr, overlap))
    strict = x.at(0.05)
    return _chart(
        f"PRO curve up to {percent(limit)} of good pixels",
        *_grid(x, y, "good pixels marked (all images)", "mean share of each defect marked"),
        *_curve(x, y, xs, ys),
        tag("line", x1=strict, x2=strict, y1=26, y2=250, class_="limit"),
        tag("text", "5%", x=strict + 4, y=244, class_="note"),
    )


def latencies(milliseconds: Floats) -> Element:
    """How long single parts took, with the median and the 99th percentile."""
    low, middle, late, high = (float(v) for v in np.percentile(milliseconds, [0, 50, 99, 100]))
    x, y = _axis_of(low, high), Axis(0, 1, 250, 50)
    lines = [tag("line", x1=x.at(value), x2=x.at(value), y1=50, y2=250, class_="threshold") for value in (middle, late)]
    return _chart(
        f"Latency of {len(milliseconds)} parts, median {middle:.1f} ms",
        *_bars(milliseconds, x, y, "good", "parts", "ms"),
        *_x_ticks(x, 250, "milliseconds"),
        *lines,
        tag("text", f"median {middle:.1f}", x=x.at(middle) + 4, y=22, class_="name"),
        tag("text", f"99% {late:.1f}", x=x.end, y=22, text_anchor="end", class_="name"),
    )


def percent(share: float) -> str:
    """A share for reading: one decimal where it matters."""
    if math.isnan(share):
        return "-"
    fine = 0 < share < 0.1 or 0.9 < share < 1
    return f"{100 * share:.{1 if fine else 0}f}".removesuffix(".0") + "%"


def _chart(description: str, *children: Element) -> Element:
    return tag("svg", tag("title", description), *children, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="chart")


def _score_axis(values: Floats) -> Axis:
    return _axis_of(float(values.min()), float(values.max()))


def _axis_of(low: float, high: float) -> Axis:
    if low > 0 and high / low > LOG_FROM:
        return Axis(low / 1.05, high * 1.05, 52, WIDTH - 20, log=True)
    margin = (high - low) * 0.03 or abs(high) * 0.03 or 1.0
    return Axis(low - margin, high + margin, 52, WIDTH - 20)


def _bars(values: Floats, x: Axis, y: Axis, kind: str, name: str, unit: str = "score") -> list[Element]:
    edges = x.split(BARS)
    counts, _ = np.histogram(values, edges)
    top = max(int(counts.max()), 1)
    bars = [
        tag("text", f"{name} ({len(values)})", x=x.start, y=y.end - 5, class_=f"series {kind}"),
        tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"),
        tag("text", str(top), x=x.start - 6, y=y.end + 5, text_anchor="end"),
        tag("text", "0", x=x.start - 6, y=y.start, text_anchor="end"),
    ]
    for count, (low, high) in zip(counts, itertools.pairwise(edges), strict=True):
        if count:
            said = tag("title", f"{count} {name}, {unit} {low:.3g} to {high:.3g}")
            left, height = x.at(low), max(float(count) / top * (y.start - y.end), 1.5)
            width = x.at(high) - left - 1
            bars.append(tag("rect", said, x=left, y=y.start - height, width=width, height=height, class_=kind))
    return bars


def _beside(at: float, up: float, lines: Sequence[str]) -> list[Element]:
    """Lines of text below a point, on the side where there is room, moved up where there is none below."""
    right = at < WIDTH / 2
    top = min(up + 20, 244 - 16 * (len(lines) - 1))
    anchor, start = ("start", at + 12) if right else ("end", at - 12)
    return [
        tag("text", line, x=start, y=top + 16 * k, text_anchor=anchor, class_="note") for k, line in enumerate(lines)
    ]


def _threshold_label(line: float, x: Axis, threshold: float) -> Element:
    text = f"NG, above {threshold:.3g}"
    if line > (x.start + x.end) / 2:
        return tag("text", text, x=x.end, y=20, text_anchor="end", class_="name")
    return tag("text", f"{text} →", x=line, y=20, class_="name")


def _grid(x: Axis, y: Axis, x_name: str, y_name: str) -> list[Element]:
    lines = [tag("text", y_name, x=x.start - 40, y=16, class_="name")]
    for value in y.ticks():
        at = y.at(value)
        lines += [
            tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"),
            tag("text", f"{value:.0%}", x=x.start - 6, y=at + 4, text_anchor="end"),
        ]
    return [*lines, *_x_ticks(x, y.start, x_name, percents=True)]


def _x_ticks(x: Axis, bottom: float, name: str, *, percents: bool = False) -> list[Element]:
    middle = (x.start + x.end) / 2
    marks = [tag("text", name, x=middle, y=bottom + 40, text_anchor="middle", class_="name")]
    for value in x.ticks():
        at = x.at(value)
        marks += [
            tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"),
            tag("text", percent(value) if percents else f"{value:g}", x=at, y=bottom + 19, text_anchor="middle"),
        ]
    return marks


def _curve(x: Axis, y: Axis, xs: Floats, ys: Floats) -> list[Element]:
    points = _thinned([(x.at(float(a)), y.at(float(b))) for a, b in zip(xs, ys, strict=True)])
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    base = f"{x.at(float(xs[-1])):.1f},{y.start:.1f} {x.at(float(xs[0])):.1f},{y.start:.1f}"
    return [tag("polygon", points=f"{path} {base}", class_="area"), tag("polyline", points=path, class_="curve")]


def _thinned(points: Sequence[tuple[float, float]], step: float = 0.7) -> list[tuple[float, float]]:
    """The points without those too near to the last one kept; first and last always stay."""
    kept = [points[0]]
    for point in points[1:-1]:
        if math.dist(point, kept[-1]) >= step:
            kept.append(point)
    return [*kept, points[-1]]


def _round_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    found = (factor * 10.0**decade for decade in decades for factor in factors)
    return [float(f"{value:.6g}") for value in found if low <= value <= high]
