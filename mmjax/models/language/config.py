"""The config of a decoder-only language model, and the published sizes."""

from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias

from mmjax.nn.rotary import Rotary


@dataclass(frozen=True)
class Learned:
    """A table of positions, added to the embeddings.

    Attributes:
        first: the row of the first token (OPT: 2).
        of_tokens: padding has no position of its own, in plain forward passes too (OPT); else only in generation.
    """

    first: int = 0
    of_tokens: bool = False


@dataclass(frozen=True)
class Alibi:
    """Scores fall linearly with distance, at a slope a head (Press et al. 2022; MPT)."""


Positions: TypeAlias = Rotary | Learned | Alibi
Family: TypeAlias = Literal["llama", "qwen2", "phi3", "opt", "gpt2", "gpt_neox", "mpt"]


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only model; class methods give the published sizes (counts: tests/models/test_language.py).

    Attributes:
        family: the public layout of the weights.
        vocab_size: rows of the embedding, which may be more than the tokenizer has.
        heads, kv_heads: of queries, and of keys and values; the second divides the first.
        head_width: channels of a head; heads * head_width need not be `width`.
        hidden: width of the feed-forward. gated: down(act(gate(x)) * up(x)), else down(act(up(x))).
        norm: "rms", "layer", or "layer_without_bias" (MPT).
        positions: the position encoding.
        context: the longest sequence; rows of a learned table.
        parallel: attention and feed-forward read the same state (GPT-NeoX) and are added to it together.
        norm_first, final_norm: False in OPT-350m alone.
        qkv_bias, out_bias, mlp_bias: which products have a bias.
        qk_norm: a LayerNorm over all heads of queries and keys (MPT-1B).
        window: a token attends to this many, itself included (Phi-3); None: to all before it.
        clip_qkv: queries, keys and values are clamped to +- this value (MPT); None: no clamping.
        embed_width: of the embeddings, where it is not `width` (OPT-350m): projected in, and out before the head.
        tied: the head is the embedding's transpose. head_bias: the bias of an untied head.
        added_tokens: ids from vocab_size on. Their rows of the embedding and the head are separate parameters, to
            be trained beside frozen ones (Flamingo: 2, xGen-MM: 3).
        unused_rows: rows of the embedding and the head after the first vocab_size, which belong to no id, as a file has
            more rows than its tokenizer has ids (xGen-MM: 52). They are loaded and saved, and have no logits.
        bos, eos, pad: ids of the checkpoint's config; any of `eos` ends a text.
        dtype: "float32" or "bfloat16", of the computation; norms, softmax and logits are float32.
        remat: recomputes blocks in the backward pass.
    """

    family: Family
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    act: Literal["silu", "gelu", "gelu_tanh", "relu", "quick_gelu"] = "silu"
    gated: bool = True
    norm: Literal["rms", "layer", "layer_without_bias"] = "rms"
    epsilon: float = 1e-5
    positions: Positions = field(default_factory=Rotary)
    context: int = 2048
    parallel: bool = False
    norm_first: bool = True
    final_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    clip_qkv: float | None = None
    embed_width: int | None = None
    tied: bool = False
    head_bias: bool = False
    added_tokens: int = 0
    unused_rows: int = 0
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    dtype: str = "float32"
    remat: bool = False

    @property
    def capacity(self) -> int | None:
        """The longest sequence that there are positions for; None: any."""
        return self.context if isinstance(self.positions, Learned) else None

    @property
    def keys_depend_on_length(self) -> bool:
        """Whether a key is another in a longer text (LongRope), so that no cache of a shorter one serves it."""
        return isinstance(self.positions, Rotary) and self.positions.longrope is not None

    # ------------------------------------------------------------------------------------------------------- families

    @classmethod
    def llama(cls, width: int, depth: int, heads: int, hidden: int, **changes: Any) -> Self:
        """LLaMA's form: RMSNorm, rotary positions, SwiGLU, no biases. kv_heads is `heads` by default."""
        fields: dict[str, Any] = {
            "family": "llama",
            "vocab_size": 32_000,
            "kv_heads": heads,
            "head_width": width // heads,
        }
        fields |= {"bos": 1, "eos": (2,), "context": 4096}
        return cls(width=width, depth=depth, heads=heads, hidden=hidden, **fields | changes)

    @classmethod
    def vicuna_7b(cls, **changes: Any) -> Self:
        """LLaMA-2 7B and Vicuna v1.5 7B; LLaMA-1 and Vicuna v1.1 have epsilon=1e-6, context=2048."""
        return cls.llama(4096, 32, 32, 11_008, **changes)

    @classmethod
    def vicuna_13b(cls, **changes: Any) -> Self:
        return cls.llama(5120, 40, 40, 13_824, **changes)

    @classmethod
    def smollm2_135m(cls, **changes: Any) -> Self:
        fields = {"vocab_size": 49_152, "kv_heads": 3, "positions": Rotary(100_000.0), "context": 8192, "tied": True}
        return cls.llama(576, 30, 9, 1536, **{**fields, "bos": 1, "eos": (2,), "pad": 2, **changes})

    @classmethod
    def smollm2_360m(cls, **changes: Any) -> Self:
        fields = {"vocab_size": 49_152, "kv_heads": 5, "positions": Rotary(100_000.0), "context": 8192, "tied": True}
        return cls.llama(960, 32, 15, 2560, **{**fields, "bos": 1, "eos": (2,), "pad": 2, **changes})

    @classmethod
    def qwen2(cls, width: int, depth: int, heads: int, kv_heads: int, hidden: int, **changes: Any) -> Self:
        """Qwen2's form: LLaMA with biases on queries, keys and values."""
        fields = {
            "family": "qwen2",
            "vocab_size": 151_936,
            "kv_heads": kv_heads,
            "epsilon": 1e-6,
            "positions": Rotary(1e6),
        }
        fields |= {"context": 131_072, "qkv_bias": True, "tied": True, "bos": None, "eos": (151_643,)}
        return cls.llama(width, depth, heads, hidden, **fields | changes)

    @classmethod
    def qwen2_0_5b(cls, **changes: Any) -> Self:
        return cls.qwen2(896, 24, 14, 2, 4864, **changes)

    @classmethod
    def qwen2_7b(cls, **changes: Any) -> Self:
        fields = {"vocab_size": 152_064, "tied": False, "context": 32_768}
        return cls.qwen2(3584, 28, 28, 4, 18_944, **fields | changes)

    @classmethod
    def phi3_mini_4k(cls, **changes: Any) -> Self:
        fields = {"family": "phi3", "vocab_size": 32_064, "window": 2047, "eos": (32_000,), "pad": 32_000}
        return cls.llama(3072, 32, 32, 8192, **fields | changes)

    @classmethod
    def opt(cls, width: int, depth: int, heads: int, **changes: Any) -> Self:
        """OPT's form: LayerNorm, learned positions, ReLU, biases everywhere."""
        fields: dict[str, Any] = {
            "family": "opt",
            "vocab_size": 50_272,
            "hidden": 4 * width,
            "act": "relu",
            "gated": False,
        }
        fields |= {"norm": "layer", "positions": Learned(2, True), "qkv_bias": True, "out_bias": True, "mlp_bias": True}
        fields |= {"kv_heads": heads, "head_width": width // heads, "tied": True, "bos": 2, "eos": (2,), "pad": 1}
        return cls(width=width, depth=depth, heads=heads, **fields | changes)

    @classmethod
    def opt_125m(cls, **changes: Any) -> Self:
        return cls.opt(768, 12, 12, **changes)

    @classmethod
    def opt_350m(cls, **changes: Any) -> Self:
        """The one with norms after its residuals, no last norm, and narrow embeddings."""
        return cls.opt(1024, 24, 16, **{"norm_first": False, "final_norm": False, "embed_width": 512, **changes})

    @classmethod
    def opt_2_7b(cls, **changes: Any) -> Self:
        return cls.opt(2560, 32, 32, **changes)

    @classmethod
    def opt_6_7b(cls, **changes: Any) -> Self:
        return cls.opt(4096, 32, 32, **changes)

    @classmethod
    def gpt2(cls, width: int = 768, depth: int = 12, heads: int = 12, **changes: Any) -> Self:
        """GPT-2's form; the smallest by default (medium 1024, 24, 16; large 1280, 36, 20; XL 1600, 48, 25)."""
        fields: dict[str, Any] = {
            "family": "gpt2",
            "vocab_size": 50_257,
            "act": "gelu_tanh",
            "positions": Learned(),
            "context": 1024,
        }
        return cls.opt(width, depth, heads, **{**fields, "bos": 50_256, "eos": (50_256,), "pad": None, **changes})

    @classmethod
    def gpt_neox(cls, width: int, depth: int, heads: int, **changes: Any) -> Self:
        """GPT-NeoX's form, as of RedPajama-INCITE: not parallel, every channel rotates."""
        fields: dict[str, Any] = {
            "family": "gpt_neox",
            "vocab_size": 50_432,
            "act": "gelu",
            "positions": Rotary(),
            "tied": False,
        }
        return cls.opt(width, depth, heads, **{**fields, "bos": 0, "eos": (0,), "pad": None, **changes})

    @classmethod
    def redpajama_3b(cls, **changes: Any) -> Self:
        return cls.gpt_neox(2560, 32, 32, **changes)

    @classmethod
    def gpt_neox_20b(cls, **changes: Any) -> Self:
        return cls.gpt_neox(6144, 44, 64, **{"positions": Rotary(share=0.25), "parallel": True, **changes})

    @classmethod
    def mpt(cls, width: int, depth: int, heads: int, **changes: Any) -> Self:
        """MPT's form: ALiBi, no bias anywhere, norms neither."""
        fields: dict[str, Any] = {"family": "mpt", "vocab_size": 50_432, "act": "gelu", "norm": "layer_without_bias"}
        fields |= {"positions": Alibi(), "qkv_bias": False, "out_bias": False, "mlp_bias": False}
        return cls.opt(width, depth, heads, **{**fields, "bos": 0, "eos": (0,), "pad": None, **changes})

    @classmethod
    def mpt_7b(cls, **changes: Any) -> Self:
        return cls.mpt(4096, 32, 32, **changes)

    @classmethod
    def mpt_1b(cls, **changes: Any) -> Self:
        """mpt-1b-redpajama, with norms on queries and keys."""
        return cls.mpt(2048, 24, 16, **{"vocab_size": 50_368, "qk_norm": True, **changes})


class OverLanguageModel:
    """Base of configs with a `language`, a DecoderConfig or T5Config: what generation needs is the language model's."""

    language: Any

    @property
    def vocab_size(self) -> int:
        return self.language.vocab_size

    @property
    def capacity(self) -> int | None:
        """The longest sequence that there are positions for; None: any."""
        return getattr(self.language, "capacity", None)

    @property
    def added_tokens(self) -> int:
        return getattr(self.language, "added_tokens", 0)

    @property
    def bos(self) -> int | None:
        return getattr(self.language, "bos", None)

    @property
    def eos(self) -> tuple[int, ...]:
        return self.language.eos

    @property
    def pad(self) -> int | None:
        return self.language.pad
