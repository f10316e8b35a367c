"""What every backbone is: images -> tokens, with an identity that says which ones."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from convexheads.errors import InputError, describe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Transform:
    """From a PIL image of any size to the network's input.

    An image is resized so that its shorter side becomes ``resolution / crop`` pixels (``fit="crop"``) or
    its sides both do (``fit="squash"``), then its central square of ``resolution`` pixels is taken. An
    image whose shorter side has no more than ``resolution`` pixels is enlarged, by bicubic interpolation
    and without a margin to crop: small images have no pixels to give away. Values are scaled to [0, 1],
    less ``mean``, divided by ``std``.
    """

    resolution: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    fit: str = "crop"
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.interpolation not in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"):
            raise InputError(
                describe(f"interpolation {self.interpolation!r}", "one that Pillow has, such as 'bicubic'")
            )
        if self.fit not in ("crop", "squash") or not 0 < self.crop <= 1:
            raise InputError(describe(f"fit={self.fit!r}, crop={self.crop}", "'crop' or 'squash', and 0 < crop <= 1"))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "enlarging": "bicubic"}

    def __call__(self, image: Any) -> torch.Tensor:
        """A PIL image as a float32 tensor (3, resolution, resolution)."""
        from PIL import Image

        size = self.resolution
        image = image.convert("RGB")
        width, height = image.size
        short = min(width, height)
        if short <= size:
            method, target = Image.Resampling.BICUBIC, size
        else:
            # The size is floored, as the libraries do that the weights were trained with.
            method, target = Image.Resampling[self.interpolation.upper()], math.floor(size / self.crop)
        if self.fit == "squash":
            shape = (target, target)
        else:
            shape = (max(target, int(width * target / short)), max(target, int(height * target / short)))
        if shape != image.size:
            image = image.resize(shape, method)
        if image.size != (size, size):
            left, top = (image.width - size) // 2, (image.height - size) // 2
            image = image.crop((left, top, left + size, top + size))
        # numpy, not torch: this runs in threads beside the network and must not wake torch's own threads.
        pixels = np.asarray(image)
        out = np.empty((3, size, size), np.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            np.multiply(pixels[..., channel], np.float32(1 / 255) / np.float32(std), out=out[channel])
            out[channel] -= np.float32(mean) / np.float32(std)
        return torch.from_numpy(out)


class Backbone(nn.Module):
    """A frozen network from images to tokens.

    As a torch module it maps (n, 3, resolution, resolution) float32, preprocessed, to (n, s, d); it can
    be composed with a head (``nn.Sequential(backbone, head)``), moved and exported. ``tokens`` is the
    same without gradients, on whatever device the network is.

    Attributes
    ----------
    name : name it was asked for by.
    resolution : side of the square input in pixels.
    grid : (h, w) of the patches, or None where the tokens are not laid out on a grid.
    layout : role -> (start, stop) in the token axis; roles are "cls", "registers" and "patch". A
        distillation token counts as a register.
    width : d, number of features of a token.
    layer : None for the last block and the final norm, or the number of the block, from 0, whose output
        the tokens are.
    module : the wrapped network.
    """

    name: str
    resolution: int
    grid: tuple[int, int] | None
    layout: dict[str, tuple[int, int]]
    width: int
    layer: int | None

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        transform: Transform,
        layer: int | None = None,
        identity: dict[str, Any],
    ) -> None:
        super().__init__()
        self.module = module.eval().requires_grad_(False)
        self.name = name
        self.resolution = transform.resolution
        self.transform = transform
        self.layer = layer
        self._identity = identity

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed images (n, 3, resolution, resolution) -> tokens (n, s, d)."""
        raise NotImplementedError

    def describe_tokens(self, patches: tuple[int, int] | None, prefix: int, registers: int | None = None) -> None:
        """Find s, d, layout and grid by running one blank image.

        Parameters
        ----------
        patches : expected (h, w) of the patches; None: the tokens after the prefix are a square grid, or
            none is recorded.
        prefix : number of tokens before the patches; -1: whatever is left beside the patches.
        registers : how many of the prefix tokens are registers; None: all but the first.

        Raises
        ------
        InputError
            If the network's output is not that of a transformer with these tokens.
        """
        size = self.resolution
        with torch.inference_mode():
            out = self(torch.zeros(1, 3, size, size, device=self.device))
        if out.ndim != 3:
            raise InputError(describe(f"an output of shape {tuple(out.shape)} from {self.name}", "tokens (n, s, d)"))
        s = out.shape[1]
        if prefix < 0:
            if patches is None:
                raise InputError(
                    describe(f"{s} tokens from {self.name}", "a known number of patches or of prefix tokens")
                )
            prefix = s - patches[0] * patches[1]
        count = s - prefix
        if patches is None:
            side = math.isqrt(count)
            patches = (side, side) if side * side == count else None
        elif patches[0] * patches[1] != count or prefix < 0:
            got = f"{s} tokens from {self.name} at {size} px"
            raise InputError(describe(got, f"{prefix} + {patches[0]} x {patches[1]} patches"))
        if registers is None:
            registers = max(prefix - 1, 0)
        spans = {"cls": prefix - registers, "registers": registers, "patch": count}
        self.layout, position = {}, 0
        for role, length in spans.items():
            if length > 0:
                self.layout[role] = (position, position + length)
                position += length
        self.grid = patches
        self.width = int(out.shape[2])

    @property
    def device(self) -> torch.device:
        """Device of the network's parameters."""
        return next(self.module.parameters()).device

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity: library, class, SHA-256 of the weights, layer."""
        return {**self._identity, "layer": self.layer}

    @property
    def transform_fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of the preprocessing, the resolution among it."""
        return self.transform.fingerprint

    def preprocess(self, image: Any) -> torch.Tensor:
        """A PIL image of any size -> float32 tensor (3, resolution, resolution)."""
        return self.transform(image)

    def tokens(self, batch: torch.Tensor) -> torch.Tensor:
        """Preprocessed images (n, 3, resolution, resolution) -> tokens (n, s, d), without gradients.

        Raises
        ------
        InputError
            If the batch has another shape.
        """
        size = self.resolution
        if batch.ndim != 4 or tuple(batch.shape[1:]) != (3, size, size):
            got = f"images of shape {tuple(batch.shape)}"
            raise InputError(describe(got, f"(n, 3, {size}, {size})", "Use the backbone's preprocess"))
        with torch.inference_mode():
            out: torch.Tensor = self(batch.to(self.device, non_blocking=True))
        return out


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 (hexadecimal) of all parameters and buffers: names, types, shapes and values."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        data = value.detach().cpu().contiguous()
        sha.update(f"{name} {data.dtype} {tuple(data.shape)};".encode())
        sha.update(data.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def block_number(layer: int, blocks: int, name: str) -> int:
    """Number of the block from 0; ``layer`` counts from the first (0) or back from the last (-1).

    Raises
    ------
    InputError
        If the network has no such block.
    """
    number = layer + blocks if layer < 0 else layer
    if not 0 <= number < blocks:
        raise InputError(describe(f"layer={layer} of {name}", f"-{blocks} to {blocks - 1}, its {blocks} blocks"))
    return number


def check_resolution(resolution: int, patch: int, name: str) -> None:
    """InputError unless the resolution is a positive multiple of the patch size."""
    if resolution < patch or resolution % patch:
        near = max(1, round(resolution / patch)) * patch
        got = f"resolution {resolution} for {name}"
        raise InputError(describe(got, f"a multiple of its patch size, {patch} pixels", f"Use {near}"))
