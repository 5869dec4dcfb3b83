"""``dmdd train``: from a folder of images to a validated, active engine."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from engines import bundle as bundles
from engines.build import Target, compile_engine, parity_gate
from engines.bundle import Bundle, Manifest, Training
from engines.calibration import calibrate, supported_rate
from engines.frames import InputSpec, Pixels
from engines.store import Store
from train import data
from train.export import Detector, fit_scales, parity_frames, run
from train.features import CleanMaps, FrozenTeacher
from train.foreground import foregrounds
from train.material import TrainingMaterial
from train.method import Recipe, check_options, make, recipe_of
from train.onnx_export import to_onnx
from train.run_folder import write_curves, write_settings, write_syntheses
from train.synthesis import Synthesizer
from train.teacher import STRIDES, Teacher
from train.tiles import Tiling
from train.trainer import Schedule, Trainer

HOLDOUT = 0.15
FEW = 100
"""Below so many good images a method trains fewer steps."""
LICENCE = {"efficientnet_lite0": "Apache-2.0", "efficientnet_lite1": "Apache-2.0", "efficientnet_lite2": "Apache-2.0"}


@dataclass(frozen=True)
class Options:
    """What ``dmdd train`` can be told; see ``dmdd train --help``."""

    backbone: str = "efficientnet_lite0"
    weights: Path | None = None
    size: tuple[int, int] = (256, 256)
    tile: int = 0
    overlap: float = 0.25
    steps: int = 0
    batch: int = 8
    seed: int = 0
    rate: float = 0.0
    patience: int = 0
    foreground: str = "auto"
    strides: tuple[int, ...] = STRIDES
    textures: Path | None = None
    defects: Path | None = None
    false_rejects: float | None = None
    choices: dict[str, Any] = field(default_factory=dict)

    @property
    def tiling(self) -> Tiling:
        """How frames are cut."""
        return Tiling.of((self.size[1], self.size[0]), self.tile, self.overlap)

    def schedule(self, recipe: Recipe, images: int) -> Schedule:
        """The schedule: as told, else as the method wants it for so many good images."""
        steps = self.steps or (recipe.steps_few if images < FEW else recipe.steps)
        rate = self.rate or recipe.rate
        return Schedule(steps, self.batch, rate, recipe.schedule, seed=self.seed, patience=self.patience)


def train_command(
    folder: Path,
    *,
    method: str,
    name: str,
    store: Path,
    activate: bool,
    json_file: Path | None,
    options: Options,
) -> Bundle:
    """Train, export, validate, store and activate an engine.

    Raises:
        TrainingError, DataError, TeacherError, ParityError: each says what to do.
    """
    check_options(method, options.choices)
    _ = options.tiling  # refuses a size that cannot be
    console, started = Console(stderr=True), time.monotonic()
    opened = Store(store)
    with tempfile.TemporaryDirectory() as staging:
        built = build_bundle(folder, method, name, options, opened.root / ".runs" / name, Path(staging) / "b", console)
        added = opened.add(built.folder, name)
    validate(added)
    if activate:
        opened.activate(name, added.version)
    seconds = time.monotonic() - started
    threshold = added.manifest.threshold
    console.print(
        f"{added.label} {'is active' if activate else 'is stored'} after {seconds:.0f} s. {threshold.statement}"
    )
    if json_file is not None:
        figures = {"engine": added.label, "seconds": round(seconds, 1), "threshold": threshold.value}
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    return added


def build_bundle(
    folder: Path, method_name: str, name: str, options: Options, work: Path, target: Path, console: Console
) -> Bundle:
    """Train on the good images in ``folder`` and write the bundle into ``target``."""
    return export(learn(folder, method_name, options, work, console), name, target)


@dataclass(frozen=True)
class Learned:
    """A trained method, and what its bundle is made from.

    Attributes:
        detector: The engine as one torch module.
        held: Held-out good frames, uint8 ``(n, H, W, C)``; ``kept`` are those that were learned from.
    """

    detector: Detector
    held: Pixels
    kept: Pixels
    spec: InputSpec
    training: Training
    options: Options


def learn(folder: Path, method_name: str, options: Options, work: Path, console: Console) -> Learned:
    """Train on the good images in ``folder``, as far as the engine is a torch module."""
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = data.good_images(folder)
    channels = data.infer_channels(paths)
    spec = InputSpec(options.size[1], options.size[0], channels, "bgr" if channels == 3 else "mono")
    kept, held = data.split(len(paths), HOLDOUT, options.seed)
    supported_rate(len(held), options.false_rejects, len(paths))  # before hours of training, not after
    frames, tiling = data.load(paths, spec), options.tiling
    teacher = Teacher(options.backbone, options.weights, channels, options.strides).to(device)
    method = make(method_name, teacher, tiling.tile, options.choices)
    method = method.to(device).to(memory_format=torch.channels_last)
    synthesizer, foreground = _synthesizer(tiling.cut_pixels(frames[kept]), options)
    console.print(
        f"{len(paths)} good images ({len(held)} held out), {'gray' if channels == 1 else 'colour'},"
        f" foreground {foreground}, {tiling.count} tile(s) an image, {options.backbone}, {device.type}"
    )
    schedule = options.schedule(recipe_of(method_name), len(paths))
    digest = data.digest(paths)
    settings = {
        **vars(schedule), "foreground": foreground, "size": list(options.size), "tile": list(tiling.tile),
        "holdout": HOLDOUT, "options": options.choices,
    }  # fmt: skip
    write_settings(work, {"method": method_name, "data": folder, "data_sha256": digest, **settings})
    write_syntheses(work, synthesizer, options.seed)
    identity = replace(options, false_rejects=None)  # a threshold does not change what is learned
    run_of = Run(f"{method_name} {identity} {digest}", device, work, options.seed)
    _learn(method, teacher, synthesizer, tiling.cut_pixels(frames[held]), schedule, run_of, console)
    training = Training(
        method=method_name,
        backbone=options.backbone,
        weights_licence=LICENCE.get(options.backbone, "see the backbone's source"),
        images=len(paths),
        data_sha256=digest,
        seed=options.seed,
        settings=settings,
    )
    teacher, method = teacher.cpu(), method.cpu().eval()
    detector = Detector(teacher, method, fit_scales(teacher, method, frames[held], tiling), tiling).eval()
    return Learned(detector, frames[held], frames[kept], spec, training, options)


@dataclass(frozen=True)
class Run:
    """A run of training: what it is, where it computes, where it keeps its files, its seed."""

    fingerprint: str
    device: torch.device
    folder: Path
    seed: int


def _learn(
    method: nn.Module,
    teacher: Teacher,
    synthesizer: Synthesizer,
    held: Pixels,
    schedule: Schedule,
    run_of: Run,
    console: Console,
) -> None:
    """Train by gradient steps, then let the method take in the rest."""
    shape, device = synthesizer.images.shape[1:], run_of.device
    fast = FrozenTeacher(teacher, shape, device)
    exact = FrozenTeacher(teacher, shape, device, exact=True)
    clean = CleanMaps(exact, synthesizer.images)
    validation = replace(synthesizer, images=held, foregrounds=None, defects=())
    checkpoint = run_of.folder / "checkpoint.pt"
    trainer = Trainer(method, fast, synthesizer, validation, schedule, device, checkpoint, run_of.fingerprint, clean)
    _train(trainer, schedule, console)
    write_curves(run_of.folder, trainer.curves)
    method.eval()
    console.print("taking in what good parts look like")
    method.finish(TrainingMaterial(exact, clean, synthesizer, held, device, run_of.seed))  # type: ignore[operator]


def export(learned: Learned, name: str, target: Path) -> Bundle:
    """Calibrate on held-out good frames and write the bundle."""
    detector, options = learned.detector, learned.options
    scores, _ = run(detector, learned.held)
    source = "held-out good images of the training data; they also set the scale of the maps"
    threshold, evidence = calibrate(scores.numpy(), options.false_rejects, source)
    rng = np.random.default_rng(options.seed)
    whole = Synthesizer(learned.kept[:8])
    twins = np.stack([whole(k % len(whole.images), rng)[0] for k in range(8)])
    manifest = Manifest(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        input=learned.spec,
        output=detector.output,
        threshold=threshold,
        training=learned.training,
    )
    model = to_onnx(detector, learned.spec.shape, ["score", "heatmap"])
    return bundles.write(target, manifest, model, parity_frames(learned.held, twins, detector), evidence)


def validate(bundle: Bundle) -> None:
    """Pass the compiled engine through the parity gate."""
    engine = compile_engine(bundle, Target(lanes=1, max_batch=4))
    lane = engine.make_lane()
    try:
        parity_gate(bundle, lane)
    finally:
        lane.close()
        engine.close()


def _synthesizer(frames: Pixels, options: Options) -> tuple[Synthesizer, str]:
    masks, method, ratio = foregrounds(frames, options.foreground)  # type: ignore[arg-type]
    height, width, channels = frames.shape[1:]
    spec = InputSpec(height, width, channels, "bgr" if channels == 3 else "mono")
    textures = None
    if options.textures is not None:
        paths = [p for p in sorted(options.textures.rglob("*")) if p.suffix.lower() in data.SUFFIXES]
        if not paths:
            msg = f"{options.textures}: no images; --textures takes a folder of texture photographs"
            raise data.DataError(msg)
        textures = data.load(paths, spec)
    return Synthesizer(
        frames, masks, textures, _real_defects(options, channels)
    ), f"{method} ({ratio:.0%} of the image)"


def _real_defects(options: Options, channels: int) -> list[tuple[Pixels, NDArray[np.bool_]]]:
    """Real defects as the method sees images: at the frame's size, cut into tiles."""
    if options.defects is None:
        return []
    width, height = options.size
    spec = InputSpec(height, width, channels, "bgr" if channels == 3 else "mono")
    found = []
    for image, mask in data.load_defects(options.defects, spec):
        images = options.tiling.cut_pixels(image[None])
        masks = options.tiling.cut_pixels(mask[None, ..., None].astype(np.uint8))[..., 0] > 0
        found += [(tile, where) for tile, where in zip(images, masks, strict=True) if where.any()]
    return found


def _train(trainer: Trainer, schedule: Schedule, console: Console) -> None:
    columns: list[Any] = [
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    ]  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=schedule.steps, completed=trainer.start, losses="")
        smooth: dict[str, float] = {}

        def report(step: int, losses: dict[str, float]) -> None:
            for key, loss in losses.items():
                smooth[key] = 0.98 * smooth.get(key, loss) + 0.02 * loss
            shown = "  ".join(f"{key} {value:.3f}" for key, value in smooth.items())
            progress.update(task, completed=step, losses=shown)
            if not console.is_terminal and step % 500 == 0:
                console.print(f"step {step} of {schedule.steps}: {shown}")

        trainer.run(report)
