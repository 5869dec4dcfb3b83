"""DMDD's decoupled student: every trunk and every way of decoupling gives two sets of maps like the teacher's."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from train.student import WIDTHS, Decouple, EncoderTrunk, Pyramid, ReverseTrunk, Student, cosine_distances

CHANNELS = (6, 8, 10, 12)
HEIGHT, WIDTH = 64, 96


def seen(scales: int, seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> tuple[Tensor, list[Tensor]]:
    """Images, and maps as a teacher with so many scales would give."""
    generator = torch.Generator().manual_seed(seed)
    maps = [
        torch.randn(2, c, height // s, width // s, generator=generator)
        for c, s in zip(CHANNELS[:scales], (4, 8, 16, 32), strict=False)
    ]
    return torch.randn(2, 3, height, width, generator=generator), maps


def student(scales: int = 3, trunk: str = "reverse", decouple: str = "split") -> Student:
    """An untrained student, always the same."""
    torch.manual_seed(0)
    return Student(CHANNELS[:scales], trunk, decouple)  # type: ignore[arg-type]


EVERY = pytest.mark.parametrize(
    ("scales", "trunk", "decouple"), list(product((3, 4), ("reverse", "encoder"), ("split", "branches")))
)


@EVERY
def test_both_branches_give_maps_like_the_teachers(scales: int, trunk: str, decouple: str) -> None:
    """Normality and abnormality features have the teacher's shapes at three and at four scales, and differ."""
    images, maps = seen(scales)
    normal, abnormal = student(scales, trunk, decouple)(images, maps)
    assert [m.shape for m in normal] == [m.shape for m in abnormal] == [m.shape for m in maps]
    assert all(not torch.allclose(n, a, atol=1e-2) for n, a in zip(normal, abnormal, strict=True))


@EVERY
def test_every_layer_learns(scales: int, trunk: str, decouple: str) -> None:
    """A loss on both branches reaches each parameter: no part of a student is idle."""
    net = student(scales, trunk, decouple)
    images, maps = seen(scales)
    normal, abnormal = net(images, maps)
    sum(d.mean() for d in cosine_distances(normal + abnormal, maps + maps)).backward()  # type: ignore[union-attr]
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_the_reverse_trunk_reads_maps_and_the_encoder_reads_pixels() -> None:
    """Each answers to its own input, and to nothing else."""
    one, other = seen(4), seen(4, seed=1)
    for trunk, reads_maps in (("reverse", True), ("encoder", False)):
        net = student(4, trunk).eval()
        with torch.no_grad():
            first = net(*one)[0][0]
            new_maps, new_images = net(one[0], other[1])[0][0], net(other[0], one[1])[0][0]
        assert torch.equal(first, new_maps) is not reads_maps
        assert torch.equal(first, new_images) is reads_maps


@pytest.mark.parametrize("scale", [0, 1, 2, 3])
def test_the_reverse_trunk_reads_every_scale(scale: int) -> None:
    """Each of the teacher's maps has a say in the bottleneck."""
    images, maps = seen(4)
    net = student(4).eval()
    changed = [m + (k == scale) for k, m in enumerate(maps)]
    with torch.no_grad():
        assert not torch.allclose(net(images, maps)[0][0], net(images, changed)[0][0], atol=1e-4)


def test_nothing_passes_by_the_bottleneck() -> None:
    """Where the bottleneck says the same for all, so do the maps at every scale: there is no skip connection."""
    trunk = ReverseTrunk(CHANNELS).eval()
    nn.init.zeros_(trunk.merge[0].weight)
    with torch.no_grad():
        one, other = trunk(*seen(4)), trunk(*seen(4, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("trunk", [ReverseTrunk, EncoderTrunk])
@pytest.mark.parametrize("scales", [3, 4])
def test_initial_features_have_their_widths(trunk: type[ReverseTrunk] | type[EncoderTrunk], scales: int) -> None:
    """Both trunks end in the same pyramid, one map for each of the teacher's, so that branches fit either."""
    net = trunk(CHANNELS[:scales])
    assert isinstance(net.pyramid, Pyramid)
    shapes = [tuple(m.shape[1:]) for m in net(*seen(scales))]
    expected = zip(WIDTHS[:scales], (4, 8, 16, 32), strict=False)
    assert shapes == [(width, HEIGHT // s, WIDTH // s) for width, s in expected]


def test_splitting_divides_channels_and_branching_reads_twice() -> None:
    """`split` has one convolution to twice the channels, `branches` one convolution for each branch."""
    split, branches = Decouple(8, 5, "split"), Decouple(8, 5, "branches")
    assert split.expand is not None
    assert split.expand[0].weight.shape == (16, 8, 1, 1)
    assert branches.expand is None
    assert [tuple(enter[0].weight.shape) for enter in branches.enter] == [(8, 8, 3, 3)] * 2
    assert len(split.enter) == 0


@pytest.mark.parametrize("kind", ["split", "branches"])
def test_each_branch_learns_alone(kind: str) -> None:
    """What normality features are told leaves the abnormality branch as it is."""
    decouple = Decouple(8, 5, kind)  # type: ignore[arg-type]
    normal, abnormal = decouple(torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert normal.shape == abnormal.shape == (2, 5, 4, 4)
    normal.square().sum().backward()
    assert all(p.grad is not None for p in decouple.normality.parameters())
    assert all(p.grad is None for p in decouple.abnormality.parameters())


def test_cosine_distances_are_zero_for_the_same_direction_and_two_for_the_opposite() -> None:
    """One map a scale, whatever the length of features."""
    _, maps = seen(3)
    for factor, expected in ((3.0, 0.0), (-0.5, 2.0)):
        for distance, m in zip(cosine_distances([factor * m for m in maps], maps), maps, strict=True):
            assert distance.shape == (2, 1, *m.shape[2:])
            assert torch.allclose(distance, torch.full_like(distance, expected), atol=1e-5)
