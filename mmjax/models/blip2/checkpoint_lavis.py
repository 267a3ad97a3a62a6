"""The layout of LAVIS' files of the first stage (blip2_pretrained.pth, blip2_pretrained_vitL.pth, blip2_finetune_coco).

The image encoder is EVA-CLIP's g/14, whose attention has biases of queries and values alone, or CLIP's ViT-L/14. LAVIS
saves the parameters that it trains: in files of pre-training the encoder is missing, and stands in a file of its own,
eva_vit_g.pth, which `load` reads where it lies beside. No file has numbers of heads.
"""

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.bert import checkpoint as bert
from mmjax.models.blip2.network import Blip2Config
from mmjax.models.clip.checkpoint import openai_block
from mmjax.models.vit import checkpoint_eva as eva
from mmjax.models.vit import checkpoint_timm as timm
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Shape, Table, chain, conv, reshape

Shapes = Mapping[str, Shape]
TOWER = "visual_encoder."
EPSILON = 1e-5
"""Of ln_vision: torch's default (blip2.py:81)."""


def table(config: Blip2Config) -> Table:
    """The entries of the network; with the LM head its tied matrix and bias stand under two names each."""
    text = [moved(entry, "Qformer.", "qformer") for entry in bert.hf_table(config.qformer)]
    if not config.qformer.mlm:
        text = [replace(entry, copies=()) for entry in text]
    queries = reshape((1, config.queries, config.qformer.width))
    return (
        *vision_table(config.vision),
        Entry("query_tokens", "params/queries", queries),
        *(replace(entry, save_copies=bool(entry.copies)) for entry in text),
        *([] if config.temperature is None else [Entry("temp", "params/temperature")]),
        *(entry for name in ("vision_proj", "text_proj", "itm_head") for entry in timm.dense(name, name)),
    )


def vision_table(config: ViTConfig) -> list[Entry]:
    """The entries of the image encoder and its final norm, of both stages."""
    if is_clip(config):
        tower = _clip_tower(config)
    else:
        tower = [moved(entry, TOWER, "vision") for entry in eva.blocks_table(config)]
    return [*tower, *timm.norm("ln_vision", "vision/norm")]


def is_clip(config: ViTConfig) -> bool:
    """Whether the image encoder is CLIP's: LAVIS and Hugging Face have names of their own for EVA's."""
    return config.norm_before


def _clip_tower(config: ViTConfig) -> list[Entry]:
    rows = config.grid[0] * config.grid[1] + 1
    kernel = chain(conv, reshape((config.patch, config.patch, 3, config.width)))
    entries = [
        Entry(f"{TOWER}class_embedding", "params/vision/cls", reshape((config.width,))),
        Entry(f"{TOWER}positional_embedding", "params/vision/positions", reshape((rows, config.width))),
        Entry(f"{TOWER}conv1.weight", "params/vision/patch/projection/kernel", kernel),
        *timm.norm(f"{TOWER}ln_pre", "vision/norm_before"),
    ]
    for i in range(config.depth):
        entries += openai_block(f"{TOWER}transformer.resblocks.{i}", f"vision/encoder/block_{i}")
    return entries


# -------------------------------------------------------------------------------------------------------------- config


def config_of(shapes: Shapes, config_json: Mapping[str, Any] | None) -> Blip2Config:
    """The config, from the arrays' shapes, and from `vision_heads` and `text_heads` of config.json if there.

    Raises MmjaxError for a file without the image encoder.
    """
    config_json = config_json or {}
    vision = vision_config(shapes, config_json.get("vision_heads"))
    mlm = "Qformer.cls.predictions.bias" in shapes
    text = bert.config_of_part(shapes, "Qformer.bert.", config_json.get("text_heads"), pooler=False, mlm=mlm)
    return Blip2Config(
        vision,
        text,
        queries=shapes["query_tokens"][1],
        embed_dim=shapes["vision_proj.weight"][0],
        temperature=0.07 if "temp" in shapes else None,
        **special_ids(text.vocab_size),
    )


def vision_config(shapes: Shapes, heads: int | None) -> ViTConfig:
    """Of the image encoder with its final norm, of both stages. Raises MmjaxError for a file without it."""
    tower = {key.removeprefix(TOWER): shape for key, shape in shapes.items() if key.startswith(TOWER)}
    if not tower:
        raise MmjaxError(
            f"it has no {TOWER}*: LAVIS saves the trained parameters alone. Put the image encoder's file beside it, "
            f"under the name {' or '.join(ENCODERS)}"
        )
    return (_clip_config if "conv1.weight" in tower else _eva_config)(tower, heads)


def special_ids(vocab_size: int) -> dict[str, Any]:
    """[DEC] is the last id of the vocabulary; the id of [SEP] is known for BERT's alone."""
    return {"bos": vocab_size - 1, "sep": 102 if vocab_size in (30522, 30523) else None}


def _eva_config(shapes: Shapes, heads: int | None) -> ViTConfig:
    args = None if heads is None else {"model_args": {"num_heads": heads}}
    return replace(eva.config_of(shapes, args), norm_epsilon=EPSILON)


def _clip_config(shapes: Shapes, heads: int | None) -> ViTConfig:
    width, _, patch, _ = shapes["conv1.weight"]
    depth, hidden = timm.depth_of(shapes, "transformer.resblocks."), shapes["transformer.resblocks.0.mlp.c_fc.bias"][0]
    side, _ = timm.square(shapes["positional_embedding"][0] - 1, patch, "positional_embedding")
    fields: dict[str, Any] = {"norm_after_pool": False, "rule": "bicubic", "norm_epsilon": EPSILON}
    return ViTConfig.clip(side, patch, width, depth, heads or max(width // 64, 1), hidden, **fields)


def recognises(keys: Set[str], config_json: Mapping[str, Any] | None) -> bool:
    """Whether these are the keys of the first stage; in files of the second one the Q-Former has no text."""
    return {"query_tokens", "itm_head.weight", "Qformer.bert.embeddings.word_embeddings.weight"} <= keys


ENCODERS = {"eva_vit_g.pth": TOWER, "clip_vit_L.pth": TOWER}
"""Files of the image encoders (eva_vit.py:442, clip_vit.py:246), and the prefix of their keys in whole files."""
UNUSED = (
    "blocks.39.*",
    "norm.*",
    "fc_norm.*",
    "head.*",
    "mask_token",
    "transformer.resblocks.23.*",
    "ln_post.*",
    "proj",
)
"""What the encoders' own files have beyond what BLIP-2 takes of them."""

LAVIS = Layout(
    "lavis",
    recognises,
    config_of,
    table,
    wrappers=("model", "state_dict"),
    ignored=("*.position_ids", *(TOWER + key for key in UNUSED)),
    assumed={"vision.heads": "vision_heads", "qformer.heads": "text_heads"},
    parts=ENCODERS,
)
