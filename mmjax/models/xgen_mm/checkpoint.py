"""xGen-MM's public forms: Hugging Face's (XGenMMModelForConditionalGeneration), whose keys begin with "vlm.", and those
of the files of LAVIS's branch xgen-mm, without it.

Sources: open_flamingo's src/xgenmm.py, src/vlm.py, src/helpers.py and export/convert_hf_model.py, and the config
classes of Hugging Face's remote code, whose defaults the published config.json leaves out.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.language import checkpoint as language
from mmjax.models.language.config import DecoderConfig
from mmjax.models.vision_language.network import ResamplerConnector, VisionLanguageConfig
from mmjax.models.vit.checkpoint_timm import dense, depth_of, heads_of, norm, patches, square
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Shape, Table, chain, linear, reshape, split

Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None
PREFIX = "vlm."
VISION, SAMPLER, LANGUAGE = "vision_encoder", "vision_tokenizer", "lang_model"
ADDED = 3
"""`<image>`, `<image placeholder>` and `<|endofchunk|>`."""
TEXT = {
    "model_type": "phi3",
    "initial_tokenizer_len": 32_012,
    "bos_token_id": 1,
    "eos_token_id": 32_000,
    "pad_token_id": 32_000,
    "sliding_window": 2047,
}
"""text_config where config.json has none; other fields have the defaults of Phi3Config."""
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Widths and heights in tiles of anyres_grids, where config.json leaves it out."""


# --------------------------------------------------------------------------------------------------------------- tables


def table(config: VisionLanguageConfig) -> Table:
    """The entries of the branch's files."""
    return (*_vision_entries(config.vision), *_sampler_entries(config), *_language_entries(config))


def hf_table(config: VisionLanguageConfig) -> Table:
    return tuple(replace(entry, source=PREFIX + entry.sources[0]) for entry in table(config))


def _vision_entries(c: ViTConfig) -> list[Entry]:
    """transformers' SiglipVisionTransformer without its head. Raises MmjaxError for another tower."""
    plain = replace(ViTConfig.siglip_so400m14(), width=c.width, depth=c.depth, heads=c.heads, hidden=c.hidden)
    plain = replace(plain, patch=c.patch, image_size=c.image_size, act=c.act, epsilon=c.epsilon)
    free = {name: getattr(c, name) for name in ("dtype", "remat", "rule", "init", "drop_path", "dropout")}
    if replace(plain, **free, attention_dropout=c.attention_dropout) != c:
        raise MmjaxError("layout of xGen-MM: the tower is SigLIP's, with biases, without a class token")
    table_shape = reshape((c.grid[0] * c.grid[1], c.width))
    entries = [
        *patches("embeddings.patch_embedding", c),
        Entry("embeddings.position_embedding.weight", "params/positions", table_shape),
        *norm("post_layernorm", "norm"),
    ]
    for i in range(c.depth):
        source, target = f"encoder.layers.{i}", f"encoder/block_{i}"
        for name in ("q", "k", "v", "out"):
            entries += dense(f"{source}.self_attn.{name}_proj", f"{target}/attention/{name}")
        entries += dense(f"{source}.mlp.fc1", f"{target}/mlp/up") + dense(f"{source}.mlp.fc2", f"{target}/mlp/down")
        for j in (1, 2):
            entries += norm(f"{source}.layer_norm{j}", f"{target}/norm_{j}")
    return [moved(entry, f"{VISION}.", "vision") for entry in entries]


def _sampler_entries(config: VisionLanguageConfig) -> list[Entry]:
    """Raises MmjaxError for another connector. Keys are the first half of to_kv, values the second."""
    connector = config.connector
    if not isinstance(connector, ResamplerConnector):
        raise MmjaxError(f"layout of xGen-MM: the connector is a resampler, not {type(connector).__name__}")
    entries = [Entry("latents", "params/resampler/latents"), *norm("norm", "resampler/norm")]
    for j in range(connector.depth):
        source, target = f"layers.{j}", f"resampler/layer_{j}"
        kernels = tuple(f"params/{target}/attention/{name}/kernel" for name in "kv")
        entries += norm(f"{source}.0.norm_media", f"{target}/media_norm")
        entries += norm(f"{source}.0.norm_latents", f"{target}/latent_norm")
        entries += [
            Entry(f"{source}.0.to_q.weight", f"params/{target}/attention/q/kernel", linear),
            Entry(f"{source}.0.to_kv.weight", kernels, chain(split(2), linear)),
            Entry(f"{source}.0.to_out.weight", f"params/{target}/attention/out/kernel", linear),
        ]
        entries += norm(f"{source}.1.0", f"{target}/mlp_norm")
        entries += [
            Entry(f"{source}.1.1.weight", f"params/{target}/mlp/up/kernel", linear),
            Entry(f"{source}.1.3.weight", f"params/{target}/mlp/down/kernel", linear),
        ]
    entries += dense("projection", "projection")
    return [moved(entry, f"{SAMPLER}.", "connector") for entry in entries]


def _language_entries(config: VisionLanguageConfig) -> list[Entry]:
    """Transformers' entries, with biases of the head, and the rows of the added ids under names of their own."""
    c = _decoder(config)
    if c.tied or not c.head_bias or c.added_tokens != ADDED:
        raise MmjaxError(
            f"layout of xGen-MM: the head is untied (tied={c.tied}) with a bias (head_bias={c.head_bias}), and "
            f"{ADDED} tokens are added (added_tokens={c.added_tokens})"
        )
    entries = [
        *language.HF.table(c),
        Entry("lm_head.bias", "params/head/bias"),
        Entry("model.embed_tokens.additional_embedding.weight", "params/added_embedding"),
        *dense("lm_head.additional_fc", "added_head"),
    ]
    return [moved(entry, f"{LANGUAGE}.", "language") for entry in entries]


def _decoder(config: VisionLanguageConfig) -> DecoderConfig:
    if not isinstance(config.language, DecoderConfig):
        raise MmjaxError("layout of xGen-MM: the language model is a decoder, not an encoder-decoder")
    return config.language


# -------------------------------------------------------------------------------------------------------- config.json


def config_of(shapes: Shapes, config_json: ConfigJson) -> VisionLanguageConfig:
    """From the shapes; what no array determines from config.json, else as in the published models.

    Raises MmjaxError for a tokenizer longer than the embedding, or without an unprefixed key that is needed.
    """
    fields = dict(config_json or {})
    vision, sampler, text = (
        dict(fields.get(f"{name}_config") or {}) for name in ("vision_encoder", "vision_tokenizer", "text")
    )
    text = {**TEXT, **text}
    tower = _vision_config(shapes, vision)
    rows, size = shapes[f"{LANGUAGE}.model.embed_tokens.weight"][0], int(text["initial_tokenizer_len"])
    if size > rows:
        raise MmjaxError(f"text_config: initial_tokenizer_len {size} for an embedding of {rows} rows")
    extra: dict[str, Any] = {"vocab_size": size, "unused_rows": rows - size, "added_tokens": ADDED, "head_bias": True}
    decoder = replace(language.config_of({}, {**text, "vocab_size": rows}), **extra)
    side = tower.image_size[0]
    grids = vision.get("anyres_grids") or [[width * side, height * side] for width, height in GRIDS]
    if any(length % side for grid in grids for length in grid):
        raise MmjaxError(f"vision_encoder_config: anyres_grids {grids} are not whole tiles of {side} x {side}")
    latents = shapes[f"{SAMPLER}.latents"][0]
    inner = shapes[f"{SAMPLER}.layers.0.0.to_q.weight"][0]
    heads = int(sampler.get("heads", max(inner // 96, 1)))
    if inner % heads:
        raise MmjaxError(f"vision_tokenizer_config: {heads} heads do not divide a width of {inner}")
    return VisionLanguageConfig(
        tower,
        decoder,
        ResamplerConnector(depth_of(shapes, f"{SAMPLER}.layers."), heads, inner // heads, latents),
        layer=None,
        grids=tuple((height // side, width // side) for width, height in grids),
        image_token=size,
    )


def _vision_config(shapes: Shapes, fields: Mapping[str, Any]) -> ViTConfig:
    width, _, patch, _ = shapes[f"{VISION}.embeddings.patch_embedding.weight"]
    key = f"{VISION}.embeddings.position_embedding.weight"
    covered = square(shapes[key][0], patch, key)[0]
    side = int(fields.get("image_size", 384 if covered == 378 else covered))
    act = language.ACTIVATIONS[fields.get("hidden_act", "gelu_pytorch_tanh")]
    return ViTConfig.siglip_so400m14(
        width=width,
        depth=depth_of(shapes, f"{VISION}.encoder.layers."),
        heads=int(fields["num_attention_heads"]) if "num_attention_heads" in fields else heads_of(width),
        hidden=shapes[f"{VISION}.encoder.layers.0.mlp.fc1.weight"][0],
        patch=patch,
        image_size=(side, side),
        act=act,
        epsilon=fields.get("layer_norm_eps", 1e-6),
    )


def hf_config(config: VisionLanguageConfig) -> dict[str, Any]:
    """The config.json of an XGenMMModelForConditionalGeneration, with the sizes of the tower, which it has by name."""
    c, tower, sampler = _decoder(config), config.vision, config.connector
    assert isinstance(sampler, ResamplerConnector)
    text = language.hf_config(replace(c, vocab_size=c.vocab_size + c.unused_rows))
    side = tower.image_size[0]
    vision = {
        "model_type": "xgenmm_vision_encoder",
        "model_name": "google/siglip-so400m-patch14-384",
        "anyres_grids": [[columns * side, rows * side] for rows, columns in config.grids],
        "image_aspect_ratio": "anyres",
        "anyres_patch_sampling": True,
        "hidden_size": tower.width,
        "intermediate_size": tower.hidden,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "image_size": side,
        "patch_size": tower.patch,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(tower.act, tower.act),
        "layer_norm_eps": tower.epsilon,
    }
    return {
        "architectures": ["XGenMMModelForConditionalGeneration"],
        "model_type": "xgenmm",
        "vision_encoder_config": vision,
        "vision_tokenizer_config": {
            "model_type": "xgenmm_vision_tokenizer",
            "vis_feature_dim": tower.width,
            "lang_embedding_dim": c.width,
            "num_vis_tokens": sampler.latents,
            "image_aspect_ratio": "anyres",
            "heads": sampler.heads,
        },
        "text_config": text | {"initial_tokenizer_len": c.vocab_size},
    }


# ------------------------------------------------------------------------------------------------------------- layouts


def _hf_config_of(shapes: Shapes, config_json: ConfigJson) -> VisionLanguageConfig:
    return config_of({key.removeprefix(PREFIX): shape for key, shape in shapes.items()}, config_json)


IGNORED = (f"*{VISION}.head.*", "*.rotary_emb.inv_freq", "*.embeddings.position_ids")
"""SigLIP's head, which pools by attention, is in the files and nothing reads its output."""
NEEDED = (f"{SAMPLER}.latents", f"{SAMPLER}.projection.weight", f"{LANGUAGE}.lm_head.additional_fc.weight")
ASSUMED = {"language.vocab_size": "text_config.initial_tokenizer_len", "language.window": "text_config.sliding_window"}
HF = Layout(
    name="hf",
    recognise=lambda keys, config_json: keys >= {PREFIX + key for key in NEEDED},
    config=_hf_config_of,
    table=hf_table,
    hf_config=hf_config,
    ignored=IGNORED,
    assumed=ASSUMED,
)
ORIGINAL = Layout(
    name="xgen_mm",
    recognise=lambda keys, config_json: keys >= set(NEEDED),
    config=config_of,
    table=table,
    hf_config=hf_config,
    ignored=IGNORED,
    assumed=ASSUMED,
)
LAYOUTS: tuple[Layout, ...] = (HF, ORIGINAL)
