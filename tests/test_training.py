"""Training, export and evaluation, small but whole: what comes out is a verified engine that equals its model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from engines import bundle as bundles
from engines.build import ParityError, Target, compile_engine, parity_gate
from engines.bundle import Bundle
from engines.calibration import CalibrationError, verify
from engines.store import Store
from pipeline.simulator import DEFECTS, GOOD, Simulator
from train import commands, fusion, material, trainer
from train.commands import Options, build_bundle, train_command
from train.data import DataError
from train.errors import TrainingError
from train.layers import at_scale
from train.method import Pairs
from train.methods.dmdd import Dmdd, DmddOptions, aim_loss, ngm_loss, segmentation_loss
from train.teacher import Teacher, TeacherError

SMALL = {"prototypes": 16, "dims": 8}
TINY = Options(size=(64, 64), steps=4, batch=2, strides=(4, 8, 16), choices=SMALL)


@pytest.fixture(autouse=True, scope="module")
def brief() -> Iterator[None]:
    """Less of everything that only accuracy needs: the promises are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "FRESH_PAIRS", 72)
        patch.setattr(fusion, "SAMPLES", 4000)
        patch.setattr(fusion, "STEPS", 100)
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in MVTec layout: 12 good parts to train on, 3 good and 3 defective ones to test."""
    root = tmp_path_factory.mktemp("parts")
    simulator = Simulator("cap", width=64, height=64, seed=3)
    for split, label, count in (("train", GOOD, 12), ("test", GOOD, 3), ("test", "stain", 3)):
        folder = root / split / label
        folder.mkdir(parents=True)
        for index in range(count):
            shot = simulator.render(label, np.random.default_rng([len(split), index]))
            cv2.imwrite(str(folder / f"{index}.png"), shot.image)
            if label in DEFECTS:
                masks = root / "ground_truth" / label
                masks.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(masks / f"{index}_mask.png"), shot.mask.astype(np.uint8) * 255)
    return root


@pytest.fixture(scope="module")
def store(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with an engine that was trained on them."""
    root = tmp_path_factory.mktemp("store")
    train_command(parts, method="dmdd", name="caps", store=root, activate=True, json_file=None, options=TINY)
    return Store(root)


def build(parts: Path, work: Path, options: Options = TINY) -> Bundle:
    """Train into a folder of its own."""
    return build_bundle(parts, "dmdd", "caps", options, work, work / "bundle", Console(file=io.StringIO()))


def learn(parts: Path, work: Path, options: Options = TINY) -> nn.Module:
    """Train without exporting, which takes longer than all the rest; return the method."""
    methods: list[nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "export", lambda learned, *_: methods.append(learned.detector.method))
        build(parts, work, options)
    return methods[0]


def test_a_trained_engine_is_stored_active_and_verified(store: Store) -> None:
    """`dmdd train` ends with an active engine whose manifest says where it comes from."""
    engine = store.get("caps")
    assert store.active("caps") == engine.version == "1"
    assert engine.manifest.training.method == "dmdd"
    assert engine.manifest.training.images == 12
    assert engine.manifest.input.shape == (64, 64, 3)
    threshold, evidence = engine.manifest.threshold, engine.evidence()
    assert evidence is not None
    verify(threshold, evidence)
    assert (threshold.samples, threshold.false_reject_rate) == (2, pytest.approx(1 / 3))
    assert "supports no smaller rate" in threshold.statement


def test_a_rate_that_cannot_be_kept_is_refused_before_training(parts: Path, tmp_path: Path) -> None:
    """Two of twelve images are held out: the message says how many would do, and no step is made."""
    with pytest.raises(CalibrationError, match=r"needs 99 held-out good parts, about 594 .* 2 of 12 are held out"):
        build(parts, tmp_path, replace(TINY, false_rejects=0.01))
    assert list(tmp_path.iterdir()) == []


def test_the_compiled_engine_equals_the_model_at_every_batch_size(store: Store) -> None:
    """Scores and heatmaps of the compiled graph are the torch model's, in batches of 1 to 4."""
    bundle = store.get("caps")
    engine = compile_engine(bundle, Target(lanes=1, max_batch=4))
    lane = engine.make_lane()
    differences = parity_gate(bundle, lane)
    lane.close()
    engine.close()
    assert {d.batch for d in differences} == {1, 2, 3, 4}
    assert max(abs(d.score - d.expected) for d in differences) < 1e-3
    assert max(d.heatmap_mean for d in differences) < 0.1


def test_an_engine_that_differs_from_its_reference_is_refused(store: Store, tmp_path: Path) -> None:
    """The parity gate refuses an engine whose stored results are another model's."""
    original = store.get("caps")
    parity = original.parity()
    wrong = replace(parity, scores=parity.scores + 0.5)
    other = bundles.write(tmp_path / "b", original.manifest, original.model.read_bytes(), wrong)
    engine = compile_engine(other, Target(lanes=1, max_batch=2))
    lane = engine.make_lane()
    with pytest.raises(ParityError, match="differ from the reference"):
        parity_gate(other, lane)
    lane.close()
    engine.close()


def test_a_killed_training_goes_on_where_it_was(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after two of four steps, the same command ends with the very model of an undisturbed run."""
    monkeypatch.setattr(trainer, "CHECKPOINT_EVERY", 2)
    undisturbed = learn(parts, tmp_path / "a")
    steps: list[int] = []
    whole_step = trainer.Trainer._step

    def step_until_killed(self: trainer.Trainer, *arguments: object) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return whole_step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer.Trainer, "_step", step_until_killed)
    with pytest.raises(KeyboardInterrupt):
        learn(parts, tmp_path / "b")
    resumed = learn(parts, tmp_path / "b")
    assert len(steps) == 5
    for name, tensor in undisturbed.state_dict().items():
        assert torch.allclose(tensor.float(), resumed.state_dict()[name].float(), atol=1e-3), name


def test_a_checkpoint_of_other_settings_is_not_taken_up(parts: Path, tmp_path: Path) -> None:
    """Another seed starts anew instead of going on from a stranger's state."""
    learn(parts, tmp_path)
    seen: list[int] = []
    original = commands._train

    def watch(run: trainer.Trainer, *rest: object) -> None:
        seen.append(run.start)
        original(run, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_train", watch)
        learn(parts, tmp_path, replace(TINY, seed=9))
    assert seen == [0]


def test_the_teacher_has_the_packaged_weights_and_is_frozen() -> None:
    """EfficientNet-Lite0 comes with real weights: known features of a known frame, no gradients, eval mode."""
    teacher = Teacher(channels=3).train()
    assert not teacher.net.training
    assert not any(p.requires_grad for p in teacher.parameters())
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).view(1, 64, 1, 1).expand(1, 64, 64, 3)
    maps = teacher(ramp)
    assert [m.shape[1:] for m in maps] == [(24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    stem = dict(teacher.net.named_parameters())["conv_stem.weight"]
    assert stem.abs().max() > 0.5  # a random initialisation stays far below


def test_a_mono_teacher_sees_gray_as_colour() -> None:
    """One channel, repeated inside the graph, gives what three equal channels give."""
    gray = torch.randint(0, 255, (1, 64, 64, 1), dtype=torch.uint8)
    for one, three in zip(Teacher(channels=1)(gray), Teacher(channels=3)(gray.expand(-1, -1, -1, 3)), strict=True):
        assert torch.allclose(one, three, atol=1e-3)


def test_any_timm_backbone_with_local_weights_is_a_teacher(tmp_path: Path) -> None:
    """A timm model with feature maps at the strides needed works from a local weights file; a wrong file is refused."""
    torch.manual_seed(1)
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    teacher = Teacher("resnet18", tmp_path / "resnet18.pth")
    maps = teacher(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert torch.equal(teacher.net.state_dict()["conv1.weight"], state["conv1.weight"])
    torch.save({"a": torch.zeros(3)}, tmp_path / "wrong.pth")
    with pytest.raises(TeacherError, match="do not fit"):
        Teacher("resnet18", tmp_path / "wrong.pth")


def test_unknown_backbones_and_methods_are_refused(parts: Path, tmp_path: Path) -> None:
    """The message names what can be had."""
    with pytest.raises(TeacherError, match="efficientnet_lite0 works offline"):
        Teacher("no_such_net")
    with pytest.raises(TrainingError, match="one of adps, dmdd"):
        train_command(parts, method="magic", name="x", store=tmp_path, activate=True, json_file=None, options=TINY)
    odd = replace(TINY, size=(100, 64))
    with pytest.raises(TrainingError, match="multiples of 32"):
        train_command(parts, method="dmdd", name="x", store=tmp_path, activate=True, json_file=None, options=odd)
    with pytest.raises(DataError, match="no images"):
        train_command(tmp_path, method="dmdd", name="x", store=tmp_path, activate=True, json_file=None, options=TINY)


def test_ngm_is_zero_for_perfect_features_and_two_a_scale_for_opposite_ones() -> None:
    """NGM is the cosine distance to the clean teacher, summed over scales."""
    clean = [torch.randn(2, 8, 4, 4), torch.randn(2, 8, 2, 2)]
    assert ngm_loss(clean, clean).item() == pytest.approx(0, abs=1e-5)
    assert ngm_loss([-m for m in clean], clean).item() == pytest.approx(4, abs=1e-5)


def test_aim_wants_likeness_where_good_and_distance_where_defective() -> None:
    """AIM is least when abnormality features mimic the teacher exactly outside the mask."""
    twin = [torch.randn(1, 8, 4, 4)]
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    orthogonal = twin[0].clone()
    orthogonal[..., :2] = (
        torch.roll(twin[0], 1, 1)[..., :2]
        - twin[0][..., :2]
        * ((torch.roll(twin[0], 1, 1) * twin[0]).sum(1, keepdim=True) / twin[0].square().sum(1, keepdim=True))[..., :2]
    )
    assert aim_loss([orthogonal], twin, mask).item() == pytest.approx(0, abs=1e-4)
    assert aim_loss(twin, twin, mask) > 0.4
    assert at_scale(mask, (4, 4))[0, 0, 0].tolist() == [1, 1, 0, 0]


def test_segmentation_loss_prefers_the_mask() -> None:
    """Logits that say the mask cost less than logits that say nothing, and those less than the opposite."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    right = (at_scale(mask, (4, 4)) * 2 - 1) * 8
    costs = [segmentation_loss(logits, mask).item() for logits in (right, right * 0, -right)]
    assert costs == sorted(costs)
    assert costs[0] < 0.1


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (DmddOptions(**SMALL), 3),
        (DmddOptions(**SMALL, whole=False), 2),
        (DmddOptions(**SMALL, branches="both", statistics="places"), 3),
        (DmddOptions(**SMALL, map="distances", statistics="prototypes"), 2),
        (DmddOptions(map="head", evidence="maps", trunk="encoder", decouple="branches"), 1),
    ],
)
def test_every_reading_of_the_method_gives_its_maps(options: DmddOptions, count: int) -> None:
    """A method gives a map for each of its weights, at a quarter of the frame's size; its losses have gradients."""
    teacher = Teacher(channels=3)
    method = Dmdd(teacher, (64, 64), options)
    images = torch.randn(2, 3, 64, 64)
    maps = teacher.features(images)
    losses = method.losses(Pairs(maps, maps, images, torch.zeros(2, 1, 64, 64)))
    assert set(losses) == {"ngm", "aim", "seg"}
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in method.student.parameters())
    with torch.no_grad():
        seen = method.eval().maps(images, maps)
    assert seen.shape == (2, count, 16, 16)
    assert count == len(method.weights) == len(method.score_weights) == len(method.scales)


def test_a_map_of_nothing_is_refused() -> None:
    """Without any distance there is nothing to fuse: the message names what to choose."""
    with pytest.raises(TrainingError, match="map=head"):
        Dmdd(Teacher(channels=3), (64, 64), DmddOptions(statistics="none", branches="none"))


def test_training_without_progress_stops_early() -> None:
    """A run ends when so many validations in a row were no better; without patience it never does."""
    run = object.__new__(trainer.Trainer)
    run.curves = [{"step": k, "val_a": loss} for k, loss in enumerate((3.0, 2.0, 2.5, 2.1, 2.0))]
    run._schedule = trainer.Schedule(patience=3)
    assert run._is_stuck()
    run._schedule = trainer.Schedule(patience=4)
    assert not run._is_stuck()
    run._schedule = trainer.Schedule(patience=0)
    assert not run._is_stuck()


def test_a_run_leaves_its_settings_curves_and_pictures(parts: Path, tmp_path: Path) -> None:
    """What a run was told, how its losses went and what its synthetic defects look like is kept in its folder."""
    learn(parts, tmp_path, replace(TINY, size=(96, 64), choices={**SMALL, "branches": "normality"}))
    assert json.loads((tmp_path / "settings.json").read_text())["options"]["branches"] == "normality"
    rows = (tmp_path / "curves.csv").read_text().splitlines()
    assert rows[0].startswith("step,ngm,aim,seg,val_ngm")
    assert len(rows) == 5
    assert cv2.imread(str(tmp_path / "syntheses.png")) is not None


def test_real_defects_are_cut_into_the_tiles_that_show_them(tmp_path: Path) -> None:
    """A defect keeps its size in pixels: it is cut from the whole frame, not shrunk to a tile."""
    image, mask = np.full((128, 128, 3), 90, np.uint8), np.zeros((128, 128), np.uint8)
    image[8:24, 70:90], mask[8:24, 70:90] = 200, 255
    cv2.imwrite(str(tmp_path / "a.png"), image)
    cv2.imwrite(str(tmp_path / "a_mask.png"), mask)
    options = Options(size=(128, 128), tile=64, overlap=0.0, defects=tmp_path)
    ((tile, where),) = commands._real_defects(options, 3)
    assert tile.shape == (64, 64, 3)
    assert int(where.sum()) == 16 * 20


def test_an_engine_of_tiles_takes_whole_frames(parts: Path, tmp_path: Path) -> None:
    """Trained on tiles, an engine takes whole frames and gives one stitched heatmap; compiled, it equals its model."""
    built = build(
        parts, tmp_path, replace(TINY, size=(128, 96), tile=64, choices={**SMALL, "statistics": "prototypes"})
    )
    assert built.manifest.training.settings["tile"] == [64, 64]
    assert built.parity().heatmaps.shape[1:] == (24, 32)
    commands.validate(built)


def test_a_threshold_alone_does_not_train_anew(parts: Path, tmp_path: Path) -> None:
    """Another declared rate goes on from the finished training."""
    learn(parts, tmp_path)
    steps: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", lambda *_: steps.append(1))
        learn(parts, tmp_path, replace(TINY, false_rejects=0.4))
    assert not steps
