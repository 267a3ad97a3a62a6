"""ALBEF's public layout: the files that the scripts of salesforce/ALBEF save, before and after fine-tuning.

Before fine-tuning the text encoder's keys begin with `text_encoder.bert.`, after it with `text_encoder.`. Names of
momentum encoders end in `_m`; some published files have neither them nor queues. No weight file has the number of
heads: each is 64 wide, unless a config.json has another number.
"""

import functools
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from mmjax.models.albef.network import AlbefConfig, tied_pairs
from mmjax.models.bert import checkpoint as bert
from mmjax.models.bert.network import BertConfig
from mmjax.models.vit import checkpoint_timm as timm
from mmjax.models.vit.network import ViTConfig
from mmjax.objectives.language import IGNORED
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Op, Shape, Table, chain, int64, reshape, transpose

Shapes = Mapping[str, Shape]


def _parts(config: AlbefConfig, momentum: bool) -> list[Entry]:
    """The entries of the parts that have a momentum copy: the network's, or the copy's."""
    end, params = ("_m", "stats/momentum") if momentum else ("", "params")
    put = functools.partial(moved, params=params)
    entries = [put(entry, f"visual_encoder{end}.", "vision") for entry in timm.table(config.vision)]
    entries += [put(entry, f"text_encoder{end}.", "text") for entry in _text_table(config)]
    if config.embed_dim:
        for source, target in (("vision_proj", "vision_proj"), ("text_proj", "text_proj")):
            entries += [put(entry, "", "") for entry in timm.dense(f"{source}{end}", target)]
    if config.classes:
        for source, target in (("0", "cls_hidden"), ("2", "cls_head")):
            entries += [put(entry, "", "") for entry in timm.dense(f"cls_head{end}.{source}", target)]
    if config.decoder is not None:
        entries += [put(entry, f"text_decoder{end}.", "decoder") for entry in bert.hf_table(config.decoder)]
    return entries


SHARED = Op("shared", lambda first, second: second, lambda pair: (pair, pair), joins=True)
"""Two arrays of the file that were one in the original <-> one of ours; the second is taken, as torch does."""


def _text_table(config: AlbefConfig) -> Table:
    """The entries of the text encoder; keys have the prefix `bert.` where there is an MLM head."""
    entries = bert.hf_table(config.text)
    if not config.text.mlm:
        entries = tuple(replace(entry, source=entry.sources[0].removeprefix("bert.")) for entry in entries)
    by_target = {entry.targets[0]: entry for entry in entries}
    for first, second in tied_pairs(config):
        for name in (f"cross_attention/{letter}/{array}" for letter in "kv" for array in ("kernel", "bias")):
            one = by_target.pop(f"params/encoder/{first}/{name}")
            other = by_target[f"params/encoder/{second}/{name}"]
            tied = replace(other, source=(*one.sources, *other.sources), op=chain(other.op, SHARED))
            by_target[f"params/encoder/{second}/{name}"] = tied
    return tuple(by_target.values())


def table(config: AlbefConfig) -> Table:
    """The entries of the network; with `holds_state` also of its momentum copy and the queues."""
    entries = _parts(config, momentum=False)
    entries += [Entry("temp", "params/temperature")] if config.embed_dim else []
    entries += timm.dense("itm_head", "itm_head") if config.matching else []
    entries += timm.dense("ta_head", "ta_head") if config.assigning else []
    if not config.holds_state:
        return tuple(entries)
    entries += _parts(config, momentum=True)
    if config.queue:
        for name in ("image", "text"):
            entries.append(Entry(f"{name}_queue", f"stats/queue/{name}", transpose((1, 0))))
        entries.append(Entry("queue_ptr", "stats/queue/cursor", chain(int64, reshape((1,), ()))))
        if config.by_image:
            ids = chain(int64, transpose((1, 0)))
            entries.append(Entry("idx_queue", "stats/queue/ids", ids, optional=True, default=IGNORED))
    return tuple(entries)


def config_of(shapes: Shapes, config_json: Mapping[str, Any] | None) -> AlbefConfig:
    """The config, from the arrays' shapes, and from `vision_heads` and `text_heads` of config.json if there.

    Raises MmjaxError for parts that do not fit each other.
    """
    config_json = config_json or {}
    vision = {k.removeprefix("visual_encoder."): s for k, s in shapes.items() if k.startswith("visual_encoder.")}
    args = {"model_args": {"num_heads": config_json["vision_heads"]}} if "vision_heads" in config_json else None
    has_mlm = "text_encoder.cls.predictions.bias" in shapes
    start = "text_encoder.bert." if has_mlm else "text_encoder."
    text = bert.config_of_part(shapes, start, config_json.get("text_heads"), pooler=False, mlm=has_mlm)
    classes = shapes.get("cls_head.2.weight", (0,))[0]
    assigning = "ta_head.weight" in shapes
    # Six text layers and six cross-attention layers, or six pairs of those.
    pairs = (bool(classes) or assigning) and text.depth == 3 * (text.cross_from or 0)
    return AlbefConfig(
        timm_config(vision, args),
        text,
        embed_dim=shapes.get("vision_proj.weight", (0,))[0],
        matching="itm_head.weight" in shapes,
        two_images=pairs,
        assigning=assigning,
        classes=classes,
        decoder=_decoder_config(shapes, config_json.get("text_heads")),
        queue=shapes.get("image_queue", (0, 0))[1],
        by_image="itm_head.weight" in shapes and not has_mlm,
        holds_state=any(key.startswith("visual_encoder_m.") for key in shapes),
    )


def timm_config(shapes: Shapes, args: Mapping[str, Any] | None) -> ViTConfig:
    """The config of ALBEF's ViT: timm's, with positions resized by torch's bicubic rule."""
    return replace(timm.config(shapes, args), rule="bicubic", init="timm")


def _decoder_config(shapes: Shapes, heads: int | None) -> BertConfig | None:
    if "text_decoder.cls.predictions.bias" not in shapes:
        return None
    return bert.config_of_part(shapes, "text_decoder.bert.", heads, pooler=False, mlm=True, causal=True)


def recognises(keys: Set[str], config_json: Mapping[str, Any] | None) -> bool:
    """Whether these are the keys of an ALBEF. BLIP, whose keys are alike, has no token types."""
    types = {f"text_encoder.{bert}embeddings.token_type_embeddings.weight" for bert in ("bert.", "")}
    return "visual_encoder.blocks.0.attn.qkv.weight" in keys and bool(types & keys)


LAYOUTS = (
    Layout(
        "albef",
        recognises,
        config_of,
        table,
        wrappers=("model", "state_dict"),
        ignored=("*.position_ids",),
    ),
)
