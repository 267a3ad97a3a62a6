"""The ALBEF vaults: pre-training and fine-tunings through the library's methods; negatives by argmax as recorded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.albef.checkpoint import LAYOUTS
from mmjax.models.albef.finetune import AlbefAnswering, AlbefClassification, AlbefRetrieval
from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.pretrain import AlbefPretraining
from mmjax.models.albef.tasks import AlbefModel
from mmjax.models.bert.network import BertConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.training.ema import update_ema
from mmjax.training.queue import Queue, write
from mmjax.training.state import Carry
from mmjax.weights.table import load_table, save_table

RNG, STEP = jax.random.key(0), jnp.zeros((), jnp.int32)


def text_of(told: dict[str, Any], **fields: Any) -> BertConfig:
    bert = told["bert_config"]
    sizes = {
        "vocab_size": bert["vocab_size"],
        "width": bert["hidden_size"],
        "depth": bert["num_hidden_layers"],
        "heads": bert["num_attention_heads"],
        "hidden": bert["intermediate_size"],
        "positions": bert["max_position_embeddings"],
        "types": bert["type_vocab_size"],
        "act": bert["hidden_act"],
        "epsilon": bert["layer_norm_eps"],
        "dropout": bert["hidden_dropout_prob"],
        "attention_dropout": bert["attention_probs_dropout_prob"],
        "cross_from": bert["fusion_layer"],
        "pooler": False,
    }
    return BertConfig(**(sizes | fields))


def config_of(name: str, told: dict[str, Any]) -> AlbefConfig:
    vision = ViTConfig(
        width=told["vision_width"],
        depth=told["vision_depth"],
        heads=told["vision_heads"],
        hidden=int(told["vision_width"] * told["vit"]["mlp_ratio"]),
        patch=told["patch_size"],
        image_size=(told["image_res"], told["image_res"]),
        epsilon=told["vit"]["layer_norm_eps"],
        rule="bicubic",
        init="normal",
    )
    kind = name.removeprefix("albef_")
    compared = kind in ("pretrain", "retrieval")
    decoder = None
    if "decoder" in told:
        depth, first = told["decoder"]["num_hidden_layers"], told["decoder"]["fusion_layer"]
        decoder = text_of(told, depth=depth, cross_from=first, causal=True, mlm=True)
    depth = {"depth": told["nlvr"]["num_hidden_layers"]} if "nlvr" in told else {}
    return AlbefConfig(
        vision,
        text_of(told, mlm=kind == "pretrain", **depth),
        embed_dim=told["embed_dim"] if compared else 0,
        matching=compared,
        classes=told.get("classes", 2) if kind in ("ve", "nlvr") else 0,
        pairs=kind == "nlvr",
        decoder=decoder,
        temperature=told["temp"],
        queue=told["queue_size"] if compared else 0,
        by_image=kind == "retrieval",
        momentum=told["momentum"],
        alpha=told["alpha"] if told.get("distill", True) else 0.0,
        holds_state=True,
    )


def check(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    inputs = {key.removeprefix("inputs/"): value for key, value in tensors.items() if key.startswith("inputs/")}
    config, layout = config_of(meta["name"], meta["config"]), LAYOUTS[0]
    names = layout.unwrap(weights)
    assert layout.recognise(names.keys(), None)
    table = layout.table(config)
    variables = load_table(
        table, {name: weights[key] for name, key in names.items()}, AlbefModel.shapes(config), meta["name"]
    )
    for key, array in save_table(table, variables).items():
        np.testing.assert_array_equal(array, weights[names[key]], err_msg=key)
    params, held = (jax.tree.map(jnp.asarray, variables[name]) for name in ("params", "stats"))
    queues = {}
    if config.queue:
        cursor = held["queue"]["cursor"]
        queues = {name: Queue(keys, cursor) for name, keys in held["queue"].items() if name != "cursor"}
    ema = update_ema(held["momentum"], params, config.momentum)
    hparams = {"momentum": jnp.float32(config.momentum), "alpha": jnp.float32(config.alpha)}
    carry = Carry(ema, queues, hparams=hparams)
    batch = {"image": np.moveaxis(inputs["image"], 1, -1)}
    run = {"pretrain": pretraining, "retrieval": retrieval, "vqa": answering}.get(
        meta["name"].removeprefix("albef_"), classification
    )
    found, grads = run(config, params, carry, batch, inputs, meta)
    after = {"params": grads, "stats": {"momentum": ema} | ({"queue": held["queue"]} if queues else {})}
    for key, array in save_table(table, jax.tree.map(np.asarray, after)).items():
        found[f"{'momentum_after' if '_m.' in key else 'grad'}/{key}"] = array
    return found


def hardest(method, params, batch, told):
    return tuple(
        jnp.argmax(weights, 1) for weights in jax.jit(method.hardness, static_argnums=3)(params, batch, told, None)
    )


def aligned(method, params, carry, batch, told, negatives):
    """What pre-training and retrieval both have."""
    contrast = method.contrast(params, carry, batch, told, method.alpha(carry, STEP), None)
    matching, _, logits = method.match(params, batch, told, negatives, RNG, None)
    return contrast, matching.value, logits


def contrast_outputs(method, params, carry, batch, told, negatives) -> dict[str, Any]:
    keys = {"i2t": (told.image_embeds, told.text_keys, "text"), "t2i": (told.text_embeds, told.image_keys, "image")}
    found: dict[str, Any] = {
        f"sim_{name}": query @ jnp.concatenate([own, carry.queues[queue].keys]).T / params["temperature"]
        for name, (query, own, queue) in keys.items()
    }
    found |= {"neg_image_idx": negatives[0], "neg_text_idx": negatives[1]}
    after = {name: write(queue) for name, queue in method.enqueued(carry, batch, told, None).items()}
    found |= {f"{name}_queue_after": after[name].keys.T for name in ("image", "text")}
    found["queue_ptr_after"] = after["image"].cursor[None]
    return found | ({"idx_queue_after": after["ids"].keys.T} if "ids" in after else {})


def texts(batch, inputs):
    return batch | {
        "input_ids": inputs["input_ids"].astype(np.int32),
        "attention_mask": inputs["attention_mask"].astype(np.int32),
    }


def pretraining(config, params, carry, batch, inputs, meta):
    method = AlbefPretraining(config)
    batch = texts(batch, inputs)
    told = jax.jit(method.encode, static_argnums=4)(params, carry, batch, RNG, None)
    negatives = hardest(method, params, batch, told)
    masked = inputs["mlm_input_ids"].astype(np.int32), inputs["mlm_labels"].astype(np.int32)

    def loss(params):
        told = method.encode(params, carry, batch, RNG, None)
        contrast, matching, logits = aligned(method, params, carry, batch, told, negatives)
        alpha = method.alpha(carry, STEP)
        words, _, (own, theirs) = method.name_words(params, carry, batch, told, masked, alpha, RNG, None)
        found = {"loss_ita": contrast, "loss_itm": matching, "loss_mlm": words.value, "itm_logits": logits}
        return contrast + matching + words.value, found | {"mlm_logits": own, "mlm_logits_m": theirs}

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    teacher = method.teacher(params, carry)
    found |= contrast_outputs(method, params, carry, batch, told, negatives)
    found |= {"image_embeds": told.image, "image_embeds_m": told.teacher_image, "text_embeds": told.text}
    found |= {"image_feat": told.image_embeds, "text_feat": told.text_embeds}
    found |= {"image_feat_m": told.image_keys, "text_feat_m": told.text_keys}
    found["text_embeds_m"] = method.run(
        teacher, "read", batch["input_ids"], batch["attention_mask"], axis_name=None, rng=RNG
    )
    found["fusion_pos"] = method.head(params, "fuse", told.text, batch["attention_mask"], told.image)
    return found, grads


def retrieval(config, params, carry, batch, inputs, meta):
    method = AlbefRetrieval(config)
    batch = texts(batch, inputs) | {"image_id": inputs["idx"].astype(np.int32)}
    told = jax.jit(method.encode, static_argnums=4)(params, carry, batch, RNG, None)
    negatives = hardest(method, params, batch, told)

    def loss(params):
        told = method.encode(params, carry, batch, RNG, None)
        contrast, matching, logits = aligned(method, params, carry, batch, told, negatives)
        return contrast + matching, {"loss_ita": contrast, "loss_itm": matching, "itm_logits": logits}

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return found | contrast_outputs(method, params, carry, batch, told, negatives), grads


def classification(config, params, carry, batch, inputs, meta):
    method = AlbefClassification(config)
    images = jnp.split(jnp.asarray(batch["image"]), 2) if config.pairs else [jnp.asarray(batch["image"])]
    names = ("image_0", "image_1") if config.pairs else ("image",)
    batch = texts(dict(zip(names, images)), inputs)
    batch["label"] = inputs["targets"].astype(np.int32)
    value, grads = jax.jit(jax.value_and_grad(lambda p: method.loss(p, carry, batch, RNG, STEP)[0]))(params)
    teacher = method.teacher(params, carry)
    tokens = [method.head(params, "image", image) for image in images]
    states = method.head(params, "read", batch["input_ids"], batch["attention_mask"])
    found = {"image_embeds": jnp.concatenate(tokens), "loss": value}
    found["last_hidden_state"] = method.head(params, "fuse", states, batch["attention_mask"], *tokens)
    found |= {"prediction": method.logits(params, batch, RNG), "prediction_m": method.logits(teacher, batch, RNG)}
    return found, grads


def answering(config, params, carry, batch, inputs, meta):
    """Answers of a question stand in one row here, in a run of rows there."""
    method, counts = AlbefAnswering(config), inputs["k"]
    question, place = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(k) for k in counts])
    shape = (len(counts), int(max(counts)))

    def rows(values, fill=0):
        out = np.full((*shape, *values.shape[1:]), fill, values.dtype)
        out[question, place] = values
        return jnp.asarray(out)

    batch |= {"input_ids": inputs["question_ids"].astype(np.int32)}
    batch |= {"attention_mask": inputs["question_mask"].astype(np.int32)}
    batch |= {f"answer_{name}": rows(inputs[f"answer_{name}"].astype(np.int32)) for name in ("ids", "mask")}
    batch["answer_weights"] = rows(inputs["weights"])

    def loss(params):
        value, _ = method.loss(params, carry, batch, RNG, STEP)
        return value, method.losses(params, carry, batch, RNG, STEP)

    (value, (losses, (own, theirs))), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    found = {"loss": value, "answer_loss": losses[question, place], "answer_logits": own[question, place]}
    found["answer_logits_m"] = theirs[question, place][:, :-1]
    model = AlbefModel(config, params)
    candidates = inputs["cand_ids"].astype(np.int32), inputs["cand_mask"].astype(np.int32)
    told = model.rank(
        batch["image"], batch["input_ids"], batch["attention_mask"], *candidates, k=meta["config"]["k_test"]
    )
    found |= {"topk_ids": told.places, "topk_probs": told.probabilities, "start_logits": told.start_logits}
    found["rank_loss"] = told.losses.reshape(-1)
    found["image_embeds"] = method.head(params, "image", batch["image"])
    found["question_states"] = told.states
    return found, grads
