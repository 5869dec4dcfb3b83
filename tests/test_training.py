"""Training, export and evaluation, small but whole: what comes out is a verified engine that equals its model."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from rich.console import Console

from engines import bundle as bundles
from engines.build import ParityError, Target, compile_engine, parity_gate
from engines.bundle import Bundle
from engines.store import Store
from pipeline.simulator import DEFECTS, GOOD, Simulator
from train import commands, trainer
from train.commands import Options, build_bundle, train_command
from train.data import DataError
from train.dmdd import Dmdd, aim_loss, at_scale, ngm_loss, segmentation_loss
from train.evaluate import evaluate_command
from train.export import fit_threshold
from train.statistics import ResidualStatistics
from train.teacher import Teacher, TeacherError
from train.trainer import TrainingError

TINY = Options(size=(64, 64), steps=4, batch=2, dims=8, strides=(4, 8, 16), false_rejects=0.2)


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


def test_a_trained_engine_is_stored_active_and_verified(store: Store) -> None:
    """`dmdd train` ends with an active engine whose manifest says where it comes from."""
    engine = store.get("caps")
    assert store.active("caps") == engine.version == "1"
    assert engine.manifest.training.method == "dmdd"
    assert engine.manifest.training.images == 12
    assert engine.manifest.input.shape == (64, 64, 3)
    assert engine.manifest.threshold.samples == 2


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


def test_evaluate_writes_every_figure(store: Store, parts: Path, tmp_path: Path) -> None:
    """`dmdd evaluate --json` names the figures that are promised, within 0..1."""
    report = tmp_path / "figures.json"
    evaluate_command("caps", parts, store=store.root, precision="fp32", json_file=report)
    figures = json.loads(report.read_text())
    for name in ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"):
        assert 0 <= figures[name] <= 1
    assert figures["images"] == 6
    assert figures["classes"]["stain"]["images"] == 3


@pytest.mark.timeout(300)
def test_a_killed_training_goes_on_where_it_was(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after two of four steps, the same command ends with the very model of an undisturbed run."""
    monkeypatch.setattr(trainer, "CHECKPOINT_EVERY", 2)
    undisturbed = build(parts, tmp_path / "a")
    steps: list[int] = []
    whole_step = trainer.Trainer._step

    def step_until_killed(self: trainer.Trainer, *arguments: object) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return whole_step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer.Trainer, "_step", step_until_killed)
    with pytest.raises(KeyboardInterrupt):
        build(parts, tmp_path / "b")
    resumed = build(parts, tmp_path / "b")
    assert len(steps) == 5
    assert np.allclose(undisturbed.parity().scores, resumed.parity().scores, atol=1e-4)


def test_a_checkpoint_of_other_settings_is_not_taken_up(parts: Path, tmp_path: Path) -> None:
    """Another seed starts anew instead of going on from a stranger's state."""
    build(parts, tmp_path / "w")
    seen: list[int] = []
    original = commands._train

    def watch(run: trainer.Trainer, *rest: object) -> None:
        seen.append(run.start)
        original(run, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "_train", watch)
        build_bundle(
            parts, "dmdd", "x", replace(TINY, seed=9), tmp_path / "w", tmp_path / "o", Console(file=io.StringIO())
        )
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
    with pytest.raises(TrainingError, match="one of dmdd"):
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


def test_residual_statistics_know_each_place() -> None:
    """What is usual at one place is unusual at another; observed parts lie at about 1."""
    torch.manual_seed(0)
    spread = torch.tensor([1.0, 10.0]).view(1, 1, 1, 2)
    statistics = ResidualStatistics(4, 1, 2)
    good = torch.randn(400, 4, 1, 2) * spread
    for at in range(0, 400, 50):
        statistics.observe(good[at : at + 50])
    statistics.fit()
    assert 0.5 < statistics(good).mean().item() < 1.1  # below 1 where quiet: shrinkage lends it the loud place's spread
    odd = torch.full((1, 4, 1, 2), 8.0)
    quiet, loud = statistics(odd).flatten().tolist()
    assert quiet > 3 > loud


def test_maps_keep_their_order_of_weights() -> None:
    """A method gives one map a weight, at a quarter of the frame's size."""
    method = Dmdd([24, 40, 112, 320], (64, 64), dims=8).eval()
    maps = method.maps([torch.randn(2, c, s, s) for c, s in ((24, 16), (40, 8), (112, 4), (320, 2))])
    assert maps.shape == (2, len(method.weights), 16, 16)


@pytest.mark.parametrize(("count", "rate", "rank"), [(99, 0.01, 99), (199, 0.05, 190), (19, 0.2, 16)])
def test_the_threshold_is_the_conformal_quantile(count: int, rate: float, rank: int) -> None:
    """The k-th smallest of n held-out scores, k = ceil((n + 1)(1 - rate))."""
    scores = np.random.default_rng(0).permutation(count).astype(np.float32)
    threshold = fit_threshold(scores, rate)
    assert threshold.value == rank - 1
    assert "at most" in threshold.statement


def test_a_sample_too_small_for_the_rate_is_said_to_be() -> None:
    """Five good parts cannot support one false reject in a hundred: the statement names how many could."""
    threshold = fit_threshold(np.arange(5, dtype=np.float32), 0.01)
    assert threshold.value > 4
    assert "99 are needed" in threshold.statement
