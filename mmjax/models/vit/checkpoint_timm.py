"""timm's keys: timm, DeiT, and the original DINOv2, which adds a few (models/vision_transformer.py)."""

import math
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from mmjax.errors import MmjaxError
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.table import Entry, Layout, Op, Shape, Table, chain, conv, linear, reshape, same, split


def dense(source: str, target: str, op: Op = linear) -> list[Entry]:
    """A torch Linear, or with another op whatever has `weight` and `bias`."""
    return [Entry(f"{source}.weight", f"params/{target}/kernel", op), Entry(f"{source}.bias", f"params/{target}/bias")]


def norm(source: str, target: str) -> list[Entry]:
    return [Entry(f"{source}.weight", f"params/{target}/scale"), Entry(f"{source}.bias", f"params/{target}/bias")]


def patches(source: str, config: ViTConfig) -> list[Entry]:
    """The patch projection: a convolution there, a matrix here."""
    return dense(source, "patch/projection", chain(conv, reshape((config.patch, config.patch, 3, config.width))))


def heads_of(width: int) -> int:
    """Heads are not in a torch file: 64 wide, but in H, g, G and So400m, which have 16.

    Raises MmjaxError for a width that is no multiple of 64.
    """
    if width % 64:
        raise MmjaxError(f"the number of heads of a ViT {width} wide is in no array: config.json should have it")
    return 16 if width in (1152, 1280, 1408, 1664) else width // 64


def square(tokens: int, stride: int, file: str) -> tuple[int, int]:
    """The image size with this number of patches."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise MmjaxError(f"{file} has {tokens} patch positions, which is no square: config.json should have image_size")
    return side * stride, side * stride


def depth_of(shapes: Mapping[str, Shape], start: str) -> int:
    """The count of numbers that follow `start` in the keys."""
    numbers = {key.removeprefix(start).split(".")[0] for key in shapes if key.startswith(start)}
    return len(numbers)


def table(config: ViTConfig) -> Table:
    """Sources by timm's names; registers under DINOv2's where there is a mask token."""
    c = config
    entries = [] if c.positions == "big_vision" else [Entry("pos_embed", "params/positions")]
    entries += [Entry("cls_token", "params/cls")] if c.class_token else []
    entries += [Entry("dist_token", "params/distillation")] if c.distilled else []
    entries += [Entry("mask_token", "params/mask_token")] if c.mask_token else []
    registers = "register_tokens" if c.mask_token else "reg_token"
    entries += [Entry(registers, "params/registers")] if c.registers else []
    entries += patches("patch_embed.proj", c)
    for i in range(c.depth):
        entries += _block(c, f"blocks.{i}", f"encoder/block_{i}")
    entries += norm("fc_norm" if c.norm_after_pool else "norm", "norm")
    entries += dense("pre_logits.fc", "pre_logits") if c.representation else []
    entries += dense("head", "head") if c.num_classes else []
    entries += dense("head_dist", "head_distilled") if c.distilled_head else []
    return tuple(entries)


def _without_key_bias(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q, k, v = np.split(x, 3)
    if k.any():
        raise ValueError("the keys have a bias, and the network has key_bias=False")
    return q, v


no_key_bias = Op("no_key_bias", _without_key_bias, lambda q, v: np.concatenate([q, np.zeros_like(q), v]), divides=True)
"""One array of the file, with zeros as the bias of the keys <-> the biases of queries and of values."""


def _block(config: ViTConfig, source: str, target: str) -> list[Entry]:
    parts = {name: f"params/{target}/attention/{name}" for name in ("q", "k", "v")}
    kernels = tuple(f"{part}/kernel" for part in parts.values())
    biases = tuple(f"{part}/bias" for name, part in parts.items() if config.key_bias or name != "k")
    entries = [
        *norm(f"{source}.norm1", f"{target}/norm_1"),
        Entry(f"{source}.attn.qkv.weight", kernels, chain(split(3), linear)),
        Entry(f"{source}.attn.qkv.bias", biases, split(3) if config.key_bias else no_key_bias),
        *dense(f"{source}.attn.proj", f"{target}/attention/out"),
        *norm(f"{source}.norm2", f"{target}/norm_2"),
    ]
    if config.layer_scale is not None:
        entries += [Entry(f"{source}.ls{i}.gamma", f"params/{target}/scale_{i}") for i in (1, 2)]
    if config.gated:
        return entries + gated(f"{source}.mlp.w12", f"{target}/mlp") + dense(f"{source}.mlp.w3", f"{target}/mlp/down")
    return entries + dense(f"{source}.mlp.fc1", f"{target}/mlp/up") + dense(f"{source}.mlp.fc2", f"{target}/mlp/down")


def gated(source: str, target: str) -> list[Entry]:
    """Gate and up in one matrix, the gate first."""
    gate_up = [f"params/{target}/{name}" for name in ("gate", "up")]
    return [
        Entry(f"{source}.weight", tuple(f"{part}/kernel" for part in gate_up), chain(split(2), linear)),
        Entry(f"{source}.bias", tuple(f"{part}/bias" for part in gate_up), chain(split(2), same)),
    ]


def config(shapes: Mapping[str, Shape], config_json: Mapping[str, Any] | None) -> ViTConfig:
    """Sizes from the shapes, heads from the `model_args` of timm's config.json; erf GELU, LayerNorm epsilon 1e-6."""
    model_args = (config_json or {}).get("model_args", {})
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    is_gated = "blocks.0.mlp.w3.weight" in shapes
    hidden = shapes["blocks.0.mlp.w3.weight"][1] if is_gated else shapes["blocks.0.mlp.fc1.weight"][0]
    registers = shapes.get("register_tokens", shapes.get("reg_token", (1, 0)))[1]
    class_token, distilled = "cls_token" in shapes, "dist_token" in shapes
    positions = shapes["pos_embed"][1] - int(distilled)
    # timm's models with registers keep no position for the class token (no_embed_class).
    class_position = class_token and "reg_token" not in shapes
    after = "fc_norm.weight" in shapes
    dino = "mask_token" in shapes
    return ViTConfig(
        width=width,
        depth=depth_of(shapes, "blocks."),
        heads=model_args["num_heads"] if "num_heads" in model_args else heads_of(width),
        hidden=hidden,
        patch=patch,
        image_size=square(positions - int(class_position), patch, "pos_embed"),
        num_classes=shapes.get("head.weight", (0,))[0],
        rule="dinov2" if dino and not registers else "bicubic_antialias",
        class_token=class_token,
        class_position=class_position,
        distilled=distilled,
        distilled_head="head_dist.weight" in shapes,
        registers=registers,
        mask_token=dino,
        pool="mean" if after or not class_token else "token",
        norm_after_pool=after,
        representation=shapes.get("pre_logits.fc.weight", (None,))[0],
        gated=is_gated,
        layer_scale=1.0 if "blocks.0.ls1.gamma" in shapes else None,
        init="timm",
    )


def _recognises(keys: Set[str]) -> bool:
    needed = {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"}
    return needed <= keys and "blocks.0.attn.q_bias" not in keys  # EVA's


TIMM = Layout(
    name="timm",
    recognise=lambda keys, _: _recognises(keys) and "mask_token" not in keys,
    config=config,
    table=table,
    assumed={"heads": "model_args.num_heads", "epsilon": "", "act": "", "preprocess": ""},
)
"""timm and DeiT."""

DINOV2 = Layout(
    name="dinov2",
    recognise=lambda keys, _: _recognises(keys) and "mask_token" in keys and "decoder_embed.weight" not in keys,
    config=config,
    table=table,
    wrappers=("teacher", "state_dict", "model_state_dict", "model", "state_dict_ema"),
    strip=("backbone.",),
    renames=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),  # cut in chunks for FSDP; the second number counts through
    ignored=("dino_head.*", "ibot_head.*"),
)
"""facebookresearch/dinov2: released backbones, and the teacher of a training checkpoint."""
