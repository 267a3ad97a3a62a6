"""Hugging Face's layout: BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval.

The arrays are the original's under other names. What training needs beside the network (temperature, momentum encoders,
queues) has no name here. config.json may leave out every field whose value is the default of transformers' classes:
8 heads in the text's layers and an epsilon of 1e-5 in the ViT, both unlike the original's.

transformers' BlipModel is refused: a pooler, projections without bias, an exponentiated temperature and a final norm
that pooled images pass twice are no network of BLIP's authors, no public file has their weights, and it is deprecated.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.bert.checkpoint import HF_ACTIVATIONS
from mmjax.models.bert.network import BertConfig
from mmjax.models.blip.checkpoint_original import DECODER, ENCODER, heads_of, table, text_parts, vision_config
from mmjax.models.blip.network import BlipConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.table import Layout, Shape, Table

Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None
NAMES = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
    ("visual_encoder.norm", "vision_model.post_layernorm"),
    ("visual_encoder.blocks", "vision_model.encoder.layers"),
)
"""The original's and transformers' beginnings of keys."""
BLOCK_NAMES = (
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
"""The same within a block of the ViT."""

BLIP_MODEL = "text_model.embeddings.word_embeddings.weight"


def hf_name(key: str) -> str:
    """The original's key -> transformers'."""
    for original, hf in NAMES:
        key = re.sub(rf"^{re.escape(original)}(?=$|\.)", hf, key)
    if key.startswith("vision_model.encoder"):
        for original, hf in BLOCK_NAMES:
            key = key.replace(original, hf)
    return key


def original_name(key: str) -> str:
    """transformers' key -> the original's."""
    for original, hf in NAMES:
        key = re.sub(rf"^{re.escape(hf)}(?=$|\.)", original, key)
    if key.startswith("visual_encoder.blocks"):
        for original, hf in BLOCK_NAMES:
            key = key.replace(hf, original)
    return key


def hf_table(config: BlipConfig) -> Table:
    """The original's table under transformers' names, in which tied arrays may have one name alone."""
    return tuple(
        replace(entry, source=hf_name(entry.sources[0]), copies=tuple(map(hf_name, entry.copies)), save_copies=True)
        for entry in table(config)
    )


def reduced(config: BlipConfig) -> BlipConfig:
    """The config of what the layout holds. Raises MmjaxError for a network that no class of transformers is."""
    if config.shared or config.classes or config.two_images:
        kind = "pre-training (encoder and decoder in one)" if config.shared else "NLVR2"
        raise MmjaxError(f"layout='hf': transformers has no class for BLIP's network of {kind}; layout='blip' holds it")
    return replace(config, temperature=None, queue=0, by_image=False, holds_state=False)


# --------------------------------------------------------------------------------------------------------- config.json


def config_of(shapes: Shapes, config_json: ConfigJson) -> BlipConfig:
    """The config, from the arrays' shapes and config.json; defaults of transformers' classes fill the rest.

    Raises MmjaxError for a BlipModel.
    """
    if BLIP_MODEL in shapes:
        raise MmjaxError(
            "this is transformers' BlipModel, whose pooler and projections are in no BLIP; there are "
            "BlipForImageTextRetrieval (features and matching), BlipForConditionalGeneration, BlipForQuestionAnswering"
        )
    text, vision = (dict((config_json or {}).get(f"{name}_config") or {}) for name in ("text", "vision"))
    renamed = {original_name(key): shape for key, shape in shapes.items()}
    fields: dict[str, Any] = {
        "act": activation_of(text, "text_config"),
        "epsilon": text.get("layer_norm_eps", 1e-12),
        "dropout": text.get("hidden_dropout_prob", 0.0),
        "attention_dropout": text.get("attention_probs_dropout_prob", 0.0),
        "init_std": text.get("initializer_range", 0.02),
    }
    heads = None if config_json is None else text.get("num_attention_heads", 8)
    parts = text_parts(renamed, heads, **fields)
    ids = {"bos": text.get("bos_token_id", 30522), "sep": text.get("sep_token_id", 102)}
    return BlipConfig(
        _vision(renamed, None if config_json is None else vision),
        **(parts | heads_of(renamed) | ids),
        pad=text.get("pad_token_id", 0),
        temperature=None,
        queue=0,
    )


def _vision(shapes: Shapes, vision: Mapping[str, Any] | None) -> ViTConfig:
    """vision: of config.json; None: there is no such file, and each head is 64 wide."""
    start = "visual_encoder."
    args = None if vision is None else {"model_args": {"num_heads": vision.get("num_attention_heads", 12)}}
    vision = vision or {}
    config = vision_config(
        {key.removeprefix(start): shape for key, shape in shapes.items() if key.startswith(start)}, args, False
    )
    fields: dict[str, Any] = {
        "epsilon": vision.get("layer_norm_eps", 1e-5),
        "act": activation_of(vision, "vision_config"),
    }
    return replace(config, attention_dropout=vision.get("attention_dropout", 0.0), **fields)


def activation_of(part: Mapping[str, Any], name: str) -> str:
    act = part.get("hidden_act", "gelu")
    if act not in HF_ACTIVATIONS:
        raise MmjaxError(f"config.json: {name}.hidden_act={act!r}: one of {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[act]


def hf_config(config: BlipConfig) -> dict[str, Any]:
    """config.json with every field, also those that are transformers' defaults."""
    text = config.text or config.decoder
    assert text is not None
    kinds = {"BlipForQuestionAnswering": config.answers, "BlipForConditionalGeneration": config.decoder is not None}
    name = next((name for name, held in kinds.items() if held), "BlipForImageTextRetrieval")
    return {
        "architectures": [name],
        "model_type": "blip",
        "image_text_hidden_size": config.embed_dim or 256,
        "text_config": _text_json(text, config),
        "vision_config": _vision_json(config.vision),
        "tie_word_embeddings": True,
    }


def _text_json(text: BertConfig, config: BlipConfig) -> dict[str, Any]:
    return {
        "model_type": "blip_text_model",
        **sizes(text),
        "vocab_size": text.vocab_size,
        "encoder_hidden_size": config.vision.width,
        "max_position_embeddings": text.positions,
        "hidden_dropout_prob": text.dropout,
        "attention_probs_dropout_prob": text.attention_dropout,
        "initializer_range": text.init_std,
        "bos_token_id": config.bos,
        "sep_token_id": config.sep,
        "pad_token_id": config.pad,
        "is_decoder": True,
    }


def _vision_json(vision: ViTConfig) -> dict[str, Any]:
    return {
        "model_type": "blip_vision_model",
        **sizes(vision),
        "image_size": vision.image_size[0],
        "patch_size": vision.patch,
        "attention_dropout": vision.attention_dropout,
    }


def sizes(part: BertConfig | ViTConfig) -> dict[str, Any]:
    """The fields that both halves have. Raises MmjaxError for an activation without a name in transformers."""
    act = next((name for name, value in HF_ACTIVATIONS.items() if value == part.act), None)
    if act is None:
        raise MmjaxError(f"act={part.act!r}: this layout knows {', '.join(dict.fromkeys(HF_ACTIVATIONS.values()))}")
    return {
        "hidden_size": part.width,
        "intermediate_size": part.hidden,
        "num_hidden_layers": part.depth,
        "num_attention_heads": part.heads,
        "hidden_act": act,
        "layer_norm_eps": part.epsilon,
    }


def recognises(keys: Set[str], config_json: ConfigJson) -> bool:
    """Whether these are the keys of one of the classes; BLIP-2 has the same image encoder."""
    return "vision_model.encoder.layers.0.self_attn.qkv.weight" in keys and bool({ENCODER, DECODER, BLIP_MODEL} & keys)


HF = Layout(
    "hf",
    recognises,
    config_of,
    hf_table,
    hf_config=hf_config,
    reduce=reduced,
    ignored=("*.position_ids",),
    assumed={
        "vision.heads": "vision_config.num_attention_heads",
        "text.heads": "text_config.num_attention_heads",
        "vision.epsilon": "vision_config.layer_norm_eps",
    },
)
