"""The report of an evaluation: one HTML file that needs nothing else, for a screen, a phone or paper."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from xml.etree.ElementTree import Element

import numpy as np

from train import charts
from train.charts import percent
from train.evaluate import Evaluation
from train.figures import ClassFigures, Share
from train.gallery import choices
from train.markup import page, tag
from train.metrics import PRO_LIMIT, rate_curve, score_histograms
from train.pictures import part_pictures
from train.report_style import STYLE

EXPLAINED: Final = {
    "image_auroc": ("Image AUROC", "how often a random defective image scores above a random good one"),
    "image_ap": ("Image AP", "precision of rejects, averaged over recall"),
    "image_f1_max": ("Image F1-max", "best F1 of any threshold on these images: what no threshold set before can beat"),
    "pixel_auroc": ("Pixel AUROC", "the same as image AUROC, of all pixels; easily high, since most pixels are good"),
    "pixel_ap": ("Pixel AP", "precision of marked pixels, averaged over recall: how sharply defects are marked"),
    "pixel_f1_max": ("Pixel F1-max", "best F1 of any level on these pixels"),
    "aupro": ("AUPRO@0.3", "overlap with each defect, small ones counting like large ones, up to 30% of good pixels"),
    "aupro_0.05": ("AUPRO@0.05", "the same up to 5% of good pixels, which is nearer to what a line can afford"),
    "pro_per_image": (
        "PRO per image",
        "overlap with a curve for each image, as some papers do; compare it only with theirs",
    ),
}

PICTURES: Final = (
    "Left: the photo, with the outline of the known defect in cyan where there is a mask. Right: the heatmap over the"
    " photo in gray; clear far below the threshold, yellow at the threshold, red far above. OK and NG are the engine's"
    " verdicts."
)
READING: Final = (
    "Intervals are exact 95% intervals (Clopper and Pearson). They hold for parts like these: same camera, light and"
    " supplier. They are worth nothing if training or calibration has seen these images."
)


def write(evaluation: Evaluation, dataset: str, target: Path) -> None:
    """Write the report of an evaluation.

    Args:
        evaluation: What was measured.
        dataset: Name of the test set.
        target: The file to write.

    Raises:
        DataError: if an image that is to be shown cannot be decoded.
    """
    target.write_bytes(render(evaluation, dataset).encode(errors="replace"))


def render(evaluation: Evaluation, dataset: str) -> str:
    """The report as HTML. Everything that comes from outside is escaped: file names, classes, the manifest."""
    title = f"{evaluation.bundle.label} on {dataset}"
    body = tag(
        "main",
        *_head(evaluation, dataset),
        *_charts(evaluation),
        *_classes(evaluation.figures.classes),
        *_gallery(evaluation),
        *_figures(evaluation.figures.values),
        *_latency(evaluation),
        *_engine(evaluation),
    )
    return page(title, STYLE, tag("body", body))


def _head(evaluation: Evaluation, dataset: str) -> list[Element]:
    good, caught = evaluation.good_rejected, evaluation.defects_caught
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    what = f"Evaluated {created} on {good.count} good and {caught.count} defective parts"
    tiles = [
        _tile("good rejected", percent(good.value), f"{good.hits} of {good.count}"),
        _tile("defects caught", percent(caught.value), f"{caught.hits} of {caught.count}"),
        _tile("image AUROC", _figure(evaluation.figures.values["image_auroc"]), "1 is perfect, 0.5 is chance"),
    ]
    if "aupro" in evaluation.figures.values:
        tiles.append(_tile("AUPRO@0.3", _figure(evaluation.figures.values["aupro"]), "how well defects are located"))
    tiles.append(_tile("latency", f"{evaluation.latency_ms(50):.1f} ms", f"99%: {evaluation.latency_ms(99):.1f} ms"))
    return [
        tag("h1", f"Engine {evaluation.bundle.label} on {dataset}"),
        tag("p", f"{what}, at the engine's threshold {evaluation.threshold:.4g}.", class_="quiet"),
        tag("div", *(tag("p", text) for text in evaluation.sentences()), class_="card verdict"),
        tag("div", *tiles, class_="tiles"),
    ]


def _tile(name: str, value: str, remark: str) -> Element:
    return tag("div", tag("span", name, class_="name"), tag("b", value), tag("span", remark), class_="card tile")


def _charts(evaluation: Evaluation) -> list[Element]:
    scores = evaluation.inspection.scores
    defective = np.array([sample.defective for sample in evaluation.samples])
    drawn = [_chart("Scores", charts.histograms(scores[~defective], scores[defective], evaluation.threshold))]
    if defective.any():
        point = evaluation.good_rejected.value, evaluation.defects_caught.value
        drawn.append(_chart("ROC of parts", charts.roc(*rate_curve(*score_histograms(scores, defective)), point)))
    pixels = evaluation.figures.pixels
    if pixels.region_count:
        drawn.append(_chart("Location of defects (PRO)", charts.pro(*pixels.pro_curve(), PRO_LIMIT)))
    drawn.append(_chart("Latency", charts.latencies(evaluation.inspection.seconds * 1e3)))
    return [
        tag("h2", "Scores and curves"),
        tag("p", "Bars count parts; good and defective parts have scales of their own.", class_="quiet"),
        tag("div", *drawn, class_="charts"),
    ]


def _chart(title: str, drawing: Element) -> Element:
    return tag("div", tag("h3", title), drawing, class_="card")


def _figures(values: dict[str, float]) -> list[Element]:
    rows = [
        tag("tr", tag("th", name), tag("td", _figure(values[key]), class_="number"), tag("td", said, class_="quiet"))
        for key, (name, said) in EXPLAINED.items()
        if key in values
    ]
    remark = [] if "aupro" in values else [tag("p", "No masks, so nothing is known of where the engine sees defects.")]
    return [
        tag("h2", "Figures"),
        tag("p", "None of them depends on the threshold. 1 is the best value of each.", class_="quiet"),
        tag("div", tag("table", tag("tbody", *rows)), class_="card scroll"),
        *remark,
    ]


def _classes(classes: dict[str, ClassFigures]) -> list[Element]:
    if not classes:
        return []
    located = any(found.pixels for found in classes.values())
    names = ["caught", "image AUROC", *(["pixel AP", "AUPRO@0.3", "masks"] if located else [])]
    head = tag("tr", tag("th", "kind of defect"), *(_number_head(name) for name in names))
    rows = [_class_row(label, found, located=located) for label, found in classes.items()]
    return [
        tag("h2", "Kinds of defects"),
        tag("p", "Each kind against all good parts.", class_="quiet"),
        tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="card scroll"),
    ]


def _number_head(name: str) -> Element:
    return tag("th", name, class_="number optional" if name in {"AUPRO@0.3", "masks"} else "number")


def _class_row(label: str, found: ClassFigures, *, located: bool) -> Element:
    caught = found.caught or Share(0, 0)
    cells = [
        tag("td", f"{caught.hits} of {caught.count} ({percent(caught.value)})", _bar(caught.value), class_="number"),
        tag("td", _figure(found.image_auroc), class_="number"),
    ]
    if located:
        for key, kind in (("pixel_ap", "number"), ("aupro", "number optional")):
            cells.append(tag("td", _figure(found.pixels[key]) if found.pixels else "-", class_=kind))
        cells.append(tag("td", str(found.masked), class_="number optional"))
    return tag("tr", tag("th", label), *cells)


def _bar(share: float) -> Element:
    return tag("span", tag("i", style=f"width:{share * 100:.1f}%"), class_="bar")


def _gallery(evaluation: Evaluation) -> list[Element]:
    found = [tag("h2", "Parts"), tag("p", PICTURES, class_="quiet")]
    for choice in choices(evaluation):
        parts = [_part(evaluation, k) for k in choice.indices]
        found += [
            tag("h3", choice.title),
            tag("p", choice.remark, class_="quiet"),
            tag("div", *parts, class_="gallery"),
        ]
    return found


def _part(evaluation: Evaluation, index: int) -> Element:
    sample, score = evaluation.samples[index], float(evaluation.inspection.scores[index])
    level = evaluation.bundle.manifest.output.level(evaluation.threshold)
    photo, heat = part_pictures(sample, evaluation.inspection.heatmaps[index], level)
    rejected = score > evaluation.threshold
    error = {(True, False): ": false reject", (False, True): ": missed"}.get((rejected, sample.defective), "")
    caption = tag(
        "figcaption",
        tag("span", ("NG" if rejected else "OK") + error, class_="chip wrong" if error else "chip right"),
        tag("b", sample.label),
        tag("span", f"score {score:.3g}, threshold {evaluation.threshold:.3g}"),
        tag("span", f"{sample.label}/{sample.path.name}", class_="file"),
    )
    pictures = [
        tag("img", src=source, alt=f"{what} of {sample.path.name}", loading="lazy")
        for source, what in ((photo, "photo"), (heat, "heatmap"))
    ]
    return tag("figure", tag("div", *pictures, class_="pair"), caption, class_="card")


def _latency(evaluation: Evaluation) -> list[Element]:
    shown = {"median": 50, "90%": 90, "99%": 99, "longest": 100}
    rows = [
        tag("tr", tag("th", name), tag("td", f"{evaluation.latency_ms(at):.1f} ms", class_="number"))
        for name, at in shown.items()
    ]
    how = (
        f"From submit to result of one image at a time, {evaluation.precision}, on this machine with {os.cpu_count()}"
        " processors; without decoding, resizing and transport. Other programs on the machine make it longer."
    )
    return [
        tag("h2", "Latency"),
        tag("p", how, class_="quiet"),
        tag("div", tag("table", tag("tbody", *rows)), class_="card small"),
    ]


def _engine(evaluation: Evaluation) -> list[Element]:
    rows = [tag("tr", tag("th", name), tag("td", str(value))) for name, value in _facts(evaluation).items()]
    return [
        tag("h2", "The engine"),
        tag("div", tag("table", tag("tbody", *rows), class_="facts"), class_="card"),
        tag("h2", "How to read this"),
        *(tag("p", text) for text in _reading(evaluation)),
    ]


def _facts(evaluation: Evaluation) -> dict[str, Any]:
    manifest = evaluation.bundle.manifest
    spec, training = manifest.input, manifest.training
    settings = ", ".join(f"{name} {value}" for name, value in training.settings.items())
    declared = f"{percent(manifest.threshold.false_reject_rate)}, from {manifest.threshold.samples} good parts"
    origin = ", ".join(filter(None, (manifest.threshold.source, manifest.threshold.calibrated)))
    return {
        "engine": f"{evaluation.bundle.label}, made {manifest.created}",
        "threshold": f"{evaluation.threshold:.6g}. {manifest.threshold.statement}",
        "declared false rejects": declared,
        **({"calibrated on": origin} if origin else {}),
        **({"warnings": " ".join(manifest.threshold.warnings)} if manifest.threshold.warnings else {}),
        "method": training.method,
        "backbone": f"{training.backbone} (weights: {training.weights_licence})",
        "input": f"{spec.width} x {spec.height}, {'gray' if spec.channels == 1 else 'colour'}",
        "heatmap": f"{manifest.output.width} x {manifest.output.height}",
        "trained on": f"{training.images} images of good parts, SHA-256 {training.data_sha256}",
        "settings": settings or "-",
        "bundle": f"SHA-256 of the manifest {evaluation.bundle.digest}",
    }


def _reading(evaluation: Evaluation) -> list[str]:
    height, width = evaluation.bundle.manifest.input.height, evaluation.bundle.manifest.input.width
    lost = sum(found.images - found.masked for found in evaluation.figures.classes.values())
    if not evaluation.figures.pixels.region_count:
        return [READING]
    pixels = f"Pixel figures compare the heatmap, enlarged to {width} x {height}, with the masks reduced to that size."
    unmasked = f" {lost} defective images have no mask there and count for the image figures alone." if lost else ""
    return [READING, pixels + unmasked]


def _figure(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
