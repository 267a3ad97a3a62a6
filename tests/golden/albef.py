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


def text_of(recorded: dict[str, Any], **fields: Any) -> BertConfig:
    bert = recorded["bert_config"]
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
        "init": "normal",
        "pooler": False,
    }
    return BertConfig(**(sizes | fields))


def config_of(name: str, recorded: dict[str, Any]) -> AlbefConfig:
    vision = ViTConfig(
        width=recorded["vision_width"],
        depth=recorded["vision_depth"],
        heads=recorded["vision_heads"],
        hidden=int(recorded["vision_width"] * recorded["vit"]["mlp_ratio"]),
        patch=recorded["patch_size"],
        image_size=(recorded["image_res"], recorded["image_res"]),
        epsilon=recorded["vit"]["layer_norm_eps"],
        rule="bicubic",
        init="timm",
    )
    kind = name.removeprefix("albef_")
    compared = kind in ("pretrain", "retrieval")
    decoder = None
    if "decoder" in recorded:
        depth, first = recorded["decoder"]["num_hidden_layers"], recorded["decoder"]["fusion_layer"]
        decoder = text_of(recorded, depth=depth, cross_from=first, causal=True, mlm=True)
    depth = {"depth": recorded["nlvr"]["num_hidden_layers"]} if "nlvr" in recorded else {}
    return AlbefConfig(
        vision,
        text_of(recorded, mlm=kind == "pretrain", **depth),
        embed_dim=recorded["embed_dim"] if compared else 0,
        matching=compared,
        classes=recorded.get("classes", 2) if kind in ("ve", "nlvr") else 0,
        two_images=kind == "nlvr",
        decoder=decoder,
        temperature=recorded["temp"],
        queue=recorded["queue_size"] if compared else 0,
        by_image=kind == "retrieval",
        momentum=recorded["vqa_momentum" if kind == "vqa" else "momentum"],
        alpha=recorded["alpha"] if recorded.get("distill", True) else 0.0,
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
    params, stats = (jax.tree.map(jnp.asarray, variables[name]) for name in ("params", "stats"))
    queues = {}
    if config.queue:
        cursor = stats["queue"]["cursor"]
        queues = {name: Queue(keys, cursor) for name, keys in stats["queue"].items() if name != "cursor"}
    ema = update_ema(stats["momentum"], params, config.momentum)
    hparams = {"momentum": jnp.float32(config.momentum), "alpha": jnp.float32(config.alpha)}
    carry = Carry(ema, queues, hparams=hparams)
    batch = {"image": np.moveaxis(inputs["image"], 1, -1)}
    run = {"pretrain": pretraining, "retrieval": retrieval, "vqa": answering}.get(
        meta["name"].removeprefix("albef_"), classification
    )
    outputs, grads = run(config, params, carry, batch, inputs, meta)
    after = {"params": grads, "stats": {"momentum": ema} | ({"queue": stats["queue"]} if queues else {})}
    for key, array in save_table(table, jax.tree.map(np.asarray, after)).items():
        outputs[f"{'momentum_after' if '_m.' in key else 'grad'}/{key}"] = array
    return outputs


def compiled(function, *arrays):
    """Arrays are arguments of the program: XLA folds what is constant, for minutes.

    Without fusion, which on CPU copies the residual stream into the kernels of every layer: 82 s and 4 GB for a step of
    NLVR2's 18 layers, 11 s and 0.5 GB without. That needs the emitters, which conftest.py leaves out.
    """
    options = {"xla_disable_hlo_passes": "fusion", "xla_cpu_use_fusion_emitters": True}
    return jax.jit(function, compiler_options=options)(*arrays)


def gradient(loss, *arrays):
    """((value, aux), gradient with respect to the first array)."""
    return compiled(jax.value_and_grad(loss, has_aux=True), *arrays)


def hardest(method, params, batch, encoded):
    weights = compiled(lambda *arrays: method.negative_weights(*arrays, None), params, batch, encoded)
    return tuple(jnp.argmax(w, 1) for w in weights)


def aligned(method, params, carry, batch, encoded, negatives):
    """What pre-training and retrieval both have."""
    contrast = method.itc_loss(params, carry, batch, encoded, method.alpha(carry, STEP), None)
    matching, _, logits = method.itm_loss(params, batch, encoded, negatives, RNG, None)
    return contrast, matching.value, logits


def contrast_outputs(method, params, carry, batch, encoded, negatives) -> dict[str, Any]:
    keys = {
        "i2t": (encoded.image_embeds, encoded.text_keys, "text"),
        "t2i": (encoded.text_embeds, encoded.image_keys, "image"),
    }
    outputs: dict[str, Any] = {
        f"sim_{name}": query @ jnp.concatenate([local, carry.queues[queue].keys]).T / params["temperature"]
        for name, (query, local, queue) in keys.items()
    }
    outputs |= {"neg_image_idx": negatives[0], "neg_text_idx": negatives[1]}
    after = {name: write(queue) for name, queue in method.next_queues(carry, batch, encoded, None).items()}
    outputs |= {f"{name}_queue_after": after[name].keys.T for name in ("image", "text")}
    outputs["queue_ptr_after"] = after["image"].cursor[None]
    return outputs | ({"idx_queue_after": after["ids"].keys.T} if "ids" in after else {})


def texts(batch, inputs):
    return batch | {
        "input_ids": inputs["input_ids"].astype(np.int32),
        "attention_mask": inputs["attention_mask"].astype(np.int32),
    }


def pretraining(config, params, carry, batch, inputs, meta):
    method = AlbefPretraining(config)
    batch = texts(batch, inputs)
    encoded = compiled(lambda *arrays: method.encode(*arrays, RNG, None), params, carry, batch)
    negatives = hardest(method, params, batch, encoded)
    masked = inputs["mlm_input_ids"].astype(np.int32), inputs["mlm_labels"].astype(np.int32)

    def loss(params, carry, batch, negatives, masked):
        encoded = method.encode(params, carry, batch, RNG, None)
        contrast, matching, logits = aligned(method, params, carry, batch, encoded, negatives)
        alpha = method.alpha(carry, STEP)
        words, _, (student, teacher) = method.mlm_loss(params, carry, batch, encoded, masked, alpha, RNG, None)
        outputs = {"loss_ita": contrast, "loss_itm": matching, "loss_mlm": words.value, "itm_logits": logits}
        return contrast + matching + words.value, outputs | {"mlm_logits": student, "mlm_logits_m": teacher}

    (_, outputs), grads = gradient(loss, params, carry, batch, negatives, masked)
    outputs |= contrast_outputs(method, params, carry, batch, encoded, negatives)
    outputs |= {"image_embeds": encoded.image, "image_embeds_m": encoded.teacher_image, "text_embeds": encoded.text}
    outputs |= {"image_feat": encoded.image_embeds, "text_feat": encoded.text_embeds}
    outputs |= {"image_feat_m": encoded.image_keys, "text_feat_m": encoded.text_keys}

    def states(params, carry, batch, encoded):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        teacher = method.run(method.teacher(params, carry), "encode_text", ids, mask, axis_name=None, rng=RNG)
        return {
            "text_embeds_m": teacher,
            "fusion_pos": method.head(params, "encode_multimodal", encoded.text, mask, encoded.image),
        }

    return outputs | compiled(states, params, carry, batch, encoded), grads


def retrieval(config, params, carry, batch, inputs, meta):
    method = AlbefRetrieval(config)
    batch = texts(batch, inputs) | {"image_id": inputs["idx"].astype(np.int32)}
    encoded = compiled(lambda *arrays: method.encode(*arrays, RNG, None), params, carry, batch)
    negatives = hardest(method, params, batch, encoded)

    def loss(params, carry, batch, negatives):
        encoded = method.encode(params, carry, batch, RNG, None)
        contrast, matching, logits = aligned(method, params, carry, batch, encoded, negatives)
        return contrast + matching, {"loss_ita": contrast, "loss_itm": matching, "itm_logits": logits}

    (_, outputs), grads = gradient(loss, params, carry, batch, negatives)
    return outputs | contrast_outputs(method, params, carry, batch, encoded, negatives), grads


def classification(config, params, carry, batch, inputs, meta):
    method = AlbefClassification(config)
    images = jnp.split(jnp.asarray(batch["image"]), 2) if config.two_images else [jnp.asarray(batch["image"])]
    names = ("image_0", "image_1") if config.two_images else ("image",)
    batch = texts(dict(zip(names, images)), inputs)
    batch["label"] = inputs["targets"].astype(np.int32)

    def loss(params, carry, batch):
        return method.loss(params, carry, batch, RNG, STEP)[0], None

    def outputs(params, carry, batch, images):
        tokens = [method.head(params, "encode_image", image) for image in images]
        states = method.head(params, "encode_text", batch["input_ids"], batch["attention_mask"])
        outputs = {"image_embeds": jnp.concatenate(tokens), "prediction": method.logits(params, batch, RNG)}
        outputs["last_hidden_state"] = method.head(
            params, "encode_multimodal", states, batch["attention_mask"], *tokens
        )
        return outputs | {"prediction_m": method.logits(method.teacher(params, carry), batch, RNG)}

    (value, _), grads = gradient(loss, params, carry, batch)
    return {"loss": value} | compiled(outputs, params, carry, batch, images), grads


def answer_batch(inputs, counts) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """The columns of questions and answers, and the (question, slot) of each answer of the original.

    Answers of a question have an axis of their own here, and are consecutive rows in the original.
    """
    question, slot = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(k) for k in counts])

    def slots(values):
        out = np.zeros((len(counts), int(max(counts)), *values.shape[1:]), values.dtype)
        out[question, slot] = values
        return jnp.asarray(out)

    batch = {"input_ids": inputs["question_ids"], "attention_mask": inputs["question_mask"]}
    batch |= {f"answer_{name}": slots(inputs[f"answer_{name}"]) for name in ("ids", "mask")}
    batch = {name: leaf.astype(np.int32) for name, leaf in batch.items()}
    return batch | {"answer_weights": slots(inputs["weights"])}, (question, slot)


def answering(config, params, carry, batch, inputs, meta):
    method = AlbefAnswering(config)
    answers, rows = answer_batch(inputs, inputs["k"])
    batch |= answers

    def loss(params, carry, batch):
        value, _ = method.loss(params, carry, batch, RNG, STEP)
        return value, method.losses(params, carry, batch, RNG, STEP)

    (value, (losses, (student, teacher))), grads = gradient(loss, params, carry, batch)
    outputs = {"loss": value, "answer_loss": losses[rows], "answer_logits": student[rows]}
    outputs["answer_logits_m"] = teacher[rows][:, :-1]
    model = AlbefModel(config, params)
    candidates = inputs["cand_ids"].astype(np.int32), inputs["cand_mask"].astype(np.int32)
    ranked = model.rank(
        batch["image"], batch["input_ids"], batch["attention_mask"], *candidates, k=meta["config"]["k_test"]
    )
    outputs |= {"topk_ids": ranked.indices, "topk_probs": ranked.probabilities, "start_logits": ranked.start_logits}
    outputs["rank_loss"] = ranked.losses.reshape(-1)
    outputs["image_embeds"] = compiled(
        lambda *arrays: method.head(arrays[0], "encode_image", arrays[1]), params, batch["image"]
    )
    outputs["question_states"] = ranked.states
    return outputs, grads
