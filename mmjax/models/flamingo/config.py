"""The config of a Flamingo, and the published sizes."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from mmjax.errors import MmjaxError
from mmjax.models.language.config import DecoderConfig, OverLanguageModel
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.network import ViTConfig


@dataclass(frozen=True)
class ResamplerConfig:
    """Fields of `mmjax.nn.resampler.Resampler`; the defaults are OpenFlamingo's."""

    depth: int = 6
    heads: int = 8
    head_width: int = 64
    latents: int = 64
    hidden: int | None = None
    frames: int = 0
    media: int = 0
    act: Literal["gelu", "relu"] = "gelu"
    qk_norm: bool = False


@dataclass(frozen=True)
class FlamingoConfig(OverLanguageModel):
    """The parts and how they meet; class methods give the published sizes (counts: tests/models/test_flamingo.py).

    Attributes:
        vision: the image encoder. The media are the patch tokens of a ViT after its final norm (CLIP's norm comes after
            pooling: theirs are those before it, as in OpenFlamingo), or the cells of a ResNet's last map.
        language: the decoder. Ids from its vocab_size on, `added_tokens` of them, are trained beside its own.
        every: a cross-attention layer comes before every n-th block.
        first: the block before which the first one comes; None: every - 1 (OpenFlamingo); 0 in the paper.
        resampler: None: the image encoder's tokens are the media, without one; a ViT's then, and of images alone.
        class_token: the media have the ViT's class token (Idefics).
        heads, head_width, hidden: of these layers; hidden: None: 4 times the language model's width.
        form: of these layers: "open_flamingo": LayerNorms, and a feed-forward with GELU; "llama": RMSNorms with the
            language model's epsilon, and its gated feed-forward (Idefics). qk_norm: queries and keys have an RMSNorm
            over each head. vector_gates: a gate for each channel. initial_gate: of all gates, before its tanh.
        only_last: a token attends to the last image before it, and before the first image to nothing: its attention is
            exactly zero. False: to all images so far; a token before the first one then attends evenly to all images of
            its prompt, as in the original, where no weights have that form.
        image_token, end_of_chunk: ids of `<image>`, which attends to its own image already, and `<|endofchunk|>`, which
            ends texts; None: the language model's ids do.
        end_of_text: after this id no token attends to an image until the next `<image>` (Idefics); None: all do.
        embed_dim: width of the image encoder's projection, for image features alone (RICES); 0: there is none.
        dtype, remat: of all parts.
    """

    vision: ViTConfig | ResNetConfig
    language: DecoderConfig
    resampler: ResamplerConfig | None = ResamplerConfig()
    class_token: bool = False
    every: int = 1
    first: int | None = None
    heads: int = 8
    head_width: int = 64
    hidden: int | None = None
    form: Literal["open_flamingo", "llama"] = "open_flamingo"
    qk_norm: bool = False
    vector_gates: bool = False
    initial_gate: float = 0.0
    only_last: bool = True
    image_token: int = 50_278
    end_of_chunk: int | None = 50_277
    end_of_text: int | None = None
    embed_dim: int = 0
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        """Raises MmjaxError where no block has a cross-attention layer, or an id is not in the vocabulary, and for an
        image encoder that is no ViT without a resampler or with a class token."""
        if self.every < 1 or not self.crossed:
            raise MmjaxError(f"every={self.every}, first={self.first}: none of {self.language.depth} blocks")
        ids, total = (self.image_token, self.end_of_chunk), self.language.vocab_size + self.language.added_tokens
        outside = [number for number in ids if number is not None and not 0 <= number < total]
        if outside or ids[0] == ids[1]:
            raise MmjaxError(f"image_token={ids[0]}, end_of_chunk={ids[1]}: two different ids below {total}")
        if not isinstance(self.vision, ViTConfig) and (self.resampler is None or self.class_token):
            raise MmjaxError(f"resampler={self.resampler}, class_token={self.class_token}: the image encoder is no ViT")

    @classmethod
    def open_flamingo(cls, language: DecoderConfig, every: int, **fields: Any) -> Self:
        """OpenFlamingo on any decoder: CLIP ViT-L/14, and three added ids after the vocabulary: `<|endofchunk|>`,
        `<image>`, padding."""
        vision = ViTConfig.clip(224, 14, 1024, 24, 16, 4096)
        first = language.vocab_size
        ids = {"end_of_chunk": first, "image_token": first + 1, "embed_dim": 768}
        decoder = replace(language, added_tokens=3, pad=first + 2)
        return cls(vision, decoder, every=every, **{**ids, **fields})

    @classmethod
    def open_flamingo_3b(cls, **fields: Any) -> Self:
        """On MPT-1B; the resampler and 24 cross-attention layers have 944,019,504 parameters."""
        return cls.open_flamingo(DecoderConfig.mpt_1b(vocab_size=50_277), 1, **fields)

    @classmethod
    def open_flamingo_4b(cls, **fields: Any) -> Self:
        """On RedPajama-INCITE-3B; 960,763,936."""
        return cls.open_flamingo(DecoderConfig.redpajama_3b(vocab_size=50_277), 2, **fields)

    @classmethod
    def open_flamingo_9b(cls, **fields: Any) -> Self:
        """On MPT-7B; 1,178,834,960."""
        return cls.open_flamingo(DecoderConfig.mpt_7b(vocab_size=50_277), 4, **fields)

    # ------------------------------------------------------------------------------------------------------- the parts

    @property
    def crossed(self) -> tuple[int, ...]:
        """The blocks before which a cross-attention layer comes."""
        return tuple(range(self.every - 1 if self.first is None else self.first, self.language.depth, self.every))

    @property
    def tower(self) -> ViTConfig | ResNetConfig:
        """The image encoder as it runs."""
        return replace(self.vision, num_classes=0, dtype=self.dtype, remat=self.remat)  # type: ignore[arg-type]

    @property
    def decoder(self) -> DecoderConfig:
        """The language model as it runs."""
        return replace(self.language, dtype=self.dtype, remat=self.remat)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image encoder's images; of a ResNet without attention pool, which takes any, 224."""
        if isinstance(self.vision, ViTConfig):
            return self.vision.image_size
        pool = self.vision.attention_pool
        return (224, 224) if pool is None else (32 * pool.grid[0], 32 * pool.grid[1])

    @property
    def channels(self) -> int:
        """Channels of the image encoder's tokens."""
        return self.vision.width if isinstance(self.vision, ViTConfig) else self.vision.channels

    @property
    def media_tokens(self) -> int:
        """The number of tokens of an image or video in the cross attention; without a resampler of `image_size`."""
        if self.resampler is not None:
            return self.resampler.latents
        assert isinstance(self.vision, ViTConfig)
        return self.vision.grid[0] * self.vision.grid[1] + self.vision.prefix * self.class_token

    @property
    def eos(self) -> tuple[int, ...]:
        """`<|endofchunk|>`, or the language model's."""
        return self.language.eos if self.end_of_chunk is None else (self.end_of_chunk,)
