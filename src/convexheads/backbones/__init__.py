"""Backbones: pre-trained networks that turn images into tokens.

A name says which adapter loads it:

* ``dinov2_vits14``: DINOv2 ViT-S/14 from an installed package, no hub needed (the default);
* ``timm:NAME``, or the bare NAME of a timm model, such as ``gmlp_s16_224``;
* ``hf:NAME``, such as ``hf:facebook/dinov2-small``, or the path of a folder that transformers saved.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from convexheads.backbones.base import Backbone, Transform
from convexheads.errors import InputError, describe

__all__ = ["DEFAULT", "Backbone", "Transform", "load_backbone", "pick_device", "register_backbone"]

DEFAULT = "dinov2_vits14"

Loader = Callable[..., Backbone]

# Prefix -> module with `load`, imported when first asked for.
_ADAPTERS: dict[str, str | Loader] = {
    DEFAULT: "convexheads.backbones.packaged",
    "timm": "convexheads.backbones.timm",
    "hf": "convexheads.backbones.hf",
}


def register_backbone(prefix: str, loader: Loader) -> None:
    """Make ``load_backbone("PREFIX:NAME")`` (or "PREFIX" alone) call ``loader``.

    Parameters
    ----------
    prefix : letters, digits and underscores.
    loader : called as ``loader(name, resolution, layer, pretrained=..., checkpoint=...)``, ``name`` being
        what follows the colon; gives a :class:`Backbone`.

    Raises
    ------
    InputError
        If the prefix is taken or has other characters.
    """
    if not prefix.isidentifier() or prefix in _ADAPTERS:
        raise InputError(describe(f"prefix {prefix!r}", "a new name of letters, digits and underscores"))
    _ADAPTERS[prefix] = loader


def load_backbone(
    name: str = DEFAULT,
    resolution: int | None = None,
    layer: int | None = None,
    device: str | torch.device = "cpu",
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
) -> Backbone:
    """A frozen network from images to tokens.

    Parameters
    ----------
    name : see the module's description; default "dinov2_vits14".
    resolution : side of the square input in pixels; None: the one the network was made for.
    layer : which block's output the tokens are: None, the last one after the final norm; 0, 1, ... from
        the first, -1, -2, ... from the last, without the final norm.
    device : "cpu", "cuda", ..., or "auto" for an accelerator where there is one.
    pretrained : False for random weights, as a baseline or for tests.
    checkpoint : path of a file with weights, instead of those the name stands for.

    Raises
    ------
    InputError
        If the name, resolution, layer or device cannot be used.
    MissingExtraError
        If a package is missing: pip install 'convexheads[backbones]'.
    DataError
        If the weights cannot be read or downloaded.
    """
    where = pick_device(device)
    if resolution is not None and (not isinstance(resolution, int) or resolution < 1):
        raise InputError(describe(f"resolution={resolution!r}", "a positive number of pixels"))
    adapter, model = _adapter(name)
    target = _ADAPTERS[adapter]
    loader: Any = importlib.import_module(target).load if isinstance(target, str) else target
    backbone: Backbone = loader(model, resolution, layer, pretrained=pretrained, checkpoint=checkpoint)
    return backbone.to(where)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The torch device of a name; "auto" is CUDA, else Apple's MPS, else the processor.

    Raises
    ------
    InputError
        If the name is unknown or the device is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise InputError(describe(f"device {device!r}", "'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...")) from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(where.type, True):
        raise InputError(
            describe(f"device {device!r}", "a device that torch finds on this machine", "Use --device cpu")
        )
    return where


def _adapter(name: str) -> tuple[str, str]:
    prefix, colon, rest = name.partition(":")
    if prefix in _ADAPTERS and (colon == "" or rest):
        return prefix, rest if colon else prefix
    if (Path(name) / "config.json").is_file() or "/" in name:
        return "hf", name
    if colon == "":
        return "timm", name
    known = ", ".join(item if item == DEFAULT else f"{item}:NAME" for item in _ADAPTERS)
    raise InputError(describe(f"backbone {name!r}", f"one of {known}"))
