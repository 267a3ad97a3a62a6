"""Hugging Face's ViT, DeiT, Dinov2 and Dinov2WithRegisters.

Files have the names of transformers 4, which transformers 5 still writes; its modules in memory have others. One
layout reads and writes the first, one the second.
"""

import re
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.vit.checkpoint_timm import dense, depth_of, gated, heads_of, norm, patches, square
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.table import Entry, Layout, Shape, Table

PREFIXES = ("", "vit.", "deit.", "dinov2.", "dinov2_with_registers.")
PATCHES = "embeddings.patch_embeddings.projection"
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
ACTIVATIONS |= {"relu": "relu"}
TYPES = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}


def _family(config: ViTConfig) -> str:
    """The model_type of such a network. Raises MmjaxError if there is none."""
    dino = config.layer_scale is not None
    family = ("dinov2_with_registers" if config.registers else "dinov2") if dino else "vit"
    family = "deit" if config.distilled else family
    wrong = {
        "root": config.root is not None,
        "class_token": not (config.class_token and config.class_position),
        "positions": config.positions == "big_vision",
        "norm_after_pool": config.norm_after_pool,
        "registers": bool(config.registers) and not dino,
        "gated": config.gated and not dino,
        "mask_token": config.mask_token if not dino else bool(config.registers) and not config.mask_token,
        "representation": config.representation is not None and (dino or bool(config.num_classes)),
        "pool": config.pool != ("token_and_mean" if dino and config.num_classes else "token"),
    }
    fields = [name for name, bad in wrong.items() if bad]
    if fields:
        raise MmjaxError(f"Hugging Face's {TYPES[family]} cannot hold this ViTConfig's {', '.join(fields)}")
    return family


def table(config: ViTConfig) -> Table:
    """Names of transformers 4."""
    c, family = config, _family(config)
    base = f"{family}." if c.num_classes else ""
    entries = [
        Entry(f"{base}embeddings.cls_token", "params/cls"),
        Entry(f"{base}embeddings.position_embeddings", "params/positions"),
        *patches(base + PATCHES, c),
    ]
    if c.distilled:
        entries.append(Entry(f"{base}embeddings.distillation_token", "params/distillation"))
    if c.registers:
        entries.append(Entry(f"{base}embeddings.register_tokens", "params/registers"))
    if c.mask_token:
        entries.append(Entry(f"{base}embeddings.mask_token", "params/mask_token"))
    for i in range(c.depth):
        entries += _block(c, f"{base}encoder.layer.{i}", f"encoder/block_{i}")
    entries += norm(f"{base}layernorm", "norm")
    entries += dense("pooler.dense", "pre_logits") if c.representation else []
    entries += dense("cls_classifier" if c.distilled_head else "classifier", "head") if c.num_classes else []
    entries += dense("distillation_classifier", "head_distilled") if c.distilled_head else []
    return tuple(entries)


def _block(config: ViTConfig, source: str, target: str) -> list[Entry]:
    entries = []
    for name in ("query", "key", "value"):
        entries += dense(f"{source}.attention.attention.{name}", f"{target}/attention/{name[0]}")
    entries += dense(f"{source}.attention.output.dense", f"{target}/attention/out")
    if config.layer_scale is None:
        entries += norm(f"{source}.layernorm_before", f"{target}/norm_1")
        entries += norm(f"{source}.layernorm_after", f"{target}/norm_2")
        entries += dense(f"{source}.intermediate.dense", f"{target}/mlp/up")
        return entries + dense(f"{source}.output.dense", f"{target}/mlp/down")
    for i in (1, 2):
        entries += norm(f"{source}.norm{i}", f"{target}/norm_{i}")
        entries.append(Entry(f"{source}.layer_scale{i}.lambda1", f"params/{target}/scale_{i}"))
    if config.gated:
        entries += gated(f"{source}.mlp.weights_in", f"{target}/mlp")
        return entries + dense(f"{source}.mlp.weights_out", f"{target}/mlp/down")
    return entries + dense(f"{source}.mlp.fc1", f"{target}/mlp/up") + dense(f"{source}.mlp.fc2", f"{target}/mlp/down")


# transformers 4 -> the modules of transformers 5. ViT and DeiT lose a level; Dinov2 keeps it.
ATTENTION = (
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
ENCODER = (
    (r"\bencoder\.layer\.", "layers."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def modules_table(config: ViTConfig) -> Table:
    """The same with the names of transformers 5's modules."""
    rules = ATTENTION + (ENCODER if config.layer_scale is None else ((r"\.weights_out\.", ".down_proj."),))
    entries = []
    for entry in table(config):
        key = entry.sources[0]
        if ".mlp.weights_in." in key:  # two matrices there
            if key.endswith("weight"):
                prefix = entry.targets[0].removeprefix("params/").removesuffix("/gate/kernel")
                start = key.removesuffix("weights_in.weight")
                entries += [*dense(f"{start}gate_proj", f"{prefix}/gate"), *dense(f"{start}up_proj", f"{prefix}/up")]
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        entries.append(Entry(key, entry.target, entry.op))
    return tuple(entries)


def config(shapes: Mapping[str, Shape], config_json: Mapping[str, Any] | None) -> ViTConfig:
    """Sizes from the shapes; heads, epsilon, activation and rates from config.json, else their usual values."""
    config_json = config_json or {}
    base = next(prefix for prefix in PREFIXES if f"{prefix}{PATCHES}.weight" in shapes)
    ours = {key.removeprefix(base): shape for key, shape in shapes.items()}
    width, channels, patch, _ = ours[f"{PATCHES}.weight"]
    if channels != 3:
        raise MmjaxError(f"{base}{PATCHES}.weight wants images of {channels} channels, not 3")
    act = config_json.get("hidden_act", "gelu")
    if (
        act not in ACTIVATIONS
        or config_json.get("pooler_act", "tanh") != "tanh"
        or not config_json.get("qkv_bias", True)
    ):
        raise MmjaxError(f"config.json: hidden_act={act!r}, pooler_act and qkv_bias: this ViT is not supported")
    dino, distilled = any(key.endswith("layer_scale1.lambda1") for key in ours), "embeddings.distillation_token" in ours
    classes = shapes.get("classifier.weight", shapes.get("cls_classifier.weight", (0,)))[0]
    size = config_json.get("image_size") or square(
        ours["embeddings.position_embeddings"][1] - 1 - int(distilled), patch, base
    )
    registers = ours.get("embeddings.register_tokens", (1, 0))[1]
    return ViTConfig(
        width=width,
        depth=depth_of(ours, "encoder.layer.") or depth_of(ours, "layers."),
        heads=config_json["num_attention_heads"] if "num_attention_heads" in config_json else heads_of(width),
        hidden=_hidden(ours),
        patch=patch,
        image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        num_classes=classes,
        rule="bicubic_antialias" if registers else "bicubic",
        distilled=distilled,
        distilled_head="distillation_classifier.weight" in shapes,
        registers=registers,
        mask_token="embeddings.mask_token" in ours,
        pool="token_and_mean" if dino and classes else "token",
        representation=shapes.get("pooler.dense.weight", (None,))[0],
        act=ACTIVATIONS[act],  # type: ignore[arg-type]
        gated=any(key.endswith(("mlp.weights_out.weight", "mlp.down_proj.weight")) for key in ours),
        epsilon=config_json.get("layer_norm_eps", 1e-6 if dino else 1e-12),
        layer_scale=config_json.get("layerscale_value", 1.0) if dino else None,
        dropout=config_json.get("hidden_dropout_prob", 0.0),
        attention_dropout=config_json.get("attention_probs_dropout_prob", 0.0),
        drop_path=config_json.get("drop_path_rate", 0.0) if dino else 0.0,
        init="normal",
    )


def _hidden(shapes: Mapping[str, Shape]) -> int:
    """Width of the feed-forward: the input width of its last matrix [d, hidden]."""
    ends = ("0.output.dense.weight", "0.mlp.fc2.weight", "0.mlp.weights_out.weight", "0.mlp.down_proj.weight")
    return next(shape[1] for key, shape in shapes.items() if key.endswith(ends) and ".attention." not in key)


def hf_config(config: ViTConfig) -> dict[str, Any]:
    """The config.json of the model class that holds the network."""
    c, family = config, _family(config)
    head = "ForImageClassification" + ("WithTeacher" if c.distilled_head else "") if c.num_classes else "Model"
    height, width = c.image_size
    fields: dict[str, Any] = {
        "architectures": [TYPES[family] + head],
        "model_type": family,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == c.act),
        "layer_norm_eps": c.epsilon,
        "image_size": height if height == width else [height, width],
        "patch_size": c.patch,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.attention_dropout,
    }
    if c.layer_scale is None:
        return (
            fields
            | {"intermediate_size": c.hidden}
            | ({"pooler_output_size": c.representation} if c.representation else {})
        )
    fields |= {"mlp_ratio": _ratio(c), "layerscale_value": c.layer_scale, "drop_path_rate": c.drop_path}
    fields |= {"use_swiglu_ffn": c.gated, "use_mask_token": c.mask_token}
    return fields | ({"num_register_tokens": c.registers} if c.registers else {})


def _ratio(config: ViTConfig) -> int:
    """Dinov2's `mlp_ratio`, from which it computes the width of the feed-forward."""
    for ratio in range(1, 17):
        wide = config.width * ratio
        if config.hidden == ((int(wide * 2 / 3) + 7) // 8 * 8 if config.gated else wide):
            return ratio
    raise MmjaxError(f"hidden={config.hidden} is no whole multiple of width={config.width}, as Dinov2 wants it")


def _recognises(keys: Set[str], config_json: Mapping[str, Any] | None, mark: str) -> bool:
    known = config_json is None or config_json.get("model_type", "vit") in TYPES
    named = any(f"{prefix}{PATCHES}.weight" in keys and f"{prefix}embeddings.cls_token" in keys for prefix in PREFIXES)
    return known and named and any(mark in key for key in keys)


ASSUMED = {"heads": "num_attention_heads", "epsilon": "layer_norm_eps", "act": "hidden_act"}

HF = Layout(
    name="hf",
    recognise=lambda keys, config_json: _recognises(keys, config_json, ".attention.attention.query."),
    config=config,
    table=table,
    hf_config=hf_config,
    assumed=ASSUMED,
)
HF_MODULES = Layout(
    name="hf_modules",
    recognise=lambda keys, config_json: _recognises(keys, config_json, ".attention.q_proj."),
    config=config,
    table=modules_table,
    hf_config=hf_config,
    assumed=ASSUMED,
)
