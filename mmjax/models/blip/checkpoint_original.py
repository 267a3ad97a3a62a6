"""The layout of the files that the scripts of salesforce/BLIP save.

Where the decoder shares arrays with the encoder (pre-training), they stand under the names of both. Names of momentum
encoders end in `_m`; a file for inference (blip_itm.py) has neither them nor queues nor a temperature. No weight file
has the number of heads: each is 64 wide, unless a config.json has another number.
"""

import functools
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from mmjax.models.bert import checkpoint as bert
from mmjax.models.bert.network import BertConfig
from mmjax.models.blip.network import BlipConfig, is_unshared
from mmjax.models.vit import checkpoint_timm as timm
from mmjax.models.vit.network import ViTConfig
from mmjax.objectives.language import IGNORED
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Shape, Table, chain, int64, reshape, transpose

Shapes = Mapping[str, Shape]
ENCODER, DECODER = "text_encoder.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.bias"


def _parts(config: BlipConfig, momentum: bool) -> list[Entry]:
    """The entries of the parts that have a momentum copy: the network's, or the copy's."""
    end, params = ("_m", "stats/momentum") if momentum else ("", "params")
    put = functools.partial(moved, params=params)
    entries = [put(entry, f"visual_encoder{end}.", "vision") for entry in timm.table(config.vision)]
    if config.text is not None:
        entries += [put(entry, f"text_encoder{end}.", "text") for entry in _encoder_table(config.text)]
    if config.embed_dim:
        for name in ("vision_proj", "text_proj"):
            entries += [put(entry, "", "") for entry in timm.dense(f"{name}{end}", name)]
    return entries


def _encoder_table(config: BertConfig) -> list[Entry]:
    """The keys of a `Bert` without the prefix of one with a head, and without its MLM head's copies."""
    return [
        replace(entry, source=entry.sources[0].removeprefix("bert."), copies=())
        for entry in bert.hf_table(replace(config, mlm=False))
    ]


def _decoder_entries(config: BertConfig) -> list[Entry]:
    """A decoder with all arrays of its own; its output matrix and bias stand under two names each."""
    entries = [moved(entry, "text_decoder.", "decoder") for entry in bert.hf_table(config)]
    return [replace(entry, save_copies=bool(entry.copies)) for entry in entries]


def _share(encoder: list[Entry], decoder: list[Entry]) -> list[Entry]:
    """The entries of both where they share arrays: the names of the decoder's are copies of the encoder's."""
    own = [entry for entry in decoder if is_unshared(entry.targets[0].removeprefix("params/decoder/"))]
    names = {
        entry.targets[0].replace("/decoder/", "/text/", 1): (*entry.sources, *entry.copies)
        for entry in decoder
        if entry not in own
    }
    shared = [
        replace(entry, copies=names[entry.targets[0]], save_copies=True) if entry.targets[0] in names else entry
        for entry in encoder
    ]
    return shared + own


def table(config: BlipConfig) -> Table:
    """The entries of the network; with `holds_state` also of its momentum copy and the queues."""
    entries = _parts(config, momentum=False)
    if config.decoder is not None:
        decoder = _decoder_entries(config.decoder)
        entries = _share(entries, decoder) if config.shared else entries + decoder
    entries += [] if config.temperature is None else [Entry("temp", "params/temperature")]
    entries += timm.dense("itm_head", "itm_head") if config.matching else []
    if config.classes:
        entries += timm.dense("cls_head.0", "cls_hidden") + timm.dense("cls_head.2", "cls_head")
    if not config.holds_state:
        return tuple(entries)
    entries += _parts(config, momentum=True)
    if config.queue:
        for name in ("image", "text"):
            entries.append(Entry(f"{name}_queue", f"stats/queue/{name}", transpose((1, 0))))
        cursor = "ptr_queue" if config.by_image else "queue_ptr"
        entries.append(Entry(cursor, "stats/queue/cursor", chain(int64, reshape((1,), ()))))
        if config.by_image:
            ids = chain(int64, transpose((1, 0)))
            entries.append(Entry("idx_queue", "stats/queue/ids", ids, optional=True, default=IGNORED))
    return tuple(entries)


def config_of(shapes: Shapes, config_json: Mapping[str, Any] | None) -> BlipConfig:
    """The config, from the arrays' shapes, and from `vision_heads` and `text_heads` of config.json if there.

    Raises MmjaxError for parts that do not fit each other.
    """
    config_json = config_json or {}
    vision = {k.removeprefix("visual_encoder."): s for k, s in shapes.items() if k.startswith("visual_encoder.")}
    args = {"model_args": {"num_heads": config_json["vision_heads"]}} if "vision_heads" in config_json else None
    fields = text_parts(shapes, config_json.get("text_heads")) | heads_of(shapes)
    return BlipConfig(
        vision_config(vision, args, drop_path=fields["text"] is not None and not fields["matching"]),
        **fields,
        shared=fields["decoder"] is not None and fields["matching"],
        classes=shapes.get("cls_head.2.weight", (0,))[0],
        temperature=0.07 if "temp" in shapes else None,
        queue=shapes.get("image_queue", (0, 0))[1],
        by_image="ptr_queue" in shapes or "idx_queue" in shapes,
        holds_state=any(key.startswith("visual_encoder_m.") for key in shapes),
    )


def vision_config(shapes: Shapes, args: Mapping[str, Any] | None, drop_path: bool) -> ViTConfig:
    """The config of BLIP's ViT, which in training has stochastic depth in ViT-L, and with `drop_path` (VQA, NLVR2)."""
    config = timm.config(shapes, args)
    rate = 0.1 if drop_path or config.width == 1024 else 0.0
    return replace(config, rule="bicubic", init="timm", drop_path=rate)


def heads_of(shapes: Shapes) -> dict[str, Any]:
    """The fields of the heads of contrast and matching."""
    return {"embed_dim": shapes.get("vision_proj.weight", (0,))[0], "matching": "itm_head.weight" in shapes}


def text_parts(shapes: Shapes, number: int | None, **fields: Any) -> dict[str, Any]:
    """{"text", "decoder", "bos", "enc", "sep"}: [DEC] and [ENC] are the last two ids of the vocabulary; the id of [SEP]
    is known for BERT's alone.

    number: of heads; None: each is 64 wide. fields: of both `BertConfig`s.
    """
    text = decoder = None
    if ENCODER in shapes:
        text = bert.config_of_part(shapes, "text_encoder.", number, pooler=False, **fields)
    if DECODER in shapes:
        kind: dict[str, Any] = {"pooler": False, "mlm": True, "causal": True}
        decoder = bert.config_of_part(shapes, "text_decoder.bert.", number, **kind, **fields)
    one = text or decoder
    assert one is not None
    ids = {"bos": one.vocab_size - 2, "enc": one.vocab_size - 1, "sep": 102 if one.vocab_size == 30524 else None}
    return {"text": text, "decoder": decoder, **ids}


def recognises(keys: Set[str], config_json: Mapping[str, Any] | None) -> bool:
    """Whether these are the keys of a BLIP. ALBEF, whose keys are alike, has token types."""
    types = any(key.endswith("embeddings.token_type_embeddings.weight") for key in keys)
    return "visual_encoder.blocks.0.attn.qkv.weight" in keys and bool({ENCODER, DECODER} & keys) and not types


BLIP = Layout(
    "blip",
    recognises,
    config_of,
    table,
    wrappers=("model", "state_dict"),
    ignored=("*.position_ids",),
    assumed={"vision.heads": "vision_heads", "text.heads": "text_heads"},
)
