"""A Transformer in small that translates the names of emoji from English; minutes on a laptop's CPU.

    mmjax train experiments/transformer_emoji.py --workdir workdirs/transformer_emoji
    mmjax train experiments/transformer_emoji.py --language fr

About 1,500 names are trained on, every fifth English name is held out (`mmjax.data.emoji_names`). So few can teach
what parts names are made of ("woman running", "flag ...") and no word that is in none of them; what is judged is
what a word's parts give away. During training and at its end: BLEU, chrF and exact matches of held-out names, greedy
and with four beams; some translations are written to `artifacts`.
"""

import dataclasses
import functools
import pathlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmjax.data.emoji_names import EmojiNames, load_emoji_names
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.evaluation.translation import TranslationEvaluation
from mmjax.generation.options import GenerationOptions
from mmjax.models.transformer.network import TransformerConfig, TransformerDecodable
from mmjax.models.transformer.pretrain import IGNORED, Translation, adam, noam
from mmjax.text.tokenizer import Tokenizer
from mmjax.text.tokenizer_files import put_around
from mmjax.training.experiment import Evaluation, ExperimentConfig, save_tokenizer
from mmjax.training.optimizer import Optimizer

PAD, START, EOS = "<pad>", "<s>", "</s>"


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    """A run of about three minutes on one core.

    Attributes:
        language: the target language: de, fr, es, ... (`emoji.LANGUAGES`).
        vocab_size: ids of the byte-pair encoding of both languages together, learned from the training names.
        length: ids of a name, its end included; longer ones are not trained on.
        width, depth, heads: see `TransformerConfig.small`.
        warmup, rate: of the paper's schedule, and a factor on it.
    """

    unit: ClassVar[str] = "texts"

    steps: int = 1000
    batch_size: int = 128
    log_every: int = 20
    eval_every: int = 500
    checkpoint_every: int = 500
    language: str = "de"
    vocab_size: int = 1000
    length: int = 16
    width: int = 96
    depth: int = 2
    heads: int = 4
    dropout: float = 0.3
    label_smoothing: float = 0.1
    warmup: int = 200
    rate: float = 0.5

    @functools.cached_property
    def names(self) -> EmojiNames:
        return load_emoji_names(self.language)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        pieces = tokenizers.Tokenizer(models.BPE())
        pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        pieces.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[PAD, START, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces.train_from_iterator([text for pair in self.names.train for text in pair], trainer)
        put_around(pieces, None, EOS)
        return Tokenizer(pieces, {"pad_token": PAD, "bos_token": START, "eos_token": EOS})

    @property
    def network(self) -> TransformerConfig:
        size = {"width": self.width, "depth": self.depth, "heads": self.heads}
        return TransformerConfig.small(self.vocab_size, **size, dropout=self.dropout)

    def method(self) -> Translation:
        return Translation(self.network, self.label_smoothing)

    def optimizer(self) -> Optimizer:
        return Optimizer(adam(noam(self.width, self.warmup, self.rate)), clip_norm=1.0)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = jax.ShapeDtypeStruct((self.batch_size, self.length), jnp.int32)
        return {"input_ids": shape, "labels": shape}

    @functools.cached_property
    def pairs(self) -> ArraySource:
        """The training names as ids, without those that are too long."""
        sides = [self.tokenizer(list(texts)) for texts in zip(*self.names.train)]
        fit = np.all([mask.sum(1) <= self.length for _, mask in sides], axis=0)
        (ids, _), (labels, counted) = ((ids[fit, : self.length], mask[fit, : self.length]) for ids, mask in sides)
        return ArraySource(
            input_ids=ids, labels=np.where(counted, labels, IGNORED), name=f"emoji names en-{self.language}"
        )

    def train_data(self) -> Pipeline:
        return Pipeline(
            self.pairs,
            self.batch_size,
            seed=self.seed,
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluations(self) -> tuple[Evaluation, ...]:
        config, (sources, references) = self.network, map(list, zip(*self.names.held_out))
        ids, mask = self.tokenizer(sources)
        greedy = GenerationOptions(
            max_new_tokens=self.length, eos=(config.eos,), pad=config.pad, suppress=(config.pad, config.start)
        )
        evaluation = TranslationEvaluation(
            decodable=TransformerDecodable(config),
            inputs={"input_ids": ids, "attention_mask": mask},
            sources=sources,
            references=references,
            decode=self.tokenizer.decode,
            options={"greedy": greedy, "beam4": greedy.replace(num_beams=4)},
            final_step=self.steps,
        )
        return (evaluation,)

    def model(self) -> tuple[str, TransformerConfig]:
        return "transformer", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        return save_tokenizer(self.tokenizer, workdir)
