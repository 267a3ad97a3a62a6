"""The BLIP vaults: one step of pre-training and of retrieval, captioning, VQA, ITM and NLVR2."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden.albef import compiled, gradient

from mmjax.generation.engine import generate
from mmjax.generation.options import BeamRules, GenerationOptions
from mmjax.models.bert.decode import BertDecodable
from mmjax.models.blip.checkpoint import BLIP
from mmjax.models.blip.network import BlipConfig, with_first
from mmjax.objectives.language import IGNORED, answer_loss, next_tokens, text_cross_entropy, token_cross_entropy
from mmjax.objectives.matching import has_negative, matching_loss, negative_log_weights
from mmjax.objectives.momentum_contrast import momentum_contrast
from mmjax.training.ema import update_ema
from mmjax.training.queue import Queue, enqueue, write
from mmjax.weights.table import load_table, save_table


def config_of(recorded: dict[str, Any], shapes: dict[str, Any]) -> BlipConfig:
    """As the library infers it from the keys; no file has the heads and the id of [SEP]."""
    heads = {"vision_heads": recorded["vision_heads"], "text_heads": recorded["num_attention_heads"]}
    config, ids = BLIP.config(shapes, heads), recorded["special_tokens"]
    assert (config.bos, config.enc) == (ids["bos"], ids["enc"])
    return dataclasses.replace(config, sep=ids["sep"], pad=ids["pad"])


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
    """One step with contrast, matching and, in pre-training, the language model; negatives by argmax as recorded."""
    c, recorded = network.config, meta["config"]
    ids, mask, image = inputs["input_ids"], inputs["attention_mask"], inputs["image"]
    queues = {name: Queue(keys, stats["queue"]["cursor"]) for name, keys in stats["queue"].items() if name != "cursor"}
    ema = update_ema(stats["momentum"], params, recorded["momentum"])

    def encode(params):
        tokens, text = network(params, "encode_image", image), network(params, "encode_text", ids, mask)
        return tokens, text, network(params, "image_embeds", tokens), network(params, "text_embeds", text)

    def negatives(params):
        (*_, feat_i, feat_t), (*_, keys_i, keys_t) = encode(params), encode(params | ema)
        keys = (feat_i, feat_t) if c.by_image else (keys_i, keys_t)
        options: dict[str, Any] = {"ids": inputs["idx"]} if c.by_image else {"floor": 1e-4}
        weights = (negative_log_weights(feat_t, keys[0], params["temperature"], **options),)
        weights += (negative_log_weights(feat_i, keys[1], params["temperature"], **options),)
        return [jnp.argmax(w, axis=1) for w in weights]

    images, texts = compiled(negatives, params)

    def loss(params):
        (tokens, text, feat_i, feat_t), (*_, keys_i, keys_t) = encode(params), encode(params | ema)
        by_image = {"ids": inputs["idx"], "queue_ids": queues["ids"].keys[:, 0]} if c.by_image else {}
        keys = (keys_i, keys_t, queues["image"].keys, queues["text"].keys)
        ita = momentum_contrast(feat_i, feat_t, *keys, params["temperature"], recorded["alpha"], **by_image)
        enc_ids = with_first(ids, c.enc)
        positive = network(params, "encode_multimodal", enc_ids, mask, tokens)
        both = jnp.concatenate([enc_ids, enc_ids[texts]]), jnp.concatenate([mask, jnp.asarray(mask)[texts]])
        negative = network(params, "encode_multimodal", *both, jnp.concatenate([tokens[images], tokens]))
        itm_logits = network(params, "itm_logits", jnp.concatenate([positive, negative]))
        itm = matching_loss(itm_logits, has_negative(len(ids), inputs.get("idx"))).value
        outputs = {"loss_ita": ita, "loss_itm": itm, "itm_logits": itm_logits, "itm_hidden_pos": positive}
        outputs |= {"image_embeds": tokens, "text_embeds": text, "image_feat": feat_i, "text_feat": feat_t}
        outputs |= {"image_feat_m": keys_i, "text_feat_m": keys_t}
        if c.decoder is None:
            return ita + itm, outputs
        dec_ids = with_first(ids, c.bos)
        logits = network(params, "decode", dec_ids, mask, tokens)
        lm = token_cross_entropy(logits, next_tokens(dec_ids, mask), label_smoothing=0.1).loss.value
        return ita + itm + lm, outputs | {"loss_lm": lm, "lm_logits": logits}

    (_, outputs), grads = gradient(loss, params)
    keys = {"image": outputs["image_feat_m"], "text": outputs["text_feat_m"]}
    for name, query, other in (("i2t", "image", "text"), ("t2i", "text", "image")):
        columns = jnp.concatenate([keys[other], queues[other].keys])
        outputs[f"sim_{name}"] = outputs[f"{query}_feat"] @ columns.T / params["temperature"]
    keys |= {"ids": inputs["idx"][:, None]} if c.by_image else {}
    after = {name: write(enqueue(queues[name], value)) for name, value in keys.items()}
    outputs |= {f"{'idx' if name == 'ids' else name}_queue_after": queue.keys.T for name, queue in after.items()}
    outputs |= {"neg_image_idx": images, "neg_text_idx": texts, "momentum": ema}
    outputs["ptr_queue_after" if c.by_image else "queue_ptr_after"] = after["image"].cursor[None]
    return outputs, grads


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
    def loss(params, image, ids, mask, targets):
        tokens = network(params, "encode_image", image)
        states = network(params, "encode_multimodal", ids, mask, *jnp.split(tokens, 2))
        logits = network(params, "classify", states)
        outputs = {"last_hidden_state": states, "prediction": logits}
        return token_cross_entropy(logits, targets).loss.value, outputs

    columns = (inputs[name] for name in ("image", "input_ids", "attention_mask", "targets"))
    (value, outputs), grads = gradient(loss, params, *columns)
    return outputs | {"loss": value}, grads


def written(network, params, inputs, prompt, max_length, min_length, **options):
    """Prompt and generated ids; the limits count the prompt, as those of transformers 4.15 do."""
    c, length = network.config, prompt.shape[1]
    lengths = {"max_new_tokens": max_length - length, "min_new_tokens": max(min_length - length, 0)}
    rules = GenerationOptions(eos=(c.sep,), pad=c.pad, beam_rules=BeamRules.v4_15(), **lengths, **options)
    decodable, variables = BertDecodable(c.decoder), {"params": params["decoder"]}
    ids = generate(decodable, variables, {"input_ids": prompt, **inputs}, rules).ids[:, 0]
    return np.concatenate([prompt, ids], axis=1)


def captioning(network, params, stats, inputs, meta):
    labels = jnp.where(inputs["attention_mask"] == 1, inputs["caption_ids"], IGNORED)
    labels = next_tokens(labels.at[:, : meta["config"]["prompt_length"]].set(IGNORED))

    def loss(params, image, ids, mask):
        tokens = network(params, "encode_image", image)
        logits = network(params, "decode", ids, mask, tokens)
        outputs = {"image_embeds": tokens, "logits": logits}
        return token_cross_entropy(logits, labels, label_smoothing=0.1).loss.value, outputs

    columns = inputs["image"], inputs["caption_ids"], inputs["attention_mask"]
    (value, outputs), grads = gradient(loss, params, *columns)
    context = {"encoder_hidden_states": outputs["image_embeds"]}

    def caption(*limits, **options):
        return written(network, params, context, inputs["prompt_ids"], *limits, **options)

    outputs |= {"loss_lm": value, "greedy_ids": caption(16, 5), "beam3_ids": caption(16, 5, num_beams=3)}
    outputs["beam3_default_len_ids"] = caption(30, 10, num_beams=3)
    outputs["greedy_reppen_ids"] = caption(16, 5, repetition_penalty=1.3)
    return outputs, grads


def answering(network, params, stats, inputs, meta):
    c, question = network.config, np.repeat(np.arange(len(inputs["n"])), inputs["n"])

    def losses(params, ids, mask, states, states_mask):
        logits = network(params, "decode", ids, mask, states, states_mask)
        return text_cross_entropy(logits, next_tokens(ids, mask), label_smoothing=0.1), logits

    def loss(params, inputs):
        tokens = network(params, "encode_image", inputs["image"])
        states = network(params, "encode_multimodal", inputs["question_ids"], inputs["question_mask"], tokens)
        context = states[question], inputs["question_mask"][question]
        each, logits = losses(params, inputs["answer_ids"], inputs["answer_mask"], *context)
        outputs = {"question_states": states, "answer_loss": each, "answer_logits": logits}
        return answer_loss(each, inputs["weights"], len(inputs["n"])), outputs

    def rank(params, states, mask, ids, ids_mask, k):
        start = jnp.full((len(states), 1), c.bos)
        logits = network(params, "decode", start, None, states, mask)[:, 0]
        chosen = jax.lax.top_k(jax.nn.softmax(logits)[:, ids[:, 1]], k)[1]
        context = jnp.repeat(states, k, axis=0), jnp.repeat(mask, k, axis=0)
        each, _ = losses(
            params, ids[chosen].reshape(-1, ids.shape[1]), ids_mask[chosen].reshape(-1, ids.shape[1]), *context
        )
        best = jnp.argmin(each.reshape(-1, k), axis=1)
        return {
            "start_logits": logits,
            "rank_loss": each,
            "rank_ids": jnp.take_along_axis(chosen, best[:, None], 1)[:, 0],
        }

    (value, outputs), grads = gradient(loss, params, inputs)
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
