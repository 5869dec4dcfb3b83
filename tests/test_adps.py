"""ADPS: its equations on tensors computed by hand, cutting and putting together, options, gradients, export."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import timm
import torch
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from train.errors import TrainingError
from train.export import SIGMA
from train.layers import gaussian, smooth
from train.method import Pairs
from train.methods.adps import (
    Adps,
    AdpsOptions,
    PostSegmentation,
    Student,
    WeightMaskBlock,
    compare,
    distillation_loss,
    focal_loss,
    join,
    split,
    stages_of,
)
from train.onnx_export import to_onnx
from train.teacher import Teacher, TeacherError

SIZE = 64
SMALL = AdpsOptions(k=4)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    """EfficientNet-Lite0 at strides 4, 8 and 16."""
    return Teacher(strides=(4, 8, 16))


def resnet(tmp_path: Path) -> Teacher:
    """A ResNet-18 with weights of no worth: here only its structure matters."""
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    return Teacher("resnet18", tmp_path / "resnet18.pth")


def images(count: int = 2, size: int = SIZE) -> Tensor:
    """Normalised images that are the same in every run."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def pairs(teacher: Teacher, count: int = 2) -> Pairs:
    """A batch whose twins are defective in their left half."""
    seen = images(count)
    mask = torch.zeros(count, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    maps = teacher.net(seen)
    return Pairs(maps, maps, seen, mask)


def lively(teacher: Teacher, options: AdpsOptions) -> Adps:
    """An untrained method whose batch norms have seen images and whose map has contrast, in evaluation mode."""
    torch.manual_seed(0)
    method = Adps(teacher, (SIZE, SIZE), options)
    for _ in range(10):
        method(images(4), teacher.net(images(4)))
    method.segment.exit.weight *= 8
    return method.eval()


def at(*vectors: tuple[float, ...]) -> Tensor:
    """A map of one row whose positions hold these feature vectors, ``(1, c, 1, w)``."""
    return torch.tensor(vectors).T[None, :, None]


# Four positions: the same direction, at 60 degrees, orthogonal, opposite.
TEACHER = at((3.0, 4.0), (2.0, 0.0), (0.0, 5.0), (1.0, 1.0))
STUDENT = at((6.0, 8.0), (1.0, math.sqrt(3)), (2.0, 0.0), (-2.0, -2.0))


def test_the_weight_is_the_cosine_of_teacher_and_student() -> None:
    """Eq. 1, at four positions by hand; a weight is never below 0 unless told, the distance is 1 - cos."""
    distance, weight = compare(TEACHER, STUDENT, AdpsOptions())
    assert weight.flatten().tolist() == pytest.approx([1, 0.5, 0, 0], abs=1e-6)
    assert distance.flatten().tolist() == pytest.approx([0, 0.5, 1, 2], abs=1e-6)
    _, plain = compare(TEACHER, STUDENT, AdpsOptions(clamp=False))
    assert plain.flatten().tolist() == pytest.approx([1, 0.5, 0, -1], abs=1e-6)


def test_the_squared_difference_takes_the_cosines_place() -> None:
    """With `mse` the distance is the mean square along channels, and the weight falls from 1 with it."""
    distance, weight = compare(TEACHER, STUDENT, AdpsOptions(distance="mse"))
    assert distance.flatten().tolist() == pytest.approx([12.5, 2, 14.5, 9], abs=1e-5)
    assert torch.equal(weight, torch.exp(-distance))
    assert compare(TEACHER, TEACHER, AdpsOptions(distance="mse"))[1].unique().item() == 1


def test_the_mask_block_keeps_teacher_features_where_the_student_disagrees() -> None:
    """Eq. 2 by hand, without a parameter; and the two variants of the paper's ablation."""
    _, weight = compare(TEACHER, STUDENT, AdpsOptions())
    block = WeightMaskBlock(2, "product")
    expected = at((0.0, 0.0), (1.0, 0.0), (0.0, 5.0), (1.0, 1.0))
    assert torch.allclose(block(TEACHER, STUDENT, weight), expected, atol=1e-5)
    assert not list(block.parameters())
    assert torch.equal(WeightMaskBlock(2, "difference")(TEACHER, STUDENT, weight), TEACHER - STUDENT)
    concat = WeightMaskBlock(2, "concat")
    nn.init.dirac_(concat.mix.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(concat.mix.bias)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(concat(TEACHER, STUDENT, weight), TEACHER)


def test_distillation_draws_where_good_and_drives_away_where_defective() -> None:
    """Eq. 7 by hand, over two scales: 1 - cos where good, cos where defective."""
    compared = [compare(TEACHER, STUDENT, AdpsOptions())] * 2
    mask = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    # Positions cost cos = 1 and 0.5 where defective, 1 - cos = 1 and 2 where good.
    assert distillation_loss(compared, mask).item() == pytest.approx(2 * (1 + 0.5 + 1 + 2) / 4, abs=1e-6)
    assert distillation_loss(compared[:1], 1 - mask).item() == pytest.approx((0 + 0.5 + 0 + 0) / 4, abs=1e-6)


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_the_focal_loss_is_that_of_equation_8(tau: float) -> None:
    """At p = 0.8 where defective and p = 0.3 where good, by hand, for three exponents."""
    p = torch.tensor([0.8, 0.3])
    logits = torch.stack([(1 - p).log(), p.log()])[None, :, None]
    mask = torch.tensor([[[[1.0, 0.0]]]])
    expected = (-(0.2**tau) * math.log(0.8) - 0.3**tau * math.log(0.7)) / 2
    assert focal_loss(logits, mask, tau).item() == pytest.approx(expected, rel=1e-5)


def test_the_focal_loss_is_finite_for_certain_logits() -> None:
    """Logits so far apart that a probability is 0 or 1 cost their difference, not infinity, and have a gradient."""
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])[None, :, None].requires_grad_()
    loss = focal_loss(logits, torch.tensor([[[[1.0, 1.0]]]]), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(200)
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_the_sum_of_losses_weighs_segmentation_by_lambda(teacher: Teacher) -> None:
    """Eq. 9: three times lambda is three times the segmentation loss, and the same distillation loss."""
    batch = pairs(teacher)
    torch.manual_seed(0)
    once = Adps(teacher, (SIZE, SIZE), SMALL).losses(batch)
    torch.manual_seed(0)
    thrice = Adps(teacher, (SIZE, SIZE), AdpsOptions(k=4, balance=3)).losses(batch)
    assert thrice["seg"].item() == pytest.approx(3 * once["seg"].item(), rel=1e-4)
    assert thrice["distil"].item() == pytest.approx(once["distil"].item(), rel=1e-4)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_patches_go_back_to_their_places(k: int) -> None:
    """Patch r k + c is the crop in row r and column c, and putting patches together undoes the cut."""
    maps = torch.randn(2, 3, 8, 16)
    patches = split(maps, k)
    height, width = 8 // k, 16 // k
    for index, patch in enumerate(patches):
        sample, (row, column) = index // k**2, divmod(index % k**2, k)
        crop = maps[sample, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
        assert torch.equal(patch, crop)
    assert torch.equal(join(patches, k), maps)


@torch.no_grad()
def test_a_whole_student_sees_crops_and_nothing_else(teacher: Teacher) -> None:
    """With split_after `whole` the student's maps are those of crops fed one by one, put side by side."""
    student = Student(teacher, AdpsOptions(k=2, split_after="whole")).eval()
    seen = images(1)
    alone = nn.Sequential(*student.stages)
    rows = [torch.cat([alone(crop) for crop in row.chunk(2, 3)], 3) for row in seen.chunk(2, 2)]
    assert torch.allclose(student(seen)[-1], torch.cat(rows, 2), atol=1e-4)


@pytest.mark.parametrize(("option", "alone"), [("input", 1), ("input+s1", 2), ("input+s1+s2", 3), ("whole", 3)])
@torch.no_grad()
def test_a_patch_runs_alone_as_far_as_told(teacher: Teacher, option: str, alone: int) -> None:
    """A change in one patch stays in that patch up to the stage named, and no further."""
    student = Student(teacher, AdpsOptions(k=2, split_after=option)).eval()  # type: ignore[arg-type]
    before, changed = images(1), images(1)
    changed[..., :32, 24:32] += 3
    for stage, (one, other) in enumerate(zip(student(before), student(changed), strict=True), 1):
        beside = (one != other)[..., one.shape[3] // 2 :].any()
        assert (one != other).any()
        assert beside.item() == (stage > alone)


@torch.no_grad()
def test_one_patch_is_the_plain_net(teacher: Teacher) -> None:
    """With k = 1 and the teacher's weights the student is the teacher: every weight is 1, nothing is fused."""
    student = Student(teacher, AdpsOptions(k=1, student_init="imagenet")).eval()
    seen = images()
    for own, map_ in zip(student(seen), teacher.net(seen), strict=True):
        assert torch.equal(own, map_)


def test_the_student_is_the_teachers_architecture_with_weights_of_its_own(teacher: Teacher) -> None:
    """By default it starts at random; all of it trains, and the teacher stays frozen."""
    student = Student(teacher, SMALL)
    stem = next(student.stages[0].parameters())  # type: ignore[union-attr]
    frozen = next(teacher.net.parameters())
    assert stem.shape == frozen.shape
    assert not torch.allclose(stem, frozen, atol=0.1)
    assert all(p.requires_grad for p in student.parameters())
    assert not frozen.requires_grad


def test_resnets_are_cut_too(tmp_path: Path) -> None:
    """Three and four stages of a ResNet-18 give maps shaped as the teacher's, and a probability for each cell."""
    residual = resnet(tmp_path)
    seen = images()
    expected = residual.net(seen)
    for stages in (3, 4):
        method = Adps(residual, (SIZE, SIZE), AdpsOptions(k=2, stages=stages)).eval()
        assert [m.shape for m in method.student(seen)] == [m.shape for m in expected[:stages]]
        assert method.maps(seen, expected).shape == (2, 1, SIZE // 4, SIZE // 4)


class Crossed(nn.Module):
    """A net whose maps do not follow from one another."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = FeatureInfo(
            [{"module": m, "num_chs": 3, "reduction": 1} for m in ("first", "second")], (0, 1)
        )
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.first(x), self.second(x)]


def test_a_net_that_is_no_chain_is_refused() -> None:
    """Rather than train another network than the teacher's: the message names nets that can be had."""
    with pytest.raises(TeacherError, match="ResNets"):
        stages_of(Crossed(), 2)


def test_the_post_segmentation_module_uses_every_scale_at_full_size() -> None:
    """Eq. 3 to 6: logits of two classes at the image's size, which depend on each of the fused maps."""
    module = PostSegmentation((4, 5, 6), (5, 4, 3, 2)).eval()
    fused = [torch.randn(1, c, 32 // s, 48 // s, requires_grad=True) for c, s in ((4, 4), (5, 8), (6, 16))]
    logits = module(fused)
    assert logits.shape == (1, 2, 32, 48)
    logits.square().sum().backward()
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in fused)
    assert [type(m).__name__ for m in module.blocks[0].modules()].count("ReLU") == 2


@pytest.mark.parametrize("detach", [False, True])
def test_detach_keeps_the_segmentation_loss_out_of_the_student(teacher: Teacher, *, detach: bool) -> None:
    """Its gradient reaches the student exactly where it is not detached; distillation always does."""
    method = Adps(teacher, (SIZE, SIZE), AdpsOptions(k=4, detach=detach))
    losses = method.losses(pairs(teacher))
    stem = next(method.student.parameters())
    (segmentation,) = torch.autograd.grad(losses["seg"], stem, retain_graph=True, allow_unused=True)
    assert (segmentation is None) == detach
    (distillation,) = torch.autograd.grad(losses["distil"], stem)
    assert distillation.abs().sum() > 0


def test_a_few_steps_bring_both_losses_down(teacher: Teacher) -> None:
    """Adam at ten times the paper's rate lowers distillation and segmentation loss on a batch that it sees again."""
    torch.manual_seed(0)
    method, batch = Adps(teacher, (SIZE, SIZE), SMALL), pairs(teacher, 4)
    optimizer = torch.optim.Adam(method.parameters(), Adps.recipe.rate)
    history = []
    for _ in range(12):
        losses = method.losses(batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[-1]["distil"] < 0.9 * history[0]["distil"]
    assert history[-1]["seg"] < 0.8 * history[0]["seg"]


REFUSED = [
    ({"k": 3}, "k 3: one of 1, 2, 4"),
    ({"split_after": "s1"}, r"one of input, input\+s1"),
    ({"stages": 2}, "stages 2: one of 3, 4"),
    ({"wmb": "sum"}, "one of product, difference, concat"),
    ({"distance": "l1"}, "one of cosine, mse"),
    ({"student_init": "x"}, "one of random, imagenet"),
    ({"tau": -1.0}, "tau -1: at least 0"),
    ({"balance": math.nan}, "balance nan: at least 0"),
    ({"sigma": 1.0}, "sigma 1: at least 4"),
    ({"widths": (8, 8)}, "4 positive numbers for 3 stages"),
]


@pytest.mark.parametrize(("options", "remedy"), REFUSED)
def test_options_out_of_range_are_refused(options: dict[str, object], remedy: str) -> None:
    """The message names the option and what it may be."""
    with pytest.raises(TrainingError, match=remedy):
        AdpsOptions(**options)  # type: ignore[arg-type]


def test_sizes_and_teachers_that_do_not_fit_are_refused(teacher: Teacher) -> None:
    """The message names the multiple that is needed, or the strides; sizes that are not square are fine."""
    with pytest.raises(TrainingError, match=r"multiples of 32, not 64x80.*smaller k"):
        Adps(teacher, (64, 80), AdpsOptions(k=8))
    with pytest.raises(TrainingError, match="multiples of 128"):
        Adps(teacher, (64, 64), AdpsOptions(k=8, split_after="whole"))
    with pytest.raises(TeacherError, match=r"strides \(4, 8, 16, 32\)"):
        Adps(teacher, (64, 64), AdpsOptions(stages=4))
    wide = Adps(teacher, (64, 96), SMALL).eval()
    seen = torch.zeros(1, 3, 64, 96)
    assert wide.maps(seen, teacher.net(seen)).shape == (1, 1, 16, 24)


@torch.no_grad()
def test_the_map_is_the_mean_probability_of_its_cell(teacher: Teacher) -> None:
    """Each cell averages the softmax (eq. 6) over its 4 x 4 pixels; there is one map, with a weight and a unit."""
    method = lively(teacher, SMALL)
    seen = images()
    logits, _ = method(seen, teacher.net(seen))
    pixels = torch.sigmoid(logits[:, 1] - logits[:, 0])
    map_ = method.maps(seen, teacher.net(seen))
    assert map_.shape == (2, 1, SIZE // 4, SIZE // 4)
    assert map_[1, 0, 2, 3].item() == pytest.approx(pixels[1, 8:12, 12:16].mean().item(), abs=1e-5)
    assert map_.std() > 0.02
    assert len(method.weights) == len(method.scales) == 1


@torch.no_grad()
def test_a_wider_gaussian_is_made_up_for_before_the_exporters(teacher: Teacher) -> None:
    """The method's smoothing followed by the exporter's is one Gaussian of the width asked for."""
    sharp, wide = lively(teacher, SMALL), lively(teacher, AdpsOptions(k=4, sigma=8.0))
    seen = images()
    maps = teacher.net(seen)
    twice = smooth(wide.maps(seen, maps), gaussian(SIGMA))
    once = smooth(sharp.maps(seen, maps), gaussian(2.0))
    inner = slice(6, -6)  # repeated edges do not commute
    assert torch.allclose(twice[..., inner, inner], once[..., inner, inner], atol=0.01)
    assert once.std() > 0.02


@torch.no_grad()
def test_the_whole_engine_stays_below_its_budget_of_operations(teacher: Teacher) -> None:
    """Teacher and method together take less than 1.2 GMACs for a frame of 256 px."""
    method = Adps(teacher, (256, 256)).eval()
    seen = images(1, 256)
    with FlopCounterMode(display=False) as counter:
        method.maps(seen, teacher.net(seen))
    assert 0.5e9 < counter.get_total_flops() / 2 < 1.2e9


class Engine(nn.Module):
    """Teacher and method as one graph from uint8 frames."""

    def __init__(self, teacher: Teacher, method: Adps) -> None:
        super().__init__()
        self.teacher, self.method = teacher, method

    def forward(self, frames: Tensor) -> Tensor:
        """Normalise as the teacher does."""
        seen = (frames.float().permute(0, 3, 1, 2).flip(1) - self.teacher.mean) / self.teacher.std
        return self.method.maps(seen, self.teacher.net(seen))


@torch.no_grad()
def test_the_exported_graph_equals_the_model(tmp_path: Path) -> None:
    """One ONNX graph serves batches of 1 and 3 and gives what torch gives."""
    residual = resnet(tmp_path)
    engine = Engine(residual, lively(residual, AdpsOptions(k=2, split_after="input+s1", sigma=8.0))).eval()
    model = to_onnx(engine, (SIZE, SIZE, 3), ["map"])
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 3):
        frames = np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
        expected = engine(torch.from_numpy(frames)).numpy()
        assert np.abs(compiled([frames])[0] - expected).max() < 0.01 * expected.std()
