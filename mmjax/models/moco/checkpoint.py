"""The layouts of facebookresearch/moco (v1, v2) and facebookresearch/moco-v3.

Their linear classifiers have torchvision's and timm's keys: `mmjax.load` reads those as ResNet or ViT. The heads of
v3's ViT-S, 12, are in no array, and DeiT-S of the same shapes has 6: put a config.json with
{"model_args": {"num_heads": 12}} beside the file.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.moco.network import MoCoConfig
from mmjax.models.resnet.checkpoint import backbone_table, torchvision_config
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit import checkpoint_timm as timm
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Op, Shape, Table, chain, int64, linear, reshape, transpose

Shapes = Mapping[str, Shape]


def head_entries(source: str, target: str, config: MoCoConfig, layers: int, last_norm: bool) -> Table:
    """A head as torch's Sequential: v2 has a ReLU, v3 a norm and a ReLU, after each Linear but the last."""
    if config.version == 1:
        return tuple(timm.dense(source, f"{target}/dense_0"))
    entries: list[Entry] = []
    for i in range(layers):
        ours = f"{target}/dense_{i}"
        if config.version == 2:
            entries += timm.dense(f"{source}.{2 * i}", ours)
            continue
        entries.append(Entry(f"{source}.{3 * i}.weight", f"params/{ours}/kernel", linear))
        last = i == layers - 1
        if not last or last_norm:
            entries += _norm(f"{source}.{3 * i + 1}", f"{target}/bn_{i}", affine=not last)
    return tuple(entries)


def _norm(source: str, target: str, affine: bool) -> list[Entry]:
    entries = timm.norm(source, target) if affine else []
    for public, ours in (("running_mean", "mean"), ("running_var", "var")):
        entries.append(Entry(f"{source}.{public}", f"stats/{target}/{ours}"))
    count = Entry(f"{source}.num_batches_tracked", f"stats/{target}/count", int64, optional=True, default=0)
    return [*entries, count]


def encoder_table(config: MoCoConfig) -> Table:
    """The entries of backbone and projector, without a prefix."""
    backbone = config.backbone
    entries = backbone_table(backbone) if isinstance(backbone, ResNetConfig) else timm.table(backbone)
    inside = [moved(entry, "", "backbone") for entry in entries]
    head = "fc" if isinstance(backbone, ResNetConfig) else "head"
    return tuple(inside) + head_entries(head, "projector", config, config.layers, last_norm=True)


TWICE = Op("twice", lambda x: (x, x), lambda query, key: query, divides=True)
"""One array of the file <-> two of ours, of which the first is written back."""


def _copied_statistics(entry: Entry) -> Entry:
    """The entry with the key encoder's statistics as a second target: that encoder starts as a copy."""
    if not entry.targets[0].startswith("stats/query/"):
        return entry
    targets = (entry.targets[0], entry.targets[0].replace("stats/query/", "stats/key/"))
    return dataclasses.replace(entry, target=targets, op=chain(entry.op, TWICE))


def table(config: MoCoConfig) -> Table:
    """The entries of both encoders, the predictor and the queue; without `holds_state` no key encoder and no queue."""
    query, key = ("base_encoder.", "momentum_encoder.") if config.version == 3 else ("encoder_q.", "encoder_k.")
    encoder = encoder_table(config)
    entries = [moved(entry, query, "", stats="stats/query") for entry in encoder]
    if not config.holds_state:
        entries = [_copied_statistics(entry) for entry in entries]
    else:
        entries += [moved(entry, key, "", "stats/momentum", "stats/key") for entry in encoder]
        if config.queue:
            entries.append(Entry("queue", "stats/queue/keys", transpose((1, 0))))
            entries.append(Entry("queue_ptr", "stats/queue/cursor", chain(int64, reshape((1,), ()))))
    if config.version == 3:
        predictor = head_entries("predictor", "predictor", config, 2, config.predictor_norm)
        entries += [moved(entry, "", "", stats="stats/query") for entry in predictor]
    return tuple(entries)


def _export_table(config: MoCoConfig) -> Table:
    """Raises MmjaxError for stems that torchvision's keys do not determine."""
    backbone = config.backbone
    if isinstance(backbone, ResNetConfig) and (backbone.stem, backbone.shortcut) != ("imagenet", "projection"):
        raise MmjaxError(f"MoCo's layouts hold no ResNet with stem={backbone.stem!r}, shortcut={backbone.shortcut!r}")
    return table(config)


def config_of(shapes: Shapes, config_json: Mapping[str, Any] | None, version: int) -> MoCoConfig:
    """The config, from the arrays' shapes. No array has a ViT's number of heads: it is 12, as for the
    widths that MoCo v3 publishes, 384 and 768.
    """
    start = "base_encoder." if version == 3 else "encoder_q."
    encoder = {key.removeprefix(start): shape for key, shape in shapes.items() if key.startswith(start)}
    has_momentum = any(key.startswith(("encoder_k.", "momentum_encoder.")) for key in shapes)
    is_vit = "pos_embed" in encoder
    if is_vit:
        backbone: Any = _vit_config(encoder)
    else:
        backbone = torchvision_config({k: v for k, v in encoder.items() if not k.startswith("fc.")})
        backbone = dataclasses.replace(backbone, zero_init_residual=version == 3)
    head = "head" if is_vit else "fc"
    kernels = {
        int(m[1]): s for k, s in encoder.items() if (m := re.fullmatch(rf"{head}\.(\d+)\.weight", k)) and len(s) == 2
    }
    if version == 1:
        fields: dict[str, Any] = {"dim": encoder["fc.weight"][0], "layers": 1, "temperature": 0.07}
    else:
        fields = {"dim": kernels[max(kernels)][0], "layers": len(kernels), "hidden": kernels[0][0]}
    if version == 3:
        fields |= {"predictor_norm": "predictor.4.running_mean" in shapes, "queue": 0, "momentum": 0.99}
        fields |= {"temperature": 0.2 if is_vit else 1.0}
    elif "queue" in shapes:
        fields["queue"] = shapes["queue"][1]
    return MoCoConfig(backbone, version=version, holds_state=has_momentum, **fields)  # type: ignore[arg-type]


def _vit_config(encoder: Shapes) -> ViTConfig:
    if "patch_embed.proj.0.weight" in encoder:
        raise MmjaxError(
            "vit_conv_small and vit_conv_base, MoCo v3's ViTs with a convolutional stem, are not supported"
        )
    width = encoder["cls_token"][-1]
    if width % 12:
        raise MmjaxError(f"a ViT {width} wide: MoCo v3 has 12 heads, which do not divide it")
    backbone = {key: shape for key, shape in encoder.items() if not key.startswith("head.")}
    config = timm.config(backbone, {"model_args": {"num_heads": 12}})
    return dataclasses.replace(config, positions="moco_v3", init="moco_v3", rule="bilinear")


def _version_of(keys: Set[str]) -> int | None:
    """The version; None for another system. ALBEF's momentum models have other prefixes."""
    if {"encoder_q.conv1.weight", "encoder_q.layer1.0.conv1.weight"} <= keys:
        return 1 if "encoder_q.fc.weight" in keys else 2 if "encoder_q.fc.0.weight" in keys else None
    return 3 if any(key.startswith("base_encoder.") for key in keys) and "predictor.0.weight" in keys else None


LAYOUTS = tuple(
    Layout(
        name=f"v{version}",
        recognise=lambda keys, _, version=version: _version_of(keys) == version,
        config=functools.partial(config_of, version=version),
        table=_export_table,
    )
    for version in (1, 2, 3)
)
"""Layouts v1, v2, v3: what the originals' main_moco.py saves; exports are safetensors with the keys of `state_dict`."""
