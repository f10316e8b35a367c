"""Any timm model as a backbone: vision transformers, MLP mixers, gMLP, and networks with feature maps."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convexheads.backbones.base import Backbone, Transform, block_number, check_resolution, weights_sha256
from convexheads.errors import DataError, InputError, describe, require


def load(
    name: str,
    resolution: int | None = None,
    layer: int | None = None,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
) -> TimmBackbone:
    """A timm model.

    Parameters
    ----------
    name : name of the model, such as ``gmlp_s16_224`` or ``vit_small_patch14_dinov2.lvd142m``, or
        ``hf-hub:OWNER/NAME``.
    resolution : side of the input in pixels; None: the model's own.
    layer : None, or a block number: see ``load_backbone``.
    pretrained : False for random weights.
    checkpoint : path of a .safetensors or .pth file with weights, instead of timm's download. A .pth file is
        read without running code from it.

    Raises
    ------
    InputError
        If timm has no such model, or it does not take this resolution or has no such layer.
    MissingExtraError
        If timm is not installed.
    DataError
        If the weights cannot be read or downloaded.
    """
    timm = require("timm", "backbones")
    data = require("timm.data", "backbones")
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        fix = f"Near names: {', '.join(close)}" if close else "Names: timm.list_models()"
        raise InputError(describe(f"timm model {name!r}", "a name that timm has", fix))
    options: dict[str, Any] = {"num_classes": 0, "pretrained": pretrained}
    if checkpoint is not None:
        if not pretrained:
            raise InputError(describe("pretrained=False with a checkpoint", "one of the two"))
        if not Path(checkpoint).is_file():
            raise DataError(f"{checkpoint}: {describe('no such file', 'a file with weights')}")
        options |= {"pretrained_cfg_overlay": {"file": str(checkpoint)}}
    network = _create(timm, name, resolution, options, checkpoint)
    config = data.resolve_model_data_config(network)
    size = config["input_size"][1] if resolution is None else resolution
    transform = Transform(
        size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"] if config["interpolation"] != "random" else "bicubic",
        fit="squash" if config["crop_mode"] == "squash" else "crop",
        crop=float(config["crop_pct"]),
    )
    number = None
    if layer is not None:
        blocks = getattr(network, "blocks", None)
        if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not hasattr(network, "norm"):
            raise InputError(describe(f"layer={layer} of {name}", "no layer: timm gives it no list of equal blocks"))
        number = block_number(layer, len(blocks), name)
        # Blocks that nobody reads are not run; neither is the norm after the last.
        network.blocks = blocks[: number + 1]
        network.norm = nn.Identity()
    # The pooling and classifier are not part of the tokens, and random where the weights have none.
    if hasattr(network, "reset_classifier"):
        network.reset_classifier(0, "")
    identity = {"library": "timm", "class": type(network).__name__, "name": name}
    return TimmBackbone(network, name=f"timm:{name}", transform=transform, layer=number, identity=identity)


class TimmBackbone(Backbone):
    """``forward_features`` of a timm model, feature maps (n, d, h, w) laid out as h * w tokens."""

    def __init__(self, module: Any, **options: Any) -> None:
        super().__init__(module, **options)
        self._identity["weights"] = weights_sha256(module)
        self._channels_last = str(getattr(module, "output_fmt", "NCHW")).endswith("NHWC")
        size = self.resolution
        embed = getattr(module, "patch_embed", None) or getattr(module, "stem", None)
        patch = getattr(embed, "patch_size", None)
        if isinstance(patch, (tuple, list)):
            check_resolution(size, int(patch[0]), self.name)
        try:
            with torch.inference_mode():
                shape = tuple(module.forward_features(torch.zeros(1, 3, size, size)).shape)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(describe(f"resolution {size} for {self.name}", f"another one ({error})")) from error
        if len(shape) == 4:
            self.describe_tokens(shape[1:3] if self._channels_last else shape[2:4], 0)
            return
        prefix = int(getattr(module, "num_prefix_tokens", 0))
        grid = getattr(embed, "grid_size", None)
        patches = tuple(grid) if grid and len(shape) == 3 and grid[0] * grid[1] == shape[1] - prefix else None
        has_cls = prefix > 0 and getattr(module, "cls_token", None) is not None
        self.describe_tokens(patches, prefix, prefix - 1 if has_cls else prefix)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed images (n, 3, resolution, resolution) -> tokens (n, s, d)."""
        out: torch.Tensor = self.module.forward_features(images)  # type: ignore[operator]
        if out.ndim == 4:
            out = out.flatten(1, 2) if self._channels_last else out.flatten(2).transpose(1, 2)
        return out


def _create(
    timm: Any, name: str, resolution: int | None, options: dict[str, Any], checkpoint: str | Path | None
) -> Any:
    # Transformers want their input size at construction; convolutional networks know no such option.
    attempts = [{}] if resolution is None else [{"img_size": resolution}, {}]
    for number, extra in enumerate(attempts):
        try:
            return timm.create_model(name, **options, **extra)
        except TypeError as error:
            if "img_size" in str(error) and number == 0:
                continue
            raise
        except (AssertionError, RuntimeError) as error:
            reason = str(error).strip().splitlines()
            if "size mismatch" in str(error) and extra:
                got = f"resolution {resolution} for {name}"
                raise InputError(describe(got, "the resolution it was trained at", "Leave --resolution out")) from error
            if isinstance(error, AssertionError) or "not divisible" in str(error):
                raise InputError(
                    describe(f"resolution {resolution} for {name}", f"another one ({' '.join(reason)})")
                ) from error
            raise _no_weights(name, error, checkpoint) from error
        except Exception as error:
            # The hub's client raises errors of several libraries; all mean that there are no weights.
            raise _no_weights(name, error, checkpoint) from error
    raise AssertionError("unreachable")


def _no_weights(name: str, error: Exception, checkpoint: str | Path | None) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if checkpoint is not None:
        return DataError(f"{checkpoint}: the weights do not fit {name} ({reason}). Give those of this model")
    return DataError(
        f"the weights of timm:{name} cannot be downloaded ({reason}). Without a connection, give a file with "
        "them (--checkpoint), or use the packaged backbone dinov2_vits14"
    )
