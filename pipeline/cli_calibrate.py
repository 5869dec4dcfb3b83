"""``dmdd calibrate``: another threshold for an engine, by declared risk, without rebuilding the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_engines import STORE, JsonOption, NameArgument, PrecisionOption, StoreOption, TargetOption

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from pipeline.records import Fields

REDIS = "redis://127.0.0.1:6379/0"
SHOWN = 20

GoodOption = Annotated[Path | None, typer.Option(help="Folder of images of good parts, none of them trained on.")]
DefectsOption = Annotated[
    Path | None, typer.Option(help="Folder of images of defective parts, flat or a folder a kind.")
]
RateOption = Annotated[
    float | None,
    typer.Option(
        "--false-rejects",
        help="Share of good parts that may be rejected; default: 0.01, or the smallest that the parts support.",
        min=1e-5,
        max=0.5,
    ),
]
UrlOption = Annotated[str, typer.Option("--redis", envvar="REDIS_URL", help="Address of Redis.")]
LineOption = Annotated[str, typer.Option(help="Name of the line.")]
CameraOption = Annotated[
    list[str] | None, typer.Option("--camera", help="Take live parts of this camera; may be repeated.")
]
SinceOption = Annotated[str, typer.Option(help="Arrival of the first part: 2026-01-31T06:00, local unless it says.")]
UntilOption = Annotated[str, typer.Option(help="Arrival after the last part; default: now.")]
ExceptOption = Annotated[
    list[str] | None,
    typer.Option("--except", help="A part that is not good: its id, or camera/session/seq; may be repeated."),
]
SimulatedOption = Annotated[bool, typer.Option("--simulated", help="Take simulated parts too, for a trial.")]


def calibrate(
    engine: NameArgument,
    good: GoodOption = None,
    defects: DefectsOption = None,
    false_rejects: RateOption = None,
    camera: CameraOption = None,
    line: LineOption = "line1",
    since: SinceOption = "",
    until: UntilOption = "",
    excluded: ExceptOption = None,
    simulated: SimulatedOption = False,
    url: UrlOption = REDIS,
    store: StoreOption = STORE,
    activate: Annotated[bool, typer.Option(help="Activate the new version.")] = False,
    target: TargetOption = "openvino",
    precision: PrecisionOption = "fp32",
    json: JsonOption = None,
) -> None:
    """Give an engine the threshold that rejects no more good parts than you declare.

    The good parts are images (--good), or live parts that the line has scored (--camera, --since). Of live parts,
    EVERY scored one counts as good, those answered NG too: look at these first, and name the defective ones by
    --except. Leaving out NG parts that are good makes the next threshold reject even more of them.

    The result is a new version in the store: same model, same maps, another threshold, with its evidence.

      dmdd calibrate washer --good data/fresh --defects data/rejects --false-rejects 0.005

      dmdd calibrate washer --camera cam1 --since 2026-01-31T06:00 --except P-1041 --activate
    """
    from engines.build import Target
    from engines.calibration import CalibrationError, drift
    from engines.calibration import calibrate as choose
    from engines.store import Store
    from pipeline import recalibrate

    opened = Store(store)
    bundle, built = opened.resolve(engine), Target(kind=target, precision=precision, lanes=1, max_batch=1)
    if good is not None and not camera:
        parts = recalibrate.from_folder(bundle, good, built)
    elif camera and good is None:
        period = recalibrate.period_of(bundle, line, camera, since, until, excluded or [], simulated=simulated)
        parts = recalibrate.from_line(url, period)
    else:
        raise CalibrationError("give either --good FOLDER, or --camera CAM with --since TIME")
    _show_rejected(parts.rejected)
    bad = recalibrate.score_defects(bundle, defects, built) if defects else None
    notes = (*parts.warnings, *drift(bundle.manifest.threshold, bundle.evidence(), parts.scores))
    chosen = choose(parts.scores, false_rejects, parts.source, defects=bad, counts=parts.counts, warnings=notes)
    added = recalibrate.store_version(opened, engine, bundle, *chosen, built)
    if activate:
        opened.activate(added.folder.parent.name, added.version)
    _report(bundle, added, activate)
    if json is not None:
        import msgspec

        json.write_bytes(msgspec.json.format(msgspec.json.encode({"engine": added.label, "threshold": chosen[0]})))


def _show_rejected(rejected: Sequence[Fields]) -> None:
    """Name the rejected parts that count as good, the most striking first: somebody vouches for them."""
    worst = sorted(rejected, key=lambda fields: -float(fields["score"]))
    for fields in worst[:SHOWN]:
        name = fields["part"] or "{camera}/{session}/{seq}".format_map(fields)
        typer.echo(f"answered NG, counts as good: {name}, score {fields['score']}", err=True)
    if len(worst) > SHOWN:
        typer.echo(f"answered NG, counts as good: {len(worst) - SHOWN} more with lower scores", err=True)


def _report(before: Bundle, added: Bundle, activated: bool) -> None:
    from engines.calibration import recall_in_words

    threshold = added.manifest.threshold
    typer.echo(f"threshold {before.manifest.threshold.value:.6g} -> {threshold.value:.6g}")
    typer.echo(f"from {threshold.source}")
    typer.echo(threshold.statement)
    if threshold.recall is not None:
        typer.echo(recall_in_words(threshold.recall))
    for warning in threshold.warnings:
        typer.echo(f"WARNING: {warning}", err=True)
    if activated:
        typer.echo(f"{added.label} is active; a line takes it at its next start")
    else:
        typer.echo(f"{added.label} is stored; `dmdd engines activate {added.label}` puts it to use")
