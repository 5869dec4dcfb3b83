"""ADPS, Asymmetric Distillation Post-Segmentation (IEEE TNNLS 36(4), 2025, arXiv 2210.10495), to its equations.

The teacher sees the whole image, the student of the same architecture only patches of it, so that their
features differ where the context of a patch does not explain it. The Weight Mask Block turns that
difference into a coarse mask over the teacher's features (eq. 1, 2), from which the Post-Segmentation
Module makes a mask at the size of the image (eq. 3 to 6). What the paper leaves open is an option of
:class:`AdpsOptions`; the origin of each is there and in ``docs/methods.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import timm
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from train.errors import TrainingError
from train.export import SIGMA
from train.layers import CELL, at_scale, conv_bn, gaussian, smooth
from train.method import Material, Pairs, Recipe
from train.teacher import Teacher, TeacherError

Maps = list[Tensor]
Split = Literal["input", "input+s1", "input+s1+s2", "whole"]
Fusion = Literal["product", "difference", "concat"]
Distance = Literal["cosine", "mse"]
Initial = Literal["random", "imagenet"]


@dataclass(frozen=True)
class AdpsOptions:
    """What the paper states, and how what it leaves open was decided.

    Attributes:
        k: The student's input is cut into ``k x k`` patches: 1, 2, 4, 8 or 16. The paper uses 8; by its own
            ablation 4 and 8 are best, 16 loses structure, and 1 is the plain, symmetric student.
        split_after: How far a patch runs alone. ``input``: through stem and stage 1, then the maps are put
            together and the rest sees them whole. ``input+s1`` and ``input+s1+s2`` cut the maps again before stage
            2, and stage 3. ``whole``: a patch runs through the whole student alone, as Algorithm 1 reads. The
            paper's Table V names the first three, and finds stage 2 to hurt; which of them its main results use
            is open, the default is ours.
        stages: Feature maps to compare, 3 (strides 4, 8, 16) or 4 (and 32). Open in the paper, the default is ours.
        wmb: How teacher and student features become one map. ``product`` is eq. 2; ``difference`` (T - S) and
            ``concat`` (both, then a 3x3 convolution) are the alternatives of the paper's Table VI.
        distance: ``cosine`` is eq. 1 and 7. ``mse`` is named in the paper's Table VII without a formula; ours: the
            mean squared difference d along channels, with exp(-d) in the place of the cosine.
        clamp: Whether a negative cosine counts as 0 where it is a weight or is to become small. The paper's
            formulas assume a weight in 0..1. That holds by itself after a ReLU, as in a ResNet; EfficientNet's
            maps are linear, and would be driven on to -1. Ours.
        detach: Whether the segmentation loss stays out of the student. Open in the paper; by eq. 9 alone it does not.
        tau: Exponent of the focal loss (eq. 8), 0 or more. Open in the paper; 2 as in DRAEM, whose schedule it shares.
        balance: Weight lambda of the segmentation loss (eq. 9), 1 in the paper.
        sigma: Width in pixels of the Gaussian G of Algorithm 1, at least that of the engine's own smoothing, 4. Open
            in the paper, 4 is the field's usual value.
        student_init: ``random``, or ``imagenet`` for the teacher's weights. Open in the paper; random is the usual.
        widths: Channels of the post-segmentation blocks, from the deepest to the full size. Open in the paper; None
            takes the teacher's at strides 8 and 4, then half of them and a quarter, at least 8.

    Raises:
        TrainingError: if a value is none of those named here.
    """

    k: int = 8
    split_after: Split = "input"
    stages: int = 3
    wmb: Fusion = "product"
    distance: Distance = "cosine"
    clamp: bool = True
    detach: bool = False
    tau: float = 2.0
    balance: float = 1.0
    sigma: float = SIGMA * CELL
    student_init: Initial = "random"
    widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[object, ...]] = {"k": (1, 2, 4, 8, 16), "stages": (3, 4)}
        hints = get_type_hints(type(self))
        allowed |= {name: get_args(hints[name]) for name in ("split_after", "wmb", "distance", "student_init")}
        for name, values in allowed.items():
            if (value := getattr(self, name)) not in values:
                msg = f"adps: {name} {value!r}: one of {', '.join(map(str, values))}"
                raise TrainingError(msg)
        for name, bound in (("tau", 0.0), ("balance", 0.0), ("sigma", SIGMA * CELL)):
            if not bound <= (value := getattr(self, name)) < math.inf:
                msg = f"adps: {name} {value:g}: at least {bound:g}"
                raise TrainingError(msg)
        if self.widths is not None and (len(self.widths) != self.stages + 1 or min(self.widths) < 1):
            msg = f"adps: widths {self.widths}: {self.stages + 1} positive numbers for {self.stages} stages, or None"
            raise TrainingError(msg)

    @property
    def alone(self) -> int:
        """Number of stages through which a patch runs alone."""
        return {"input": 1, "input+s1": 2, "input+s1+s2": 3, "whole": self.stages}[self.split_after]


def split(maps: Tensor, k: int) -> Tensor:
    """Cut ``(n, c, H, W)`` into ``k x k`` patches, row by row: ``(n k^2, c, H/k, W/k)``."""
    channels, height, width = maps.shape[1:]
    rows = maps.reshape(-1, channels, k, height // k, k, width // k)
    patches = rows.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // k, width // k)
    return patches.contiguous(memory_format=torch.channels_last)


def join(patches: Tensor, k: int) -> Tensor:
    """Put patches ``(n k^2, c, h, w)`` back in their places, ``(n, c, k h, k w)``: undoes :func:`split`."""
    channels, height, width = patches.shape[1:]
    rows = patches.reshape(-1, k, k, channels, height, width)
    maps = rows.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, k * height, k * width)
    return maps.contiguous(memory_format=torch.channels_last)


def stages_of(net: nn.Module, count: int) -> nn.ModuleList:
    """Cut a timm feature extractor into the modules that lead from each of its feature maps to the next.

    Args:
        net: Created with ``features_only=True``; its modules must be used in the order in which they are registered.
        count: Number of feature maps wanted, from the first on.

    Raises:
        TeacherError: if the modules, one after the other, do not give the network's own maps.
    """
    info: Any = net.feature_info
    ends = [name.replace(".", "_") for name in info.module_name()[:count]]
    stages: list[nn.Module] = []
    stage = nn.Sequential()
    for name, module in _steps(net, ends):
        stage.append(module)
        if len(stages) < count and name == ends[len(stages)]:
            stages.append(stage)
            stage = nn.Sequential()
    if not _equal(net, stages, count):
        msg = (
            f"adps cannot cut {type(net).__name__} into stages that follow one another; EfficientNets, MobileNets,"
            " ResNets, RegNets and ConvNeXts can be"
        )
        raise TeacherError(msg)
    return nn.ModuleList(stages)


def _steps(net: nn.Module, ends: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules of ``net`` in order; a container in which a stage ends is opened."""
    steps = []
    for name, module in net.named_children():
        if any(end.startswith(f"{name}_") for end in ends):
            steps += [(f"{name}_{inner}", child) for inner, child in module.named_children()]
        else:
            steps.append((name, module))
    return steps


@torch.no_grad()
def _equal(net: nn.Module, stages: Sequence[nn.Module], count: int) -> bool:
    """Whether ``stages`` in a row give the maps of ``net``."""
    training = net.training
    image = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64)
    expected = net.eval()(image)[:count]
    try:
        found = list(accumulate(stages, lambda x, stage: stage(x), initial=image))[1:]
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        net.train(training)
    return len(found) == count and all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


class Student(nn.Module):
    """The teacher's architecture, to be trained, seeing an image in patches.

    Args:
        teacher: The teacher, whose architecture is taken, and with ``student_init`` its weights.
        options: ``k``, ``split_after``, ``stages`` and ``student_init``.
    """

    def __init__(self, teacher: Teacher, options: AdpsOptions) -> None:
        super().__init__()
        net: Any = teacher.net
        fresh = timm.create_model(
            net.pretrained_cfg["architecture"], features_only=True, out_indices=net.feature_info.out_indices
        )
        if options.student_init == "imagenet":
            fresh.load_state_dict(net.state_dict())
        self.stages = stages_of(fresh, options.stages)
        self.k, self.alone = options.k, options.alone

    def forward(self, images: Tensor) -> Maps:
        """Map normalised images ``(n, 3, H, W)`` to maps ``(n, c_i, H/s_i, W/s_i)``, shaped as the teacher's."""
        x = split(images, self.k) if self.k > 1 else images
        maps: Maps = []
        for index, stage in enumerate(self.stages, 1):
            x = stage(x)
            whole = join(x, self.k) if self.k > 1 and index <= self.alone else x
            maps.append(whole)
            x = whole if index == self.alone else x
        return maps


def compare(teacher: Tensor, student: Tensor, options: AdpsOptions) -> tuple[Tensor, Tensor]:
    """Distance and weight W (eq. 1) of two maps ``(n, c, h, w)`` per position, each ``(n, 1, h, w)``.

    The weight is about 1 where student and teacher agree. With ``cosine`` the distance is 1 - cos.
    """
    if options.distance == "mse":
        distance = (teacher - student).square().mean(1, keepdim=True)
        return distance, torch.exp(-distance)
    cosine = F.cosine_similarity(teacher, student, dim=1, eps=1e-6).unsqueeze(1)
    return 1 - cosine, cosine.clamp(min=0) if options.clamp else cosine


def distillation_loss(compared: Sequence[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
    """Eq. 7: the student is drawn to the teacher where good, and driven away where defective.

    Averaged over positions and summed over scales; how a scale's mask follows from the image's is ours.

    Args:
        compared: Distance and weight of each scale, from :func:`compare`.
        mask: Where the images are defective, ``(n, 1, H, W)``, 0 or 1.
    """
    losses = []
    for distance, weight in compared:
        defective = at_scale(mask, distance.shape[2:])
        losses.append(((1 - defective) * distance + defective * weight).mean())
    return torch.stack(losses).sum()


def focal_loss(logits: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Eq. 8, averaged over pixels: ``-(1 - p)^tau log p`` where defective, ``-p^tau log(1 - p)`` where good.

    Args:
        logits: Of good and defective, ``(n, 2, H, W)``; p is the softmax of the second.
        mask: Where the images are defective, ``(n, 1, H, W)``, 0 or 1.
        tau: The exponent.
    """
    # The log-probability of the truth: exact where p itself would round to 0 or 1.
    good, defective = F.log_softmax(logits.float(), 1).chunk(2, 1)
    truth = torch.where(mask > 0, defective, good)
    return (-((1 - truth.exp()).clamp(min=0) ** tau) * truth).mean()


class WeightMaskBlock(nn.Module):
    """Teacher features, masked by how little the student agrees: eq. 2, or a variant of Table VI.

    ``product`` has no parameters: ``C = (1 - W) T``.
    """

    def __init__(self, channels: int, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = fusion
        self.mix = nn.Conv2d(2 * channels, channels, 3, padding=1) if fusion == "concat" else None

    def forward(self, teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
        """Fuse maps ``(n, c, h, w)`` and a weight ``(n, 1, h, w)`` into ``(n, c, h, w)``."""
        if self.mix is not None:
            mixed: Tensor = self.mix(torch.cat([teacher, student], 1))
            return mixed
        return teacher - student if self.fusion == "difference" else (1 - weight) * teacher


class UpBlock(nn.Module):
    """UNet's step up: 2x transposed convolution, the map of that scale beside it, two 3x3 convolutions (eq. 3 to 5)."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.refine = nn.Sequential(conv_bn(outputs + skip, outputs, 3), conv_bn(outputs, outputs, 3))

    def forward(self, x: Tensor, *skip: Tensor) -> Tensor:
        """Map ``(n, inputs, h, w)``, and a map ``(n, skip, 2h, 2w)`` if there is one, to ``(n, outputs, 2h, 2w)``."""
        out: Tensor = self.refine(torch.cat([self.up(x), *skip], 1))
        return out


class PostSegmentation(nn.Module):
    """The Post-Segmentation Module: from fused maps at strides 4, 8, ... to two logits a pixel (eq. 3 to 6).

    Args:
        channels: Of the fused maps, from stride 4 on.
        widths: Of the blocks, from the deepest to the full size: one more than there are maps.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        skips = [*reversed(channels[:-1]), 0, 0]
        inputs = [channels[-1], *widths[:-1]]
        self.blocks = nn.ModuleList(UpBlock(*shape) for shape in zip(inputs, skips, widths, strict=True))
        self.exit = nn.Conv2d(widths[-1], 2, 3, padding=1)

    def forward(self, fused: Maps) -> Tensor:
        """Return logits ``(n, 2, H, W)`` of good and defective for maps ``(n, c_i, H/s_i, W/s_i)``."""
        x, *skips = reversed(fused)
        for index, block in enumerate(self.blocks):
            x = block(x, *skips[index : index + 1])
        logits: Tensor = self.exit(x)
        return logits


class Adps(nn.Module):
    """The method as the trainer, the exporter and the calibration see it.

    Args:
        teacher: The teacher, with feature maps at strides 4, 8, 16 and, for four stages, 32.
        size: Height and width of the frames, multiples of what ``k`` and the strides need.
        options: The paper's choices and ours.

    Attributes:
        weights: There is one map, the probability of a defect.
        scales: Its unit is its own decision boundary, a probability of one half.
        recipe: The paper's schedule, Adam with its rate multiplied by 0.2 after 0.8 and 0.9 of the training, but ten
            times its rate of 1e-4: the paper trains 300 epochs in batches of 32, which no CPU does in twenty minutes.
        headroom: The map is a probability, at most 2 in units of its boundary.

    Raises:
        TeacherError: if the teacher's maps do not suit.
        TrainingError: if the size does not suit ``k``.
    """

    recipe: ClassVar = Recipe(rate=1e-3, schedule="steps", steps=900, steps_few=500)
    headroom: ClassVar = 2.0
    kernel: Tensor

    def __init__(self, teacher: Teacher, size: tuple[int, int], options: AdpsOptions | None = None) -> None:
        super().__init__()
        self.options = options = options or AdpsOptions()
        self.weights: tuple[float, ...] = (1.0,)
        self.score_weights: tuple[float, ...] = (1.0,)
        self.scales: tuple[float | None, ...] = (0.5,)
        _check(teacher, size, options)
        channels = teacher.widths[: options.stages]
        self.student = Student(teacher, options)
        self.fuse = nn.ModuleList(WeightMaskBlock(width, options.wmb) for width in channels)
        self.segment = PostSegmentation(channels, options.widths or _widths(channels))
        # The exporter smooths by SIGMA cells; the variances of two Gaussians in a row add up.
        rest = math.sqrt((options.sigma / CELL) ** 2 - SIGMA**2)
        self.register_buffer("kernel", gaussian(rest) if rest else torch.ones(1, 1, 1, 1), persistent=False)

    def forward(self, images: Tensor, teacher: Maps) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits ``(n, 2, H, W)`` of good and defective, and what :func:`compare` found at each scale.

        Args:
            images: As the teacher saw them: normalised, ``(n, 3, H, W)``.
            teacher: The teacher's maps of them, ``(n, c_i, H/s_i, W/s_i)``.
        """
        teacher = teacher[: self.options.stages]
        student = self.student(images)
        compared = [compare(t, s, self.options) for t, s in zip(teacher, student, strict=True)]
        seen = [(s, weight) for s, (_, weight) in zip(student, compared, strict=True)]
        if self.options.detach:
            seen = [(s.detach(), weight.detach()) for s, weight in seen]
        fused = [fuse(t, *both) for fuse, t, both in zip(self.fuse, teacher, seen, strict=True)]
        return self.segment(fused), compared

    def losses(self, pairs: Pairs) -> dict[str, Tensor]:
        """The losses of a batch of pairs, of which only the twins are used; their sum is eq. 9."""
        logits, compared = self(pairs.images, pairs.twin)
        return {
            "distil": distillation_loss(compared, pairs.mask),
            "seg": self.options.balance * focal_loss(logits, pairs.mask, self.options.tau),
        }

    def finish(self, material: Material) -> None:
        """Nothing: the method keeps no statistics of good parts."""

    def maps(self, images: Tensor, teacher: Maps) -> Tensor:
        """The probability of a defect, averaged over cells, ``(n, 1, H/4, W/4)``.

        Averaging, unlike the maximum, leaves what Algorithm 1 filters next, G(M), as it is but for the sampling.
        """
        logits, _ = self(images, teacher)
        probability = F.avg_pool2d(torch.softmax(logits.float(), 1)[:, 1:], CELL)
        return smooth(probability, self.kernel) if self.kernel.shape[-1] > 1 else probability


def _widths(channels: Sequence[int]) -> tuple[int, ...]:
    return (*reversed(channels[:-1]), max(8, channels[0] // 2), max(8, channels[0] // 4))


def _check(teacher: Teacher, size: tuple[int, int], options: AdpsOptions) -> None:
    """Refuse teachers and sizes that cannot be cut and put together exactly."""
    info: Any = teacher.net.feature_info
    has, strides = tuple(info.reduction()), (4, 8, 16, 32)[: options.stages]
    if has[: options.stages] != strides:
        msg = f"adps with {options.stages} stages needs feature maps at strides {strides}, {teacher.name} gives {has}"
        raise TeacherError(msg)
    unit = math.lcm(strides[-1], options.k * strides[options.alone - 1])
    if any(side < unit or side % unit for side in size):
        msg = (
            f"adps with k={options.k} and split_after={options.split_after!r} needs a height and a width in multiples"
            f" of {unit}, not {size[0]}x{size[1]}: change the size, or choose a smaller k"
        )
        raise TrainingError(msg)


METHOD = Adps
OPTIONS = AdpsOptions
