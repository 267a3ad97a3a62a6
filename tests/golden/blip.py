"""The BLIP vaults: one step of pre-training and of retrieval, captioning, VQA, ITM and NLVR2."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden import albef
from golden.albef import RNG, STEP, compiled, gradient

from mmjax.generation.engine import generate
from mmjax.generation.options import BeamRules, GenerationOptions
from mmjax.models.bert.decode import BertDecodable
from mmjax.models.blip.checkpoint import BLIP
from mmjax.models.blip.finetune import BlipAnswering, BlipCaptioning, BlipClassification, BlipRetrieval
from mmjax.models.blip.network import BlipConfig, with_first
from mmjax.models.blip.pretrain import BlipPretraining
from mmjax.objectives.language import next_tokens, text_cross_entropy
from mmjax.training.ema import update_ema
from mmjax.training.queue import Queue
from mmjax.training.state import Carry
from mmjax.weights.table import load_table, save_table


def config_of(recorded: dict[str, Any], shapes: dict[str, Any]) -> BlipConfig:
    """As the library infers it from the keys; no file has the heads and the id of [SEP]."""
    heads = {"vision_heads": recorded["vision_heads"], "text_heads": recorded["num_attention_heads"]}
    config, ids = BLIP.config(shapes, heads), recorded["special_tokens"]
    assert (config.bos, config.enc) == (ids["bos"], ids["enc"])
    return without_dropout(dataclasses.replace(config, sep=ids["sep"], pad=ids["pad"]))


def without_dropout(config: BlipConfig) -> BlipConfig:
    """The same network; the methods run it in training mode."""
    off = {"dropout": 0.0, "attention_dropout": 0.0}
    text, decoder = (part and dataclasses.replace(part, **off) for part in (config.text, config.decoder))
    return dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, drop_path=0.0), text=text, decoder=decoder
    )


def check(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    inputs = {key.removeprefix("inputs/"): value for key, value in tensors.items() if key.startswith("inputs/")}
    inputs = {key: value.astype(np.int32) if value.dtype == np.int64 else value for key, value in inputs.items()}
    inputs["image"] = np.moveaxis(inputs["image"], 1, -1)
    names = BLIP.unwrap(weights)
    assert BLIP.recognise(names.keys(), None)
    config = config_of(meta["config"], {name: weights[key].shape for name, key in names.items()})
    table = BLIP.table(config)
    arrays = {name: weights[key] for name, key in names.items()}
    variables = load_table(table, arrays, shapes(config), meta["name"])
    saved = save_table(table, variables)
    assert saved.keys() == names.keys()
    for key, array in saved.items():
        np.testing.assert_array_equal(array, weights[names[key]], err_msg=key)
    params, stats = (jax.tree.map(jnp.asarray, variables.get(name, {})) for name in ("params", "stats"))
    outputs, grads = RUNS[meta["name"].removeprefix("blip_")](Network(config), params, stats, inputs, meta)
    if grads is not None:
        stats = {name: leaf for name, leaf in stats.items() if name != "momentum"}
        after = {
            "params": grads,
            "stats": stats | ({"momentum": outputs.pop("momentum")} if config.holds_state else {}),
        }
        for key, array in save_table(table, jax.tree.map(np.asarray, after)).items():
            outputs[f"{'momentum_after' if '_m.' in key else 'grad'}/{key}"] = array
    return outputs


def shapes(config: BlipConfig) -> dict[str, Any]:
    pixels = jax.ShapeDtypeStruct((1, *config.vision.image_size, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    other = {"other_images": pixels} if config.two_images else {}
    init = config.network().init
    params = jax.eval_shape(lambda *args, **kwargs: init(*args, **kwargs), jax.random.key(0), pixels, ids, **other)
    params = config.stored_params(params["params"])
    if not config.holds_state:
        return {"params": params}
    keys = jax.ShapeDtypeStruct((config.queue, config.embed_dim), jnp.float32)
    queue = {"image": keys, "text": keys, "cursor": jax.ShapeDtypeStruct((), jnp.int32)}
    queue |= {"ids": jax.ShapeDtypeStruct((config.queue, 1), jnp.int32)} if config.by_image else {}
    return {"params": params, "stats": {"momentum": {k: params[k] for k in config.momentum_parts}, "queue": queue}}


class Network:
    def __init__(self, config: BlipConfig):
        self.config = config

    def __call__(self, params: Any, name: str, *inputs: Any) -> Any:
        return self.config.network().apply({"params": self.config.module_params(params)}, *inputs, method=name)


# ------------------------------------------------------------------------------------------- pre-training and retrieval


def aligned(network, params, stats, inputs, meta):
    """One step of `BlipPretraining` or `BlipRetrieval`; negatives by argmax as recorded."""
    c, recorded = network.config, meta["config"]
    method = BlipRetrieval(c) if c.by_image else BlipPretraining(c)
    queues = {name: Queue(keys, stats["queue"]["cursor"]) for name, keys in stats["queue"].items() if name != "cursor"}
    ema = update_ema(stats["momentum"], params, recorded["momentum"])
    carry = Carry(ema, queues, hparams={"alpha": jnp.float32(recorded["alpha"])})
    batch = {name: inputs[name] for name in ("image", "input_ids", "attention_mask")}
    batch |= {"image_id": inputs["idx"]} if c.by_image else {}
    encoded = compiled(lambda *arrays: method.encode(*arrays, RNG, None), params, carry, batch)
    negatives = albef.hardest(method, params, batch, encoded)

    def loss(params, carry, batch, negatives):
        encoded = method.encode(params, carry, batch, RNG, None)
        ita, itm, itm_logits = albef.aligned(method, params, carry, batch, encoded, negatives)
        outputs = {"loss_ita": ita, "loss_itm": itm, "itm_logits": itm_logits}
        if c.by_image:
            return ita + itm, outputs
        lm, _, logits = method.lm_loss(params, batch, encoded, RNG, None)
        return ita + itm + lm.value, outputs | {"loss_lm": lm.value, "lm_logits": logits}

    (_, outputs), grads = gradient(loss, params, carry, batch, negatives)
    outputs |= albef.contrast_outputs(method, params, carry, batch, encoded, negatives) | {"momentum": ema}
    if c.by_image:
        outputs["ptr_queue_after"] = outputs.pop("queue_ptr_after")
    positive = with_first(batch["input_ids"], c.enc), batch["attention_mask"], encoded.image
    outputs["itm_hidden_pos"] = network(params, "encode_multimodal", *positive)
    outputs |= {"image_embeds": encoded.image, "text_embeds": encoded.text}
    outputs |= {"image_feat": encoded.image_embeds, "text_feat": encoded.text_embeds}
    return outputs | {"image_feat_m": encoded.image_keys, "text_feat_m": encoded.text_keys}, grads


# ---------------------------------------------------------------------------------------------------------- fine-tuning


def matching(network, params, stats, inputs, meta):
    """blip_itm.py, whose texts begin with [CLS]."""

    def outputs(params, image, ids, mask):
        tokens, text = network(params, "encode_image", image), network(params, "encode_text", ids, mask)
        states = network(params, "encode_multimodal", ids, mask, tokens)
        cosines = network(params, "image_embeds", tokens) @ network(params, "text_embeds", text).T
        return {"itm_logits": network(params, "itm_logits", states), "itc_sim": cosines}

    return compiled(outputs, params, inputs["image"], inputs["input_ids"], inputs["attention_mask"]), None


def two_images(network, params, stats, inputs, meta):
    method, images = BlipClassification(network.config), jnp.split(jnp.asarray(inputs["image"]), 2)
    batch = {"image_0": images[0], "image_1": images[1], "label": inputs["targets"]}
    batch |= {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def loss(params, batch):
        return method.loss(params, Carry(), batch, RNG, STEP)[0], method.logits(params, batch, RNG)

    (value, logits), grads = gradient(loss, params, batch)
    tokens = [network(params, "encode_image", image) for image in images]
    states = network(params, "encode_multimodal", batch["input_ids"], batch["attention_mask"], *tokens)
    return {"last_hidden_state": states, "prediction": logits, "loss": value}, grads


def written(network, params, inputs, prompt, max_length, min_length, **options):
    """Prompt and generated ids; the limits count the prompt, as those of transformers 4.15 do."""
    c, length = network.config, prompt.shape[1]
    lengths = {"max_new_tokens": max_length - length, "min_new_tokens": max(min_length - length, 0)}
    rules = GenerationOptions(eos=(c.sep,), pad=c.pad, beam_rules=BeamRules.v4_15(), **lengths, **options)
    decodable, variables = BertDecodable(c.decoder), {"params": params["decoder"]}
    ids = generate(decodable, variables, {"input_ids": prompt, **inputs}, rules).ids[:, 0]
    return np.concatenate([prompt, ids], axis=1)


def captioning(network, params, stats, inputs, meta):
    method = BlipCaptioning(network.config, prompt_length=meta["config"]["prompt_length"])
    batch = {name: inputs[name] for name in ("image", "attention_mask")} | {"input_ids": inputs["caption_ids"]}

    def loss(params, batch):
        value, _ = method.loss(params, Carry(), batch, RNG, STEP)
        return value.value, method.logits(params, batch, RNG)

    (value, logits), grads = gradient(loss, params, batch)
    outputs = {"image_embeds": network(params, "encode_image", inputs["image"]), "logits": logits}
    context = {"encoder_hidden_states": outputs["image_embeds"]}

    def caption(*limits, **options):
        return written(network, params, context, inputs["prompt_ids"], *limits, **options)

    outputs |= {"loss_lm": value, "greedy_ids": caption(16, 5), "beam3_ids": caption(16, 5, num_beams=3)}
    outputs["beam3_default_len_ids"] = caption(30, 10, num_beams=3)
    outputs["greedy_reppen_ids"] = caption(16, 5, repetition_penalty=1.3)
    return outputs, grads


def answering(network, params, stats, inputs, meta):
    c, method = network.config, BlipAnswering(network.config)
    batch, rows = albef.answer_batch(inputs, inputs["n"])
    batch |= {"image": inputs["image"]}

    def loss(params, batch):
        return method.loss(params, Carry(), batch, RNG, STEP)[0], method.losses(params, batch, RNG)

    def losses(params, ids, mask, states, states_mask):
        logits = network(params, "decode", ids, mask, states, states_mask)
        return text_cross_entropy(logits, next_tokens(ids, mask), label_smoothing=0.1)

    def rank(params, states, mask, ids, ids_mask, k):
        start = jnp.full((len(states), 1), c.bos)
        logits = network(params, "decode", start, None, states, mask)[:, 0]
        chosen = jax.lax.top_k(jax.nn.softmax(logits)[:, ids[:, 1]], k)[1]
        context = jnp.repeat(states, k, axis=0), jnp.repeat(mask, k, axis=0)
        each = losses(
            params, ids[chosen].reshape(-1, ids.shape[1]), ids_mask[chosen].reshape(-1, ids.shape[1]), *context
        )
        best = jnp.argmin(each.reshape(-1, k), axis=1)
        return {
            "start_logits": logits,
            "rank_loss": each,
            "rank_ids": jnp.take_along_axis(chosen, best[:, None], 1)[:, 0],
        }

    (value, (each, logits)), grads = gradient(loss, params, batch)
    outputs = {"answer_loss": each[rows], "answer_logits": logits[rows]}
    tokens = network(params, "encode_image", inputs["image"])
    outputs["question_states"] = network(
        params, "encode_multimodal", inputs["question_ids"], inputs["question_mask"], tokens
    )
    columns = inputs["question_mask"], inputs["cand_ids"], inputs["cand_mask"]
    k = meta["config"]["k_test"]
    outputs |= compiled(lambda *args: rank(*args, k), params, outputs["question_states"], *map(jnp.asarray, columns))
    context = {"encoder_hidden_states": outputs["question_states"]}  # without a mask, as in the original
    prompt = np.full((len(inputs["n"]), 1), c.bos, np.int32)
    outputs["generate_ids"] = written(network, params, context, prompt, 10, 1, num_beams=3)
    return outputs | {"loss": value}, grads


RUNS = {
    "pretrain": aligned,
    "retrieval": aligned,
    "itm": matching,
    "nlvr": two_images,
    "decoder": captioning,
    "vqa": answering,
}
