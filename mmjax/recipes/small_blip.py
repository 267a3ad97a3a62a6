"""BLIP in small: pre-training, and from it a captioner and a filter, the two models of CapFilt (`mmjax capfilt`)."""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.caption_text import CleanText, EncodeCaption
from mmjax.data.openmoji import ATTRIBUTION
from mmjax.data.pipeline import Transform
from mmjax.evaluation.captions import CaptionsEvaluation
from mmjax.models.bert.network import BertConfig
from mmjax.models.blip.finetune import BlipCaptioning, BlipRetrieval
from mmjax.models.blip.network import ALONE, BlipConfig
from mmjax.models.blip.pretrain import BlipPretraining
from mmjax.models.blip.start import starting_weights
from mmjax.models.blip.tasks import ADDED, BlipModel
from mmjax.recipes.small_image_text import MEAN, STD
from mmjax.recipes.small_pairs import SmallPairs
from mmjax.text.captions import blip_caption
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.experiment import Evaluation
from mmjax.types import Params

PROMPT = "a picture of"


def special_ids(tokenizer: WordPieceTokenizer) -> dict[str, int]:
    """Fields of a `BlipConfig`: the ids of a tokenizer whose last two pieces are [DEC] and [ENC]."""
    ids = {"bos": tokenizer.vocab_size - 2, "enc": tokenizer.vocab_size - 1}
    return ids | {"sep": tokenizer.sep, "pad": tokenizer.pad}


@dataclasses.dataclass(frozen=True)
class SmallBlip(SmallPairs, abc.ABC):
    """Pre-training. Every layer of the text transformer has cross-attention.

    Attributes:
        beams: of the captions that are evaluated.

    Of the class:
        prompt: the beginning of these captions; None: [DEC] alone, as in pre-training.
    """

    clean = staticmethod(blip_caption)
    sep: ClassVar[bool] = True
    add_similarity: ClassVar[bool] = True
    prompt: ClassVar[str | None] = None

    text_depth: int = 3
    beams: int = 3

    @functools.cached_property
    def tokenizer(self) -> WordPieceTokenizer:
        """With [DEC] and [ENC]."""
        return super().tokenizer.with_appended(ADDED)

    @property
    def network(self) -> BlipConfig:
        return BlipConfig(self.vision, self.text, self.decoder, shared=True, **self.ids, **self.contrast)

    @property
    def text(self) -> BertConfig:
        return BertConfig(vocab_size=self.tokenizer.vocab_size, types=0, cross_from=0, **self.text_sizes)

    @property
    def decoder(self) -> BertConfig:
        return dataclasses.replace(self.text, causal=True, mlm=True)

    @property
    def ids(self) -> dict[str, int]:
        """Fields of the network's config."""
        return special_ids(self.tokenizer)

    @property
    def channels(self) -> dict[str, Any]:
        """Fields of the method."""
        return {"mean": MEAN, "std": STD}

    def method(self) -> Any:
        return BlipPretraining(self.network, alpha_steps=self.alpha_steps, **self.channels)

    def evaluations(self) -> tuple[Evaluation, ...]:
        """Retrieval and captions."""
        return *super().evaluations(), self.captions()

    def captions(self) -> CaptionsEvaluation:
        held_out, network = self.pairs.held_out.columns, self.network
        images = np.asarray(held_out["image"])
        pixels = np.asarray(self.preprocess(list(images)))

        def caption(params: Params, state: Any) -> Sequence[str]:
            model = BlipModel(network, params, tokenizer=self.tokenizer, preprocess=self.preprocess)
            lengths = {"max_length": self.length - 1, "min_length": 2}
            return model.caption(pixels, prompt=self.prompt, num_beams=self.beams, batch_size=64, **lengths)

        return CaptionsEvaluation(
            caption=caption,
            references=[[blip_caption(text) for text in texts] for texts in held_out["texts"]],
            thumbnails=images,
            attribution=ATTRIBUTION,
            final_step=self.steps,
        )

    def whole_weights(self, weights: Mapping[str, Any]) -> Mapping[str, Any]:
        return starting_weights(weights, self.network)

    def model(self) -> tuple[str, BlipConfig]:
        return "blip", self.network


@dataclasses.dataclass(frozen=True)
class SmallCaptioner(SmallBlip, abc.ABC):
    """Fine-tuning of a `SmallBlip`, `init_from`, on captions after the prompt that `mmjax capfilt` samples with."""

    prompt: ClassVar[str | None] = PROMPT

    @property
    def network(self) -> BlipConfig:
        return BlipConfig(self.vision, None, self.decoder, **self.ids, **ALONE)

    def method(self) -> BlipCaptioning:
        prompt_length = 1 + len(self.tokenizer.pieces(PROMPT)[0])
        return BlipCaptioning(self.network, prompt_length=prompt_length, **self.channels)

    def text_transforms(self) -> tuple[Transform, ...]:
        template = PROMPT + " {}"
        return CleanText(self.clean), EncodeCaption(self.tokenizer, self.length, template=template)

    def evaluations(self) -> tuple[Evaluation, ...]:
        return (self.captions(),)


@dataclasses.dataclass(frozen=True)
class SmallFilter(SmallBlip, abc.ABC):
    """Fine-tuning of a `SmallBlip`, `init_from`, by contrast and matching; records have an image_id."""

    @property
    def network(self) -> BlipConfig:
        return BlipConfig(self.vision, self.text, by_image=True, **self.ids, **self.contrast)

    def method(self) -> BlipRetrieval:
        return BlipRetrieval(self.network, alpha_steps=self.alpha_steps, **self.channels)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        return super().example_batch() | {"image_id": jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)}

    def evaluations(self) -> tuple[Evaluation, ...]:
        return super().evaluations()[:-1]
