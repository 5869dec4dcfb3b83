"""Building blocks: shapes, gates, smoothing that keeps levels, masks at the scale of a map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engines.openvino_runtime import ov
from train.layers import (
    Ascend,
    ChannelAttention,
    InvertedResidual,
    SpatialAttention,
    at_scale,
    conv_bn,
    enlarge,
    gaussian,
    resized,
    smooth,
)
from train.onnx_export import to_onnx


def noise(*shape: int) -> Tensor:
    """Normal noise that is the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.5, 4.0])
def test_a_gaussian_is_a_symmetric_row_that_sums_to_one(sigma: float) -> None:
    """It reaches at least three deviations, has the standard deviation asked for, and is greatest in the middle."""
    row = gaussian(sigma)
    width = row.shape[-1]
    x = torch.arange(width) - width // 2
    assert row.shape == (1, 1, 1, width)
    assert width // 2 >= 3 * sigma
    assert row.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(row, row.flip(3))
    assert row.argmax().item() == width // 2
    if sigma >= 1:
        assert (row.flatten() * x**2).sum().sqrt().item() == pytest.approx(sigma, rel=0.02)


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_smoothing_keeps_constants_in_every_channel(sigma: float) -> None:
    """Up to the edge and for any number of channels: no border gets darker, no channel leaks into another."""
    levels = torch.tensor([3.0, -1.0, 0.0, 50.0]).view(1, 4, 1, 1).expand(2, 4, 9, 13)
    assert torch.allclose(smooth(levels, gaussian(sigma)), levels, atol=1e-4)


def test_smoothing_spreads_a_peak_alike_in_both_directions() -> None:
    """The response to a lone peak is the product of two rows; other channels do not see it."""
    maps = torch.zeros(1, 2, 15, 15)
    maps[0, 1, 7, 7] = 1
    smoothed, row = smooth(maps, gaussian(1.0)), gaussian(1.0).flatten()
    assert torch.allclose(smoothed[0, 1, 4:11, 4:11], torch.outer(row, row), atol=1e-7)
    assert smoothed[0, 0].abs().max() == 0


@pytest.mark.parametrize(("pixels", "anomalous"), [(0, 0), (3, 0), (4, 1), (16, 1)])
def test_a_cell_is_anomalous_where_a_quarter_of_it_is(pixels: int, anomalous: int) -> None:
    """Four of sixteen pixels suffice, three do not."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[0, 0, :4, :4] = (torch.arange(16) < pixels).float().view(4, 4)
    cells = at_scale(mask, (2, 2))
    assert cells.dtype == mask.dtype
    assert cells.tolist() == [[[[anomalous, 0], [0, 0]]]]


def test_another_share_of_a_cell_may_be_asked_for() -> None:
    """Half of it is more than a quarter."""
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :1] = 1
    assert at_scale(mask, (1, 1)).item() == 1
    assert at_scale(mask, (1, 1), 0.5).item() == 0


def test_enlarging_doubles_and_keeps_levels() -> None:
    """Bilinear: a constant stays, a ramp stays one."""
    ramp = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 2, 4, 6)
    large = enlarge(ramp)
    assert large.shape == (1, 2, 8, 12)
    assert torch.allclose(large[..., 1:-1].diff(dim=3), torch.tensor(0.5))
    assert torch.allclose(enlarge(torch.full((1, 1, 3, 3), 7.0)), torch.full((1, 1, 6, 6), 7.0))


def test_resizing_to_its_own_size_is_no_work() -> None:
    """The very tensor comes back; any other size is made bilinearly, up or down."""
    maps = noise(1, 2, 6, 8)
    assert resized(maps, (6, 8)) is maps
    assert torch.allclose(resized(maps, torch.Size((12, 16))), enlarge(maps))
    assert resized(maps, (3, 5)).shape == (1, 2, 3, 5)


@pytest.mark.parametrize(("stride", "outputs", "residual"), [(1, 8, True), (2, 8, False), (1, 6, False)])
def test_an_inverted_residual_adds_its_input_where_shapes_allow(stride: int, outputs: int, *, residual: bool) -> None:
    """With its last norm at zero nothing is left but the shortcut, if there is one."""
    block = InvertedResidual(8, outputs, stride, kernel=5, expansion=3).eval()
    nn.init.zeros_(block.body[-1].weight)
    x = noise(2, 8, 6, 10)
    with torch.no_grad():
        out = block(x)
    assert out.shape == (2, outputs, 6 // stride, 10 // stride)
    assert torch.equal(out, x if residual else torch.zeros_like(out))


@pytest.mark.parametrize("scale", [1, 2])
def test_a_step_up_the_pyramid_has_size_and_width(scale: int) -> None:
    """Doubled or not, with the channels asked for."""
    assert Ascend(8, 6, scale)(noise(2, 8, 3, 5)).shape == (2, 6, 3 * scale, 5 * scale)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_a_convolution_keeps_the_size_but_for_its_stride(kernel: int, stride: int) -> None:
    """Same padding; what comes out is not negative."""
    out = conv_bn(4, 6, kernel, stride)(noise(2, 4, 8, 12))
    assert out.shape == (2, 6, 8 // stride, 12 // stride)
    assert out.min() >= 0


def test_channel_attention_weighs_whole_channels() -> None:
    """Every place of a channel is weighed alike, by a share between 0 and 1, channels differently."""
    x = noise(2, 8, 5, 7)
    with torch.no_grad():
        shares = ChannelAttention(8)(x) / x
    assert torch.allclose(shares, shares[..., :1, :1].expand_as(shares), atol=1e-5)
    assert 0 < shares.min() <= shares.max() < 1
    assert shares[0, :, 0, 0].std() > 0


def test_spatial_attention_weighs_whole_positions() -> None:
    """Every channel of a place is weighed alike, by a share between 0 and 1, places differently."""
    x = noise(2, 8, 9, 9)
    with torch.no_grad():
        shares = SpatialAttention()(x) / x
    assert torch.allclose(shares, shares[:, :1].expand_as(shares), atol=1e-5)
    assert 0 < shares.min() <= shares.max() < 1
    assert shares[0, 0].std() > 0


class _Smooth(nn.Module):
    """Frames of three channels, each smoothed."""

    kernel: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", gaussian(1.0))

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map uint8 ``(n, H, W, 3)`` to float ``(n, 3, H, W)``."""
        return smooth(frames.float().permute(0, 3, 1, 2), self.kernel)


def test_smoothing_several_maps_ends_in_bfloat16_too(tmp_path: Path) -> None:
    """As a grouped convolution it never came back from OpenVINO's bfloat16 kernels."""
    (tmp_path / "m.onnx").write_bytes(to_onnx(_Smooth(), (64, 64, 3), ["out"]))
    compiled = ov.Core().compile_model(tmp_path / "m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    request = compiled.create_infer_request()
    frames = np.full((1, 64, 64, 3), 100, np.uint8)
    request.start_async([frames])
    assert request.wait_for(20_000)
    assert np.allclose(request.results[compiled.outputs[0]], 100, rtol=0.02)
