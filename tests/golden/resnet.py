"""The ResNet vaults: torchvision's network with narrow layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.resnet.checkpoint import LAYOUTS
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.resnet.tasks import ResNetModel
from mmjax.weights.table import load_table, save_table

TORCHVISION = next(layout for layout in LAYOUTS if layout.name == "torchvision")


def config_of(recorded: dict[str, Any]) -> ResNetConfig:
    block = {"basicblock": "basic"}.get(recorded["block"].lower(), recorded["block"].lower())
    known = {"groups", "width_per_group", "zero_init_residual"} & recorded.keys()
    return ResNetConfig(
        layers=tuple(recorded["layers"]),
        block=block,  # type: ignore[arg-type]
        stem_width=recorded["stem_width"],
        stage_widths=tuple(recorded["stage_widths"]),
        num_classes=recorded["num_classes"],
        bn_epsilon=recorded["bn_eps"],
        bn_momentum=1 - recorded["bn_momentum"],
        **{name: recorded[name] for name in known},
    )


def check(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    config = config_of(meta["config"])
    names = TORCHVISION.unwrap(weights, meta["name"])
    assert TORCHVISION.recognise(names.keys(), None)
    shapes = {name: weights[key].shape for name, key in names.items()}
    assert dataclasses.replace(TORCHVISION.config(shapes, None), bn_momentum=config.bn_momentum) == config
    variables = load_table(TORCHVISION.table(config), weights, ResNetModel.shapes(config), meta["name"])
    x = jnp.asarray(tensors["inputs/image"].transpose(0, 2, 3, 1))
    module = ResNetModel.build(config)

    def run(params: Any, stats: Any, train: bool) -> Any:
        return module.apply({"params": params, "batch_stats": stats}, x, train=train, mutable=["batch_stats"])

    compiled = jax.jit(run, static_argnums=2)
    outputs: dict[str, Any] = {}
    for mode in ("eval", "train"):
        outputs_of_mode, new = compiled(variables["params"], variables["stats"], mode == "train")
        for name, value in outputs_of_mode.items():
            outputs[f"{mode}/{name}"] = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        after = save_table(TORCHVISION.table(config), {"params": variables["params"], "stats": new["batch_stats"]})
        outputs |= {f"{mode}/after/{key}": value for key, value in after.items()}
    return outputs
