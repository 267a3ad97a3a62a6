"""Vaults vit_npz* (Google's ViT under the names of its public .npz files) and pos_embed (interpolation rules)."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.vit.checkpoint_npz import NPZ
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.models.vit.root import RootConfig
from mmjax.models.vit.tasks import ViTModel
from mmjax.nn.positions import interpolate
from mmjax.weights.table import load_table, save_table

RULES = {"albef": "bicubic", "timm": "bilinear", "open_clip": "bicubic_antialias"}


def check(meta, tensors):
    return positions(meta, tensors) if "pos_embed" in meta["inputs"] else network(meta, tensors)


def positions(meta, tensors):
    table, grid = jnp.asarray(tensors["inputs/pos_embed"]), meta["config"]["grid"]
    outputs = {}
    for output in meta["outputs"]:
        source, rows, columns = re.fullmatch(r"(\w+)_(\d+)x(\d+)", output).groups()
        prefix = table.shape[1] - grid * grid
        outputs[output] = interpolate(table, (grid, grid), (int(rows), int(columns)), RULES[source], prefix)
    return outputs


def vit_config(recorded):
    transformer, root = recorded["transformer"], recorded.get("resnet")
    pool = {"token": "token", "gap": "mean"}[recorded["classifier"]]
    size, (patch, _) = recorded["image_size"], recorded["patches"]["size"]
    return ViTConfig(
        width=recorded["hidden_size"],
        depth=transformer["num_layers"],
        heads=transformer["num_heads"],
        hidden=transformer["mlp_dim"],
        patch=patch,
        image_size=(size, size),
        num_classes=recorded["num_classes"],
        rule="endpoints",
        class_token=pool == "token",
        class_position=pool == "token",
        pool=pool,
        representation=recorded["representation_size"],
        act="gelu_tanh",
        epsilon=recorded["layer_norm_eps"],
        root=RootConfig(tuple(root["num_layers"]), int(64 * root["width_factor"])) if root else None,
    )


def network(meta, tensors):
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    config = vit_config(meta["config"])
    assert NPZ.recognise(weights.keys(), None)
    assert NPZ.config({key: value.shape for key, value in weights.items()}, None) == config
    table, module = NPZ.table(config), ViT(config)
    variables = load_table(table, weights, ViTModel.shapes(config), meta["name"])
    image = jnp.asarray(tensors["inputs/image"])

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        logits = module.apply(variables, image).logits
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))

    out = jax.jit(module.apply)(variables, image)
    value, gradients = loss(variables)
    outputs = {"logits": out.logits, "encoded": out.tokens, "loss": value}
    outputs |= {f"grad/{key}": array for key, array in save_table(table, jax.tree.map(np.asarray, gradients)).items()}
    for output in meta["outputs"]:
        if size := re.fullmatch(r"posembed_(\d+)x(\d+)", output):
            new = (int(size[1]), int(size[2]))
            outputs[output] = interpolate(
                variables["params"]["positions"], config.grid, new, config.rule, config.placed
            )
    return outputs
