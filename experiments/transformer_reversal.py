"""A Transformer that reverses strings: the whole of the system in a minute, and a target that leaves no doubt.

    mmjax train experiments/transformer_reversal.py --workdir workdirs/transformer_reversal

Random strings of 3 to 12 letters; held-out strings are never trained on. All held-out strings should come out right.
`mmjax.load("workdirs/transformer_reversal").translate("mmjax")` gives "xajmm".
"""

import dataclasses
import functools
import pathlib
import string
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.evaluation.translation import TranslationEvaluation
from mmjax.generation.options import GenerationOptions
from mmjax.models.transformer.network import TransformerConfig, TransformerDecodable
from mmjax.models.transformer.pretrain import IGNORED, Translation, adam
from mmjax.text.tokenizer import Tokenizer
from mmjax.text.tokenizer_files import put_around
from mmjax.training.experiment import Evaluation, ExperimentConfig, save_tokenizer
from mmjax.training.optimizer import Optimizer, warmup_cosine

PAD, START, EOS = "<pad>", "<s>", "</s>"


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    """A run of about a minute on one core.

    Attributes:
        examples, held_out: strings to train on and to judge by, all different.
        longest: letters of a string, at most; at least 3.
        width, depth: of the states, and blocks a stack; four heads.
        learning_rate: peak; warmup and half a cosine, so that the last steps are small.
    """

    unit: ClassVar[str] = "texts"

    steps: int = 1000
    batch_size: int = 64
    log_every: int = 50
    eval_every: int = 250
    checkpoint_every: int = 250
    examples: int = 20_000
    held_out: int = 500
    longest: int = 12
    width: int = 64
    depth: int = 2
    learning_rate: float = 3e-3
    warmup: int = 100

    @functools.cached_property
    def strings(self) -> tuple[list[str], list[str]]:
        """(trained, held out), a function of the sizes alone."""
        rng = np.random.default_rng(0)
        letters, strings = np.array(list(string.ascii_lowercase)), dict[str, None]()
        while len(strings) < self.examples + self.held_out:
            strings["".join(rng.choice(letters, rng.integers(3, self.longest + 1)))] = None
        texts = list(strings)
        return texts[self.held_out :], texts[: self.held_out]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """An id a letter."""
        vocabulary = {token: id for id, token in enumerate((PAD, START, EOS, *string.ascii_lowercase))}
        letters = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
        letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        letters.decoder = decoders.Fuse()
        letters.add_special_tokens([PAD, START, EOS])
        put_around(letters, None, EOS)
        return Tokenizer(letters, {"pad_token": PAD, "bos_token": START, "eos_token": EOS})

    @property
    def network(self) -> TransformerConfig:
        """Pre-norm, which a rate this high requires."""
        size = {"width": self.width, "depth": self.depth, "heads": 4}
        return TransformerConfig.small(29, **size, norm_first=True, final_norm=True, dropout=0.0)

    def method(self) -> Translation:
        return Translation(self.network)

    def optimizer(self) -> Optimizer:
        return Optimizer(adam(warmup_cosine(self.learning_rate, self.steps, self.warmup)), clip_norm=1.0)

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = jax.ShapeDtypeStruct((self.batch_size, self.longest + 1), jnp.int32)
        return {"input_ids": shape, "labels": shape}

    def train_data(self) -> Pipeline:
        texts = self.strings[0]
        ids, _ = self.tokenizer(texts, length=self.longest + 1)
        labels, counted = self.tokenizer([text[::-1] for text in texts], length=self.longest + 1)
        source = ArraySource(input_ids=ids, labels=np.where(counted, labels, IGNORED), name="strings")
        return Pipeline(
            source,
            self.batch_size,
            seed=self.seed,
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluations(self) -> tuple[Evaluation, ...]:
        texts, config = self.strings[1], self.network
        ids, mask = self.tokenizer(texts, length=self.longest + 1)
        greedy = GenerationOptions(max_new_tokens=self.longest + 1, eos=(config.eos,), pad=config.pad)
        evaluation = TranslationEvaluation(
            name="reversal",
            decodable=TransformerDecodable(config),
            inputs={"input_ids": ids, "attention_mask": mask},
            sources=texts,
            references=[text[::-1] for text in texts],
            decode=self.tokenizer.decode,
            options={"greedy": greedy},
            tokenize="char",
            batch_size=250,
            final_step=self.steps,
        )
        return (evaluation,)

    def model(self) -> tuple[str, TransformerConfig]:
        return "transformer", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        return save_tokenizer(self.tokenizer, workdir)
