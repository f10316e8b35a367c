"""Any transformers vision model as a backbone: DINOv2, ViT, SigLIP, CLIP and their like."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convexheads.backbones.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    Transform,
    block_number,
    check_resolution,
    weights_sha256,
)
from convexheads.errors import DataError, InputError, describe, require
from convexheads.tokens.files import digest

# Parts behind the tokens. Many checkpoints have no weights for them: they would be random.
_BEHIND = ("pooler", "head")
_FINAL_NORMS = ("layernorm", "post_layernorm", "norm", "layer_norm", "ln_post", "rms_norm")
# Entries of a configuration that say nothing of what the network computes.
_NOT_COMPUTED = ("transformers_version", "dtype", "torch_dtype", "architectures", "id2label", "label2id")


def load(
    name: str,
    resolution: int | None = None,
    layer: int | None = None,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
) -> HFBackbone:
    """A vision model of transformers, or the vision half of a model of images and text.

    Parameters
    ----------
    name : name on the Hugging Face hub, or path of a folder with config.json, model.safetensors and
        preprocessor_config.json.
    resolution : side of the input in pixels; None: that of the model's image processor.
    layer : None, or a block number: see ``load_backbone``.
    pretrained : False for random weights (the configuration and the processor are still read).
    checkpoint : None; weights are given by the path of a folder as ``name``.

    Raises
    ------
    InputError
        If the model gives no tokens, or does not take this resolution or has no such layer.
    MissingExtraError
        If transformers is not installed.
    DataError
        If the model cannot be read or downloaded, or its weights are incomplete.
    """
    transformers = require("transformers", "backbones")
    processing = require("transformers.image_processing_base", "backbones")
    if checkpoint is not None:
        raise InputError(
            describe(f"checkpoint {checkpoint} for hf:{name}", "a folder saved by transformers", "Use hf:FOLDER")
        )
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise DataError(f"{name}: {describe('no config.json in it', 'a folder saved by transformers')}")
    missing: list[str] = []
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        processor, _ = processing.ImageProcessingMixin.get_image_processor_dict(name)
        if pretrained:
            with _silence(transformers):
                network, info = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
            missing = sorted(info["missing_keys"])
        else:
            network = transformers.AutoModel.from_config(config)
    except Exception as error:
        # Readers and the hub's client raise errors of several libraries; all mean that there is no model.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hf:{name} cannot be loaded ({reason}). Without a connection, give the path of a folder with "
            "config.json, model.safetensors and preprocessor_config.json, or use the packaged backbone "
            "dinov2_vits14"
        ) from error
    prefix = ""
    if hasattr(network, "vision_model"):
        # A model of images and text, or a shell around the vision model.
        prefix, network = "vision_model.", network.vision_model
    needed = [key for key in missing if key.startswith(prefix)]
    unused = tuple(f"{part}." for part in _BEHIND)
    needed = [key for key in needed if not key[len(prefix) :].startswith(unused) and "mask_token" not in key]
    if needed:
        raise DataError(
            f"hf:{name}: {describe(f'no weights for {len(needed)} tensors ({needed[0]}, ...)', 'a complete model')}"
        )
    for part in _BEHIND:
        if isinstance(getattr(network, part, None), nn.Module):
            setattr(network, part, nn.Identity())
    size = _own_resolution(processor, network.config) if resolution is None else resolution
    number = None
    norm = next((item for item in _FINAL_NORMS if isinstance(getattr(network, item, None), nn.Module)), None)
    if layer is not None:
        blocks = _blocks(network)
        if blocks is None or norm is None:
            raise InputError(describe(f"layer={layer} of {name}", "no layer: it has no list of equal blocks"))
        number = block_number(layer, len(blocks), name)
        # Blocks that nobody reads are not run; neither is the norm after the last.
        del blocks[number + 1 :]
        setattr(network, norm, nn.Identity())
    options = {key: value for key, value in network.config.to_dict().items() if key not in _NOT_COMPUTED}
    options = {key: value for key, value in options.items() if not key.startswith("_")}
    identity = {
        "library": "transformers",
        "class": type(network).__name__,
        "config": digest(json.loads(json.dumps(options, default=str))),
    }
    return HFBackbone(
        network.float(),
        norm=None if layer is not None else norm,
        name=f"hf:{name}",
        transform=_transform(processor, size, name),
        layer=number,
        identity=identity,
    )


class HFBackbone(Backbone):
    """``last_hidden_state`` of a transformers model after its final norm.

    CLIP applies its final norm to the pooled token only; here it is applied to every token, as timm does.
    """

    def __init__(self, module: Any, *, norm: str | None, **options: Any) -> None:
        super().__init__(module, **options)
        self._identity["weights"] = weights_sha256(module)
        config, size = module.config, self.resolution
        patch = getattr(config, "patch_size", None)
        patch = patch[0] if isinstance(patch, (list, tuple)) else patch
        if isinstance(patch, int) and patch > 0:
            check_resolution(size, patch, self.name)
        own = getattr(config, "image_size", size)
        own = own[0] if isinstance(own, (list, tuple)) else own
        parameters = inspect.signature(module.forward).parameters
        # Only off the trained resolution: the interpolation is not exactly the identity at it.
        self._interpolate = "interpolate_pos_encoding" in parameters and own != size
        self._norm_apart: str | None = None
        seen: list[int] = []
        hook = None
        if norm is not None:
            hook = getattr(module, norm).register_forward_hook(lambda _, inputs, out: seen.append(out.ndim))
        # Noise, not a blank image: the check below must see patches that change places.
        noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.inference_mode():
                first, second = self(noise), self(noise)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            got = f"{self.name} at {size} px"
            expected = "a vision model that takes images of this resolution"
            raise InputError(describe(got, expected, f"It says: {reason}")) from error
        finally:
            if hook is not None:
                hook.remove()
        if not torch.equal(first, second):
            expected = "the same tokens for the same image"
            got = f"{self.name}, which hides or shuffles patches at random"
            raise InputError(describe(got, expected, "Use a model without random masking"))
        if seen and 3 not in seen:
            self._norm_apart = norm
        side = size // patch if isinstance(patch, int) and patch > 0 else 0
        s = first.shape[1]
        if len(self._map_shape) == 4:
            self.describe_tokens((self._map_shape[2], self._map_shape[3]), 0)
        elif side and s >= side * side:
            registers = int(getattr(config, "num_register_tokens", 0) or 0)
            prefix = s - side * side
            self.describe_tokens((side, side), prefix, min(prefix, max(registers, prefix - 1)))
        else:
            # Patches merged on the way, as in Swin: a smaller grid without a CLS token.
            self.describe_tokens(None, 0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed images (n, 3, resolution, resolution) -> tokens (n, s, d)."""
        options = {"interpolate_pos_encoding": True} if self._interpolate else {}
        out: torch.Tensor = self.module(pixel_values=images, **options).last_hidden_state
        self._map_shape = tuple(out.shape)
        if out.ndim == 4:
            out = out.flatten(2).transpose(1, 2)
        if self._norm_apart is not None:
            out = getattr(self.module, self._norm_apart)(out)
        return out


@contextlib.contextmanager
def _silence(transformers: Any) -> Iterator[None]:
    """No table of the weights that are left out on purpose, such as a text model's; errors still show."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _blocks(network: Any) -> nn.ModuleList | None:
    """The list of the network's blocks: the only module list as long as the configuration says."""
    depth = getattr(network.config, "num_hidden_layers", None)
    lists = [item for item in network.modules() if isinstance(item, nn.ModuleList) and len(item) == depth]
    return lists[0] if len(lists) == 1 else None


def _length(size: Any) -> int | None:
    """Side of a square in pixels, from the ways in which processors give sizes."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return int(size) if size else None


def _own_resolution(processor: dict[str, Any], config: Any) -> int:
    crop = _length(processor.get("crop_size")) if processor.get("do_center_crop") else None
    own = getattr(config, "image_size", None)
    own = own[0] if isinstance(own, (list, tuple)) else own
    return crop or _length(processor.get("size")) or int(own or 224)


def _transform(processor: dict[str, Any], resolution: int, name: str) -> Transform:
    from PIL import Image

    factor = processor.get("rescale_factor", 1 / 255)
    if processor.get("do_rescale", True) and abs(float(factor) * 255 - 1) > 1e-3:
        raise InputError(describe(f"pixel values scaled by {factor} in hf:{name}", "values scaled to [0, 1]"))
    resize = _length(processor.get("size"))
    crop = _length(processor.get("crop_size")) if processor.get("do_center_crop") else None
    squash = isinstance(processor.get("size"), dict) and "height" in processor["size"]
    normalise = processor.get("do_normalize", True)
    mean = processor.get("image_mean") or IMAGENET_MEAN
    std = processor.get("image_std") or IMAGENET_STD
    return Transform(
        resolution,
        mean=tuple(mean) if normalise else (0.0, 0.0, 0.0),
        std=tuple(std) if normalise else (1.0, 1.0, 1.0),
        interpolation=Image.Resampling(processor.get("resample") or Image.Resampling.BICUBIC).name.lower(),
        fit="squash" if squash else "crop",
        crop=min(1.0, crop / resize) if crop and resize else float(processor.get("crop_pct") or 1.0),
    )
