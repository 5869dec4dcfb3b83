"""DMDD's segmentation head: logits at stride 4 from anomaly maps of every scale and both branches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.head import MultiPerceptionHead

CHANNELS = (6, 8, 10, 12)


def features(scales: int = 3, seed: int = 0) -> list[Tensor]:
    """Maps as a teacher would give for frames of 64 x 96 pixels."""
    generator = torch.Generator().manual_seed(seed)
    strides = (4, 8, 16, 32)[:scales]
    return [torch.randn(2, c, 64 // s, 96 // s, generator=generator) for c, s in zip(CHANNELS, strides, strict=False)]


def head(evidence: str = "products", scales: int = 3) -> MultiPerceptionHead:
    """An untrained head, always the same."""
    torch.manual_seed(0)
    return MultiPerceptionHead(CHANNELS[:scales], evidence)  # type: ignore[arg-type]


@pytest.mark.parametrize("evidence", ["products", "maps"])
@pytest.mark.parametrize("scales", [3, 4])
def test_logits_are_at_stride_four_and_every_layer_learns(evidence: str, scales: int) -> None:
    """One logit a cell of four pixels, for frames that are not square; gradients reach each parameter."""
    net = head(evidence, scales)
    logits = net(features(scales), features(scales, 1), features(scales, 2))
    assert logits.shape == (2, 1, 16, 24)
    logits.square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("evidence", ["products", "maps"])
@pytest.mark.parametrize("which", [1, 2])
@torch.no_grad()
def test_both_branches_have_a_say_at_every_scale(evidence: str, which: int) -> None:
    """Other normality or abnormality features at any one scale are another map."""
    net = head(evidence).eval()
    seen = [features(seed=seed) for seed in range(3)]
    before = net(*seen)
    for scale in range(3):
        changed = [list(maps) for maps in seen]
        changed[which][scale] = -changed[which][scale]
        assert not torch.equal(net(*changed), before)


@pytest.mark.parametrize("evidence", ["products", "maps"])
@torch.no_grad()
def test_the_length_of_features_does_not_matter(evidence: str) -> None:
    """Cosines see directions: scaled features of all three give the same logits."""
    net = head(evidence).eval()
    seen = [features(seed=seed) for seed in range(3)]
    scaled = [[factor * m for m in maps] for factor, maps in zip((3, 0.2, 7), seen, strict=True)]
    assert torch.allclose(net(*seen), net(*scaled), atol=1e-4)


@torch.no_grad()
def test_maps_alone_cannot_tell_one_look_from_another() -> None:
    """With `maps`, features turned alike in all three give the same distances, so the same logits; not `products`."""
    seen = [features(seed=seed) for seed in range(3)]
    turned = [[m.roll(1, 1) for m in maps] for maps in seen]
    maps, products = head("maps").eval(), head("products").eval()
    assert torch.allclose(maps(*seen), maps(*turned), atol=1e-5)
    assert not torch.allclose(products(*seen), products(*turned), atol=1e-4)


@torch.no_grad()
def test_evidence_begins_or_ends_with_both_cosine_distances() -> None:
    """Zero for the teacher's own features, two for their opposite; `products` has reduced channels before them."""
    (teacher, *_) = features()
    for kind, channels in (("maps", 2), ("products", 18)):
        evidence = head(kind).eval()._evidence(0, teacher, teacher, -teacher)
        assert evidence.shape == (2, channels, *teacher.shape[2:])
        assert torch.allclose(evidence[:, -2], torch.zeros(1), atol=1e-5)
        assert torch.allclose(evidence[:, -1], torch.full((1,), 2.0), atol=1e-5)


def test_the_head_perceives_several_distances() -> None:
    """Its fields reach 1, 2, 4 and 8 cells, each without changing the map's size."""
    x = torch.zeros(1, 32, 40, 40)
    x[..., 20, 20] = 1
    for field, reach in zip(head().fields, (1, 2, 4, 8), strict=True):
        with torch.no_grad():
            touched = field[0](x).abs().sum(1)[0].nonzero()
        assert (touched - 20).abs().max().item() == reach
