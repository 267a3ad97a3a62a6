"""Google's .npz files: vit_jax with the numbering before Linen, and big_vision.

Their kernels are Flax's: attention [d, h, k] and [h, k, d], convolutions HWIO.
"""

from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np

from mmjax.models.vit.checkpoint_timm import square
from mmjax.models.vit.network import ViTConfig
from mmjax.models.vit.root import RootConfig
from mmjax.weights.table import Entry, Layout, Op, Shape, Table, chain, reshape, same, unstack

OLD = {"norm_1": "LayerNorm_0", "attention": "MultiHeadDotProductAttention_1", "norm_2": "LayerNorm_2"}
LINEN = {"norm_1": "LayerNorm_0", "attention": "MultiHeadDotProductAttention_0", "norm_2": "LayerNorm_1"}

flat = Op("flat", lambda x: np.reshape(x, -1), lambda x: x)
"""[1, 1, 1, c] in old files, [c] in later ones <-> [c]."""

Adder = Callable[[str, str, Op], None]


def _table(config: ViTConfig, numbering: Mapping[str, str], mlp: str, positions: str, scan: bool = False) -> Table:
    entries: list[Entry] = []

    def add(source: str, target: str, op: Op = same) -> None:
        entries.append(Entry(source, f"params/{target}", op))

    def add_stack(source: str, target: str, op: Op) -> None:
        targets = tuple(f"params/encoder/block_{i}/{target}" for i in range(config.depth))
        op = chain(unstack(config.depth), op)
        entries.append(Entry(f"Transformer/encoderblock/{source}", targets if config.depth > 1 else targets[0], op))

    c = config
    channels = 3 if c.root is None else _channels(c.root)
    add("embedding/kernel", "patch/projection/kernel", reshape((c.patch, c.patch, channels, c.width)))
    add("embedding/bias", "patch/projection/bias")
    if c.root is not None:
        _add_root(c.root, add)
    if c.class_token:
        add("cls", "cls")
    if c.positions != "big_vision":
        add(positions, "positions")
    if scan:
        _add_block(c, numbering, mlp, add_stack)
    else:
        for i in range(c.depth):
            source, target = f"Transformer/encoderblock_{i}", f"encoder/block_{i}"
            _add_block(c, numbering, mlp, lambda a, b, op, s=source, t=target: add(f"{s}/{a}", f"{t}/{b}", op))
    for name in ("scale", "bias"):
        add(f"Transformer/encoder_norm/{name}", f"norm/{name}")
    if c.pool == "map":
        add("MAPHead_0/probe", "map_head/probe")
        of_head = {"norm": "LayerNorm_0", "attention": "MultiHeadDotProductAttention_0"}
        _add_block(c, of_head, "MlpBlock_0", lambda a, b, op: add(f"MAPHead_0/{a}", f"map_head/{b}", op))
    for name, present in (("pre_logits", c.representation), ("head", c.num_classes)):
        if present:
            add(f"{name}/kernel", f"{name}/kernel")
            add(f"{name}/bias", f"{name}/bias")
    return tuple(entries)


def _add_block(config: ViTConfig, numbering: Mapping[str, str], mlp: str, add: Adder) -> None:
    d, h = config.width, config.heads
    k = d // h
    for target, source in numbering.items():
        if target != "attention":
            add(f"{source}/scale", f"{target}/scale", same)
            add(f"{source}/bias", f"{target}/bias", same)
            continue
        for name in ("query", "key", "value"):
            add(f"{source}/{name}/kernel", f"{target}/{name[0]}/kernel", reshape((d, h, k)))
            add(f"{source}/{name}/bias", f"{target}/{name[0]}/bias", reshape((h, k)))
        add(f"{source}/out/kernel", f"{target}/out/kernel", reshape((h, k, d)))
        add(f"{source}/out/bias", f"{target}/out/bias", same)
    for name, ours in (("Dense_0", "up"), ("Dense_1", "down")):
        add(f"{mlp}/{name}/kernel", f"mlp/{ours}/kernel", same)
        add(f"{mlp}/{name}/bias", f"mlp/{ours}/bias", same)


def _channels(root: RootConfig) -> int:
    """The channels of the root's feature map."""
    return root.width * 4 * 2 ** (len(root.layers) - 1) if root.layers else root.width


def _add_root(root: RootConfig, add: Adder) -> None:
    def step(source: str, target: str, name: str) -> None:
        add(f"{source}conv{name}/kernel", f"{target}conv{name}/kernel", same)
        for leaf in ("scale", "bias"):
            add(f"{source}gn{name}/{leaf}", f"{target}gn{name}/{leaf}", flat)

    step("", "root/", "_root")
    for block, units in enumerate(root.layers, start=1):
        for unit in range(1, units + 1):
            for name in ("1", "2", "3") if unit > 1 else ("1", "2", "3", "_proj"):
                step(f"block{block}/unit{unit}/", f"root/block{block}_unit{unit}/", name)


def _config(shapes: Mapping[str, Shape], config_json: Mapping[str, Any] | None) -> ViTConfig:
    """Everything from the shapes: tanh GELU, LayerNorm epsilon 1e-6 (Flax's default)."""
    scan = any(key.startswith("Transformer/encoderblock/") for key in shapes)
    start = "Transformer/encoderblock" if scan else "Transformer/encoderblock_0"
    query = next(shape for key, shape in shapes.items() if key.startswith(start) and key.endswith("query/kernel"))
    up = next(shape for key, shape in shapes.items() if key.startswith(start) and key.endswith("Dense_0/kernel"))
    blocks = {key.split("/")[1] for key in shapes if key.startswith("Transformer/encoderblock_")}
    table = next((shape for key, shape in shapes.items() if key.endswith("pos_embedding")), None)
    patch, _, _, width = shapes["embedding/kernel"]
    class_token = "cls" in shapes
    root = _root(shapes)
    fields: dict[str, Any] = {"positions": "big_vision", "class_position": False}
    if table is not None:
        # A table of 1 + N rows has one for the class token; N and 1 + N are never both squares.
        has_position = class_token and round((table[1] - 1) ** 0.5) ** 2 == table[1] - 1
        size = square(table[1] - int(has_position), patch * (root.stride if root else 1), "pos_embedding")
        fields = {"image_size": size, "class_position": has_position}
    return ViTConfig(
        width=width,
        depth=query[0] if scan else len(blocks),
        heads=query[-2],
        hidden=up[-1],
        patch=patch,
        num_classes=shapes.get("head/bias", (0,))[0],
        rule="endpoints",
        class_token=class_token,
        pool="map" if "MAPHead_0/probe" in shapes else "token" if class_token else "mean",
        representation=shapes.get("pre_logits/bias", (None,))[0],
        act="gelu_tanh",
        root=root,
        **fields,
    )


def _root(shapes: Mapping[str, Shape]) -> RootConfig | None:
    if "conv_root/kernel" not in shapes:
        return None
    units = {tuple(key.split("/")[:2]) for key in shapes if key.startswith("block") and "/unit" in key}
    blocks = sorted({block for block, _ in units})
    layers = tuple(sum(block == name for block, _ in units) for name in blocks)
    return RootConfig(layers, shapes["conv_root/kernel"][-1])


def _blocks(keys: Set[str], start: str, mlp: str) -> bool:
    return "embedding/kernel" in keys and f"Transformer/{start}/{mlp}/Dense_0/kernel" in keys


WRAPPERS = ("opt/target/img", "opt/target", "params/img", "params", "img")
POSITIONS = "Transformer/posembed_input/pos_embedding"

NPZ = Layout(
    name="npz",
    recognise=lambda keys, _: _blocks(keys, "encoderblock_0", "MlpBlock_3"),
    config=_config,
    table=lambda config: _table(config, OLD, "MlpBlock_3", POSITIONS),
    file="model.npz",
    wrappers=WRAPPERS,
)
"""storage.googleapis.com/vit_models: imagenet21k, imagenet21k+imagenet2012, augreg, sam; hybrids too."""

NPZ_LINEN = Layout(
    name="npz_linen",
    recognise=lambda keys, _: _blocks(keys, "encoderblock_0", "MlpBlock_0"),
    config=_config,
    table=lambda config: _table(config, LINEN, "MlpBlock_0", "pos_embedding"),
    file="model.npz",
    wrappers=WRAPPERS,
    renames=((r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding"),),
)
"""big_vision, and vit_jax's own training runs."""

NPZ_SCAN = Layout(
    name="npz_scan",
    recognise=lambda keys, _: _blocks(keys, "encoderblock", "MlpBlock_0"),
    config=_config,
    table=lambda config: _table(config, LINEN, "MlpBlock_0", "pos_embedding", scan=True),
    file="model.npz",
    wrappers=WRAPPERS,
)
"""big_vision with `scan=True`: all blocks in one array each."""
