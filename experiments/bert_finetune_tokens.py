"""Tunes any BERT to tag words: named entities, parts of speech.

    mmjax train experiments/bert_finetune_tokens.py --init_from bert-base-cased --data eng.train --test eng.testa
    mmjax evaluate workdirs/bert_finetune_tokens --task tags

Files have a word a line and its tag in the last column (CoNLL). Each word is tokenized separately; its first piece has
the tag, the others are ignored (BERT paper, section 5.3). Without --data: the documentation of functions in Python's
own standard library, with the words tagged that are parameters in the function's signature. The chance level is a
lexicon's: each word with the tag that it most often had in training. There BERT-tiny (2 layers, 128 wide) with
--learning_rate 3e-4 and --length 64 gets an F1 of 56.8 (95 % interval 48.6 to 67.0) on held-out modules, and the
lexicon 48.3 (Python 3.11).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import mmjax
from mmjax.data.stdlib_tasks import parameter_words
from mmjax.evaluation.entities import TagsEvaluation, lexicon_tags
from mmjax.models.bert.finetune import TokenClassification
from mmjax.recipes.bert import FineTuningRecipe
from mmjax.text.tagged_words import TaggedWords, read_columns, tag_names, tagged_columns
from mmjax.training.experiment import Evaluation


@dataclasses.dataclass(frozen=True)
class Config(FineTuningRecipe[TaggedWords]):
    """The values are among those that the paper lists for all tasks.

    Attributes:
        word, tag: numbers of columns, from 0, or from the end below 0.
    """

    steps: int = 360
    word: int = 0
    tag: int = -1

    load = staticmethod(mmjax.load)

    def read(self, file: str) -> Sequence[TaggedWords]:
        return read_columns(file, self.word, self.tag)

    def default_examples(self) -> Sequence[TaggedWords]:
        return parameter_words()

    def drawn_with(self, example: TaggedWords) -> str:
        return example.group

    @functools.cached_property
    def tags(self) -> tuple[str, ...]:
        train, held_out = self.examples
        return tag_names(train if self.test else [*train, *held_out])

    @property
    def class_labels(self) -> tuple[str, ...]:
        return self.tags

    @property
    def heads(self) -> dict[str, Any]:
        return {"pooler": False, "token_classes": len(self.tags)}

    @functools.cached_property
    def train_columns(self) -> Mapping[str, np.ndarray]:
        return tagged_columns(self.examples[0], self.tokenizer, self.length, self.tags)[1]

    def method(self) -> TokenClassification:
        return TokenClassification(self.network)

    def evaluations(self) -> tuple[Evaluation, ...]:
        train, held_out = self.examples
        sequences, columns = tagged_columns(held_out, self.tokenizer, self.length, self.tags)
        del columns["labels"]
        guess = lexicon_tags(train, [sentence.words for sentence in held_out])
        evaluation = TagsEvaluation(
            logits=self.method().predict,
            columns=columns,
            sequences=sequences,
            tags=self.tags,
            sentences=held_out,
            guess=guess,
            final_step=self.steps,
        )
        return (evaluation,)
