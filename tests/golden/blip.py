"""The BLIP vaults: one step of pre-training and of retrieval, captioning, VQA, ITM and NLVR2."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden import albef
from golden.albef import RNG, STEP, compiled, gradient

from mmjax.generation.options import BeamRules
from mmjax.models.blip.checkpoint_original import BLIP
from mmjax.models.blip.finetune import BlipAnswering, BlipCaptioning, BlipClassification, BlipRetrieval
from mmjax.models.blip.network import BlipConfig, with_first
from mmjax.models.blip.pretrain import BlipPretraining
from mmjax.models.blip.tasks import BlipModel
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
    variables = load_table(table, arrays, BlipModel.shapes(config), meta["name"])
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
    columns = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    outputs = BlipModel(network.config, params).forward(pixel_values=inputs["image"], **columns)
    cosines = outputs["image_embeds"] @ outputs["text_embeds"].T
    return {"itm_logits": outputs["itm_score"], "itc_sim": cosines}, None


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


def captioning(network, params, stats, inputs, meta):
    method = BlipCaptioning(network.config, prompt_length=meta["config"]["prompt_length"])
    batch = {name: inputs[name] for name in ("image", "attention_mask")} | {"input_ids": inputs["caption_ids"]}

    def loss(params, batch):
        value, _ = method.loss(params, Carry(), batch, RNG, STEP)
        return value.value, method.logits(params, batch, RNG)

    (value, logits), grads = gradient(loss, params, batch)
    outputs = {"image_embeds": network(params, "encode_image", inputs["image"]), "logits": logits}
    model, prompt = BlipModel(network.config, params), inputs["prompt_ids"]

    def generated(max_length, min_length, **options):
        """Prompt and generated ids; both limits count the prompt, as in transformers 4.15."""
        lengths = {"max_new_tokens": max_length - prompt.shape[1], "min_new_tokens": min_length - prompt.shape[1]}
        options |= lengths | {"beam_rules": BeamRules.v4_15()}
        ids = model.generate(prompt, pixel_values=inputs["image"], **options)
        return padded(np.concatenate([prompt, ids], axis=1), max_length)

    outputs |= {"loss_lm": value, "greedy_ids": generated(16, 5), "beam3_ids": generated(16, 5, num_beams=3)}
    outputs["beam3_default_len_ids"] = generated(30, 10, num_beams=3)
    outputs["greedy_reppen_ids"] = generated(16, 5, repetition_penalty=1.3)
    return outputs, grads


def padded(ids, length):
    return np.pad(ids, ((0, 0), (0, length - ids.shape[1])))


def answering(network, params, stats, inputs, meta):
    method = BlipAnswering(network.config)
    batch, rows = albef.answer_batch(inputs, inputs["n"])
    batch |= {"image": inputs["image"]}

    def loss(params, batch):
        return method.loss(params, Carry(), batch, RNG, STEP)[0], method.losses(params, batch, RNG)

    (value, (each, logits)), grads = gradient(loss, params, batch)
    outputs = {"loss": value, "answer_loss": each[rows], "answer_logits": logits[rows]}
    model = BlipModel(network.config, params)
    columns = (inputs[name] for name in ("image", "question_ids", "question_mask", "cand_ids", "cand_mask"))
    ranking = model.rank(*columns, k=meta["config"]["k_test"])
    outputs |= {"rank_ids": ranking.indices[:, 0], "rank_loss": ranking.losses.reshape(-1)}
    outputs |= {"start_logits": ranking.start_logits, "question_states": ranking.states}
    options = {"max_new_tokens": 9, "num_beams": 3, "beam_rules": BeamRules.v4_15()}  # max_length=10 counts [DEC]
    images = {"pixel_values": inputs["image"], "attention_mask": inputs["question_mask"]}
    ids = model.generate(inputs["question_ids"], **images, **options)
    start = np.full((len(ids), 1), network.config.bos)
    return outputs | {"generate_ids": padded(np.concatenate([start, ids], axis=1), 10)}, grads


RUNS = {
    "pretrain": aligned,
    "retrieval": aligned,
    "itm": matching,
    "nlvr": two_images,
    "decoder": captioning,
    "vqa": answering,
}
