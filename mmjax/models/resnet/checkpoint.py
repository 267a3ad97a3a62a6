"""Public layouts of ResNets: torchvision's (timm's and MoCo's linear classifiers too), Hugging Face's, and
that of akamaster/pytorch_resnet_cifar10."""

import math
import re
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.resnet.network import EXPANSION, ResNetConfig, geometries
from mmjax.weights.table import Entry, Layout, Shape, Table, conv, int64, linear

HF_STEM = "resnet.embedder.embedder"


def norm_entries(public: str, ours: str) -> Table:
    """The five arrays of a torch BatchNorm; the oldest files have no num_batches_tracked."""
    return (
        Entry(f"{public}.weight", f"params/{ours}/scale"),
        Entry(f"{public}.bias", f"params/{ours}/bias"),
        Entry(f"{public}.running_mean", f"stats/{ours}/mean"),
        Entry(f"{public}.running_var", f"stats/{ours}/var"),
        Entry(f"{public}.num_batches_tracked", f"stats/{ours}/count", int64, optional=True, default=0),
    )


def conv_entries(public_conv: str, public_norm: str, our_conv: str, our_norm: str) -> Table:
    return (Entry(f"{public_conv}.weight", f"params/{our_conv}/kernel", conv), *norm_entries(public_norm, our_norm))


def head_entries(public: str) -> Table:
    return (Entry(f"{public}.weight", "params/head/kernel", linear), Entry(f"{public}.bias", "params/head/bias"))


def backbone_table(config: ResNetConfig, shortcut: str = "downsample") -> Table:
    """torchvision's keys without a prefix and without the head."""
    table = list(conv_entries("conv1", "bn1", "stem_conv", "stem_bn"))
    for stage, blocks in enumerate(geometries(config), 1):
        for i, geometry in enumerate(blocks):
            ours, public = f"stage{stage}_block{i}", f"layer{stage}.{i}"
            for j in range(1, 3 if config.block == "basic" else 4):
                table += conv_entries(f"{public}.conv{j}", f"{public}.bn{j}", f"{ours}/conv{j}", f"{ours}/bn{j}")
            projected = geometry.stride != 1 or geometry.inside != geometry.out
            if projected and config.shortcut == "projection":
                start = f"{public}.{shortcut}"
                table += conv_entries(f"{start}.0", f"{start}.1", f"{ours}/shortcut_conv", f"{ours}/shortcut_bn")
    return tuple(table)


def torchvision_table(config: ResNetConfig) -> Table:
    _refuse(config, "torchvision", stem="imagenet", shortcut="projection")
    return backbone_table(config) + (head_entries("fc") if config.num_classes else ())


def torchvision_config(
    shapes: Mapping[str, Shape], config_json: Mapping[str, Any] | None = None, **fields: Any
) -> ResNetConfig:
    """Sizes by the arrays' shapes. Strides leave no trace in them: v1.5 (stride in the 3x3), no dilation."""
    block = "bottleneck" if "layer1.0.conv3.weight" in shapes else "basic"
    last = "conv3" if block == "bottleneck" else "conv2"
    stages = range(1, 1 + max(int(key[5]) for key in shapes if re.match(r"layer\d\.", key)))
    planes = tuple(shapes[f"layer{s}.0.{last}.weight"][0] // EXPANSION[block] for s in stages)
    width, per_group = shapes["layer1.0.conv2.weight"][:2]
    groups = width // per_group if block == "bottleneck" else 1
    return ResNetConfig(
        layers=tuple(sum(f"layer{s}.{i}.conv1.weight" in shapes for i in range(1000)) for s in stages),
        block=block,
        stem_width=shapes["conv1.weight"][0],
        stage_widths=planes,
        groups=groups,
        width_per_group=math.ceil(64 * per_group / planes[0]) if block == "bottleneck" else 64,
        **dict[str, Any](num_classes=shapes["fc.weight"][0] if "fc.weight" in shapes else 0) | fields,
    )


def _is_torchvision(keys: Set[str], config_json: Mapping[str, Any] | None) -> bool:
    needed = {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.conv1.weight"}
    return needed <= keys and "layer1.0.bn1.running_mean" in keys


# -------------------------------------------------------------------------------------------------------- Hugging Face


def _to_hf(key: str) -> str:
    """torchvision's key -> that of Hugging Face."""
    rules = (
        (r"^conv1\.", f"{HF_STEM}.convolution."),
        (r"^bn1\.", f"{HF_STEM}.normalization."),
        (r"^fc\.", "classifier.1."),
        (r"\.downsample\.0\.", ".shortcut.convolution."),
        (r"\.downsample\.1\.", ".shortcut.normalization."),
    )
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    match = re.match(r"layer(\d)\.(\d+)\.(.*)", key)
    if not match:
        return key
    stage, block, rest = int(match[1]) - 1, match[2], match[3]
    inner = re.match(r"(conv|bn)(\d)\.(.*)", rest)
    if inner:
        kind = "convolution" if inner[1] == "conv" else "normalization"
        rest = f"layer.{int(inner[2]) - 1}.{kind}.{inner[3]}"
    return f"resnet.encoder.stages.{stage}.layers.{block}.{rest}"


def hf_table(config: ResNetConfig) -> Table:
    _check_hf(config)
    entries = backbone_table(config) + (head_entries("fc") if config.num_classes else ())
    return tuple(Entry(_to_hf(e.sources[0]), e.target, e.op, e.optional, e.default) for e in entries)


def hf_config_of(shapes: Mapping[str, Shape], config_json: Mapping[str, Any] | None) -> ResNetConfig:
    """From config.json; without one its defaults and the arrays' shapes.

    Raises MmjaxError for an activation other than ReLU, and bottlenecks whose width 4 does not divide.
    """
    config_json = config_json or {}
    if config_json.get("hidden_act", "relu") != "relu":
        raise MmjaxError(f"config.json: hidden_act={config_json['hidden_act']!r}; only relu is known")
    match = [
        re.match(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution\.weight", k) for k in shapes
    ]
    positions = {(int(m[1]), int(m[2]), int(m[3])) for m in match if m}
    stages = range(1 + max(stage for stage, _, _ in positions))
    deepest = max(layer for _, _, layer in positions)
    block = "bottleneck" if deepest == 2 else "basic"
    start = "resnet.encoder.stages.{}.layers.0.layer.{}.convolution.weight"
    outs = [shapes[start.format(stage, deepest)][0] for stage in stages]
    if block == "bottleneck" and any(out % 4 for out in outs):
        raise MmjaxError(f"config.json: hidden_sizes={outs} of bottlenecks should be multiples of 4")
    return ResNetConfig(
        layers=tuple(len({block for s, block, _ in positions if s == stage}) for stage in stages),
        block=block,
        stem_width=shapes[f"{HF_STEM}.convolution.weight"][0],
        stage_widths=tuple(out // EXPANSION[block] for out in outs),
        stride_in_1x1=block == "bottleneck" and bool(config_json.get("downsample_in_bottleneck", False)),
        first_stage_stride=2 if config_json.get("downsample_in_first_stage", False) else 1,
        num_classes=shapes["classifier.1.weight"][0] if "classifier.1.weight" in shapes else 0,
    )


def hf_config(config: ResNetConfig) -> dict[str, Any]:
    """The config.json of `ResNetForImageClassification`, or without a head of `ResNetModel`."""
    _check_hf(config)
    fields: dict[str, Any] = {
        "architectures": ["ResNetForImageClassification" if config.num_classes else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": config.stem_width,
        "hidden_sizes": [width * config.expansion for width in config.stage_widths],
        "depths": list(config.layers),
        "layer_type": config.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": config.first_stage_stride == 2,
        "downsample_in_bottleneck": config.stride_in_1x1,
        "torch_dtype": "float32",
    }
    return fields


def _check_hf(config: ResNetConfig) -> None:
    _refuse(config, "hf", stem="imagenet", shortcut="projection", groups=1, width_per_group=64, dilate=(False,) * 3)


def _refuse(config: ResNetConfig, layout: str, **fields: Any) -> None:
    """Raises MmjaxError if a field has another value than the layout allows."""
    wrong = {name: getattr(config, name) for name, value in fields.items() if getattr(config, name) != value}
    if wrong:
        values = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise MmjaxError(f"the layout {layout!r} holds no ResNet with {values}")


# --------------------------------------------------------------------------------------------------------------- CIFAR


def cifar_table(config: ResNetConfig) -> Table:
    _refuse(config, "cifar", stem="cifar", block="basic")
    return backbone_table(config, "shortcut") + (head_entries("linear") if config.num_classes else ())


def cifar_config(shapes: Mapping[str, Shape], config_json: Mapping[str, Any] | None) -> ResNetConfig:
    """Option A has no keys, so a plain net has the same keys: option A is assumed."""
    projected = any(".shortcut." in key for key in shapes)
    return torchvision_config(
        shapes,
        stem="cifar",
        shortcut="projection" if projected else "pad",
        num_classes=shapes["linear.weight"][0],
    )


def _is_cifar(keys: Set[str], config_json: Mapping[str, Any] | None) -> bool:
    return {
        "conv1.weight",
        "layer1.0.bn1.running_mean",
        "linear.weight",
    } <= keys and "layer4.0.conv1.weight" not in keys


LAYOUTS = (
    Layout(
        name="hf",
        recognise=lambda keys, config_json: f"{HF_STEM}.convolution.weight" in keys,
        config=hf_config_of,
        table=hf_table,
        hf_config=hf_config,
        renames=((r"^(embedder|encoder)\.", r"resnet.\1."),),
        assumed={"stride_in_1x1": "downsample_in_bottleneck", "first_stage_stride": "downsample_in_first_stage"},
    ),
    Layout("torchvision", _is_torchvision, torchvision_config, torchvision_table, assumed={"preprocess": ""}),
    Layout("cifar", _is_cifar, cifar_config, cifar_table, assumed={"shortcut": ""}),
)
