"""The MoCo vaults: one whole training step, through the library's own train step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax.models.moco.checkpoint import LAYOUTS
from mmjax.models.moco.network import MoCoConfig
from mmjax.models.moco.pretrain import MoCoMethod
from mmjax.models.moco.tasks import MoCoModel
from mmjax.models.resnet.network import ResNetConfig
from mmjax.objectives.contrastive import info_nce_logits
from mmjax.training.ema import update_ema
from mmjax.training.optimizer import Optimizer
from mmjax.training.queue import Queue
from mmjax.training.state import create_state
from mmjax.training.step import train_step
from mmjax.weights.table import load_table, save_table


def config_of(recorded: dict[str, Any]) -> MoCoConfig:
    backbone = ResNetConfig(
        layers=tuple(recorded["layers"]),
        block=recorded["block"],
        stem_width=recorded["stem_width"],
        stage_widths=tuple(recorded["stage_widths"]),
        num_classes=0,
        bn_epsilon=recorded["bn_eps"],
        bn_momentum=1 - recorded["bn_momentum"],
    )
    fields = {"dim": recorded["dim"], "queue": recorded["K"], "momentum": recorded["m"], "temperature": recorded["T"]}
    make = MoCoConfig.v2 if recorded["mlp"] else MoCoConfig.v1
    return make(backbone, holds_state=True, **fields)


def check(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    config = config_of(meta["config"])
    layout = next(layout for layout in LAYOUTS if layout.recognise(weights.keys(), None))
    assert layout.name == f"v{config.version}"
    variables = load_table(layout.table(config), weights, MoCoModel.shapes(config), meta["name"])
    for key, array in save_table(layout.table(config), variables).items():
        np.testing.assert_array_equal(array, weights[key], err_msg=key)

    batch = {
        f"view_{i}": jnp.asarray(tensors[f"inputs/{n}"].transpose(0, 2, 3, 1)) for i, n in ((1, "im_q"), (2, "im_k"))
    }
    method = MoCoMethod(config)
    # SGD at rate 1 without momentum: the parameters' change is the gradient, negated.
    optimizer = Optimizer(optax.sgd(1.0))
    state = create_state(method, optimizer, jax.random.key(0), batch)
    stats = jax.tree.map(jnp.asarray, variables["stats"])
    before = Queue(stats["queue"]["keys"], stats["queue"]["cursor"])
    state = state.replace(
        params=jax.tree.map(jnp.asarray, variables["params"]),
        ema=stats["momentum"],
        queues={"keys": before},
        stats={"query": stats["query"], "key": stats["key"]},
    )
    # Arrays are arguments of the programs: XLA folds what is constant, for minutes.
    new, metrics = jax.jit(lambda state, batch: train_step(method, optimizer, state, batch))(state, batch)

    ema = update_ema(state.ema, state.params, config.momentum)
    network, _ = jax.jit(lambda v, image: method.network().apply(v, image, True, mutable=["batch_stats"]))(
        {"params": state.params, "batch_stats": stats["query"]}, batch["view_1"]
    )
    encode = jax.jit(method.encode, static_argnums=(3, 4))
    q, _ = encode(state.params, stats["query"], batch["view_1"], None, True)
    k, _ = encode(ema, stats["key"], batch["view_2"], None, False)
    gradient = jax.jit(jax.grad(lambda *arrays: method.loss(*arrays, 0)[0]))
    grads = gradient(state.params, state.carry.replace(ema=ema), batch, state.rng)
    grads = save_table(layout.table(config), {"params": grads, "stats": variables["stats"]})
    stats_after = {"query": new.stats["query"], "key": new.stats["key"], "momentum": new.ema}
    stats_after["queue"] = {"keys": new.queues["keys"].keys, "cursor": new.queues["keys"].cursor}
    host = jax.tree.map(np.asarray, {"params": state.params, "stats": stats_after})
    after = save_table(layout.table(config), host)
    labels = np.zeros(len(q), np.int64)
    logits = info_nce_logits(q, k, before.keys, config.temperature)
    outputs = {"encoder_q_raw": network["embedding"], "q": q, "k": k, "logits": logits, "labels": labels}
    outputs |= {"loss": metrics["loss"], "queue_after": after["queue"], "queue_ptr_after": after["queue_ptr"]}
    outputs |= {
        key.replace("encoder_q.", "encoder_q_after/").replace("encoder_k.", "encoder_k_after/"): value
        for key, value in after.items()
        if key.startswith("encoder")
    }
    return outputs | {f"grad/{key}": value for key, value in grads.items()}
