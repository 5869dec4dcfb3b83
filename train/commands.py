"""``dmdd train``: from a folder of images to a validated, active engine."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from engines import bundle as bundles
from engines.build import Target, compile_engine, parity_gate
from engines.bundle import Bundle, Manifest, Training
from engines.frames import InputSpec, Pixels
from engines.store import Store
from train import data
from train.dmdd import Dmdd
from train.export import Detector, fit_fusion, fit_threshold, parity_frames, run
from train.features import FrozenTeacher
from train.foreground import foregrounds
from train.onnx_export import to_onnx
from train.synthesis import Synthesizer
from train.teacher import STRIDES, Teacher
from train.trainer import Schedule, Trainer, TrainingError

METHODS: dict[str, type[nn.Module]] = {"dmdd": Dmdd}
HOLDOUT = 0.15
LICENCE = {"efficientnet_lite0": "Apache-2.0", "efficientnet_lite1": "Apache-2.0", "efficientnet_lite2": "Apache-2.0"}


@dataclass(frozen=True)
class Options:
    """What ``dmdd train`` can be told; see ``dmdd train --help``."""

    backbone: str = "efficientnet_lite0"
    weights: Path | None = None
    size: tuple[int, int] = (256, 256)
    steps: int = 0
    batch: int = 8
    seed: int = 0
    rate: float = 4e-3
    foreground: str = "auto"
    strides: tuple[int, ...] = STRIDES
    dims: int = 112
    textures: Path | None = None
    false_rejects: float = 0.01

    def steps_for(self, images: int) -> int:
        """The steps to train: as told, or by the number of images."""
        return self.steps or (1500 if images < 100 else 1800)


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
    if method not in METHODS:
        msg = f"method {method!r}: one of {', '.join(METHODS)}"
        raise TrainingError(msg)
    if min(options.size) < 64 or any(side % 32 for side in options.size):
        msg = f"size {options.size[0]}x{options.size[1]}: multiples of 32, at least 64"
        raise TrainingError(msg)
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
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = data.good_images(folder)
    channels = data.infer_channels(paths)
    spec = InputSpec(options.size[1], options.size[0], channels, "bgr" if channels == 3 else "mono")
    kept, held = data.split(len(paths), HOLDOUT, options.seed)
    frames = data.load(paths, spec)
    teacher = Teacher(options.backbone, options.weights, channels, options.strides).to(device)
    height_width = options.size[1], options.size[0]
    method = METHODS[method_name](teacher.widths, height_width, dims=options.dims)
    method = method.to(device).to(memory_format=torch.channels_last)
    synthesizer, ratio = _synthesizer(frames[kept], options)
    console.print(
        f"{len(paths)} good images ({len(held)} held out), {'gray' if channels == 1 else 'colour'},"
        f" foreground {ratio}, {options.backbone}, {device.type}"
    )
    schedule = Schedule(steps=options.steps_for(len(paths)), batch=options.batch, rate=options.rate, seed=options.seed)
    digest = data.digest(paths)
    fingerprint = f"{method_name} {options} {digest}"
    frozen = FrozenTeacher(teacher, spec.shape, device)
    trainer = Trainer(
        method,
        frozen,
        synthesizer,
        schedule,
        device,
        work / "checkpoint.pt",
        fingerprint,
    )
    _train(trainer, schedule, console)
    _observe(method.eval(), FrozenTeacher(teacher, spec.shape, device, exact=True), synthesizer.images)
    settings = {**vars(schedule), "foreground": ratio, "size": list(options.size), "holdout": HOLDOUT}
    training = Training(
        method=method_name,
        backbone=options.backbone,
        weights_licence=LICENCE.get(options.backbone, "see the backbone's source"),
        images=len(paths),
        data_sha256=digest,
        seed=options.seed,
        settings=settings,
    )
    return export(teacher, method, frames[held], synthesizer, options, (name, spec, training), target)


def export(
    teacher: Teacher,
    method: nn.Module,
    held: Pixels,
    synthesizer: Synthesizer,
    options: Options,
    about: tuple[str, InputSpec, Training],
    target: Path,
) -> Bundle:
    """Calibrate on held-out good frames and write the bundle."""
    name, spec, training = about
    teacher, method = teacher.cpu(), method.cpu().eval()
    fusion, output = fit_fusion(teacher, method, held)
    detector = Detector(teacher, method, fusion, output).eval()
    scores, _ = run(detector, held)
    rng = np.random.default_rng(options.seed)
    twins = np.stack([synthesizer(k % len(synthesizer.images), rng)[0] for k in range(8)])
    manifest = Manifest(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        input=spec,
        output=output,
        threshold=fit_threshold(scores.numpy(), options.false_rejects),
        training=training,
    )
    model = to_onnx(detector, spec.shape, ["score", "heatmap"])
    return bundles.write(target, manifest, model, parity_frames(held, twins, detector))


def validate(bundle: Bundle) -> None:
    """Pass the compiled engine through the parity gate."""
    engine = compile_engine(bundle, Target(lanes=1, max_batch=4))
    lane = engine.make_lane()
    try:
        parity_gate(bundle, lane)
    finally:
        lane.close()
        engine.close()


@torch.no_grad()
def _observe(method: nn.Module, teacher: FrozenTeacher, frames: Pixels) -> None:
    """Let the trained method see the good images once more, undistorted."""
    for at in range(0, len(frames), 8):
        method.observe(teacher(frames[at : at + 8]))  # type: ignore[operator]
    method.settle()  # type: ignore[operator]


def _synthesizer(frames: Pixels, options: Options) -> tuple[Synthesizer, str]:
    masks, method, ratio = foregrounds(frames, options.foreground)  # type: ignore[arg-type]
    textures = None
    if options.textures is not None:
        height, width, channels = frames.shape[1:]
        spec = InputSpec(height, width, channels, "bgr" if channels == 3 else "mono")
        paths = [p for p in sorted(options.textures.rglob("*")) if p.suffix.lower() in data.SUFFIXES]
        textures = data.load(paths, spec)
    return Synthesizer(frames, masks, textures), f"{method} ({ratio:.0%} of the image)"


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
