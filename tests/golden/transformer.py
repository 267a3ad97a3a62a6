"""Vaults transformer (torch.nn.Transformer) and marian (Hugging Face's MarianMTModel)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.generation.engine import generate
from mmjax.generation.options import GenerationOptions
from mmjax.models.transformer.checkpoint import HF, TORCH
from mmjax.models.transformer.network import Transformer, TransformerDecodable
from mmjax.models.transformer.pretrain import shifted_right, translation_loss
from mmjax.models.transformer.tasks import TransformerModel
from mmjax.nn.sinusoids import sinusoids
from mmjax.weights.table import load_table, save_table


def check(meta, tensors):
    layout = TORCH if meta["name"].startswith("transformer") else HF
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    config = layout.config({key: value.shape for key, value in weights.items()}, meta["config"])
    params = load_table(layout.table(config), weights, TransformerModel.shapes(config), meta["name"])["params"]
    inputs = {key.removeprefix("inputs/"): value for key, value in tensors.items() if key.startswith("inputs/")}
    inputs = {key: jnp.asarray(value.astype(np.int32)) for key, value in inputs.items()}
    outputs, grads = (of_torch if layout is TORCH else of_marian)(config, params, inputs)
    saved = save_table(layout.table(config), {"params": grads})
    return outputs | {f"grad/{key}": array for key, array in saved.items()}


def of_torch(config, params, inputs):
    src, tgt, labels = inputs["src"], inputs["tgt"], inputs["labels"]
    mask, tgt_mask = inputs["src_padding"] == 0, inputs["tgt_padding"] == 0

    def loss(params):
        out = Transformer(config).apply({"params": params}, src, tgt, mask, tgt_mask)
        return translation_loss(out["logits"], labels)[0].value, out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    norm_first = Transformer(dataclasses.replace(config, norm_first=True))
    before = jax.jit(norm_first.apply)({"params": params}, src, tgt, mask, tgt_mask)
    outputs = {"positions": sinusoids(src.shape[1], config.width, config.positions), "loss": value}
    outputs |= {"src_embedded": out["encoder_states"][0], "tgt_embedded": out["decoder_states"][0]}
    outputs |= {"memory": out["memory"], "decoder_out": out["last"], "logits": out["logits"]}
    outputs |= {"prenorm_memory": before["memory"], "prenorm_decoder_out": before["last"]}
    outputs["loss_label_smoothing"] = translation_loss(out["logits"], labels, 0.1)[0].value
    prompt = {"input_ids": src, "attention_mask": inputs["src_padding"] == 0}
    new = generate(TransformerDecodable(config), {"params": params}, prompt, GenerationOptions(max_new_tokens=8))
    return outputs | {"greedy_ids": started(config, new.ids)}, grads


def of_marian(config, params, inputs):
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"] == 1, inputs["labels"]
    decoder_ids = shifted_right(labels, config)

    def loss(params):
        out = Transformer(config).apply({"params": params}, ids, decoder_ids, mask)
        return translation_loss(out["logits"], labels)[0].value, out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    outputs = {"encoder_out": out["memory"], "logits": out["logits"], "loss": value, "decoder_input_ids": decoder_ids}
    special = {"eos": (config.eos,), "pad": config.pad, "suppress": (config.pad,), "forced_eos": config.forced_eos}
    plain = GenerationOptions(max_new_tokens=12, **special)
    beams = plain.replace(num_beams=4)
    early = beams.replace(length_penalty=2.0, early_stopping=True)
    for name, options in (("greedy", plain), ("beam4", beams), ("beam4_lp2_early", early)):
        prompt = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
        new = generate(TransformerDecodable(config), {"params": params}, prompt, options)
        outputs[f"{name}_ids"] = started(config, new.ids)
        outputs |= {"beam4_scores": new.scores[:, 0]} if name == "beam4" else {}
    return outputs, grads


def started(config, ids):
    """Generated ids behind the decoder's start."""
    return np.concatenate([np.full((len(ids), 1), config.start), ids[:, 0]], 1)
