"""BertModel: sentence vectors, masked words, classes of texts, tags of words, answers out of a text."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.features import batched
from mmjax.interface.inputs import TEXTS, Input, check_ids
from mmjax.interface.model import LENGTHS, Model, top_k_labels
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.bert.sentences import sentence_fields
from mmjax.nn.norm import l2_normalize
from mmjax.text.answer_spans import best_answers, windows
from mmjax.text.tagged_words import word_sequences, words_of
from mmjax.text.wordpiece import WordPieceTokenizer, fitting
from mmjax.types import Array, ArrayLike, Float, Int


class BertModel(Model):
    """A BERT with its weights; `tokenizer` is a `mmjax.text.wordpiece.WordPieceTokenizer`."""

    system: ClassVar[str] = "bert"
    config_class: ClassVar[type] = BertConfig
    classified: ClassVar[Literal["image", "text"]] = "text"

    @classmethod
    def build(cls, config: BertConfig) -> Bert:
        return Bert(config)

    @classmethod
    def inputs(cls, config: BertConfig) -> Mapping[str, Input]:
        return TEXTS | {"token_type_ids": Input("b l")}

    @classmethod
    def example(cls, config: BertConfig) -> dict[str, jax.ShapeDtypeStruct]:
        return {"input_ids": jax.ShapeDtypeStruct((1, min(config.positions, 8)), jnp.int32)}

    def id_counts(self) -> Mapping[str, int]:
        return {"input_ids": self.config.vocab_size, "token_type_ids": max(self.config.types, 1)}

    @classmethod
    def num_classes(cls, config: BertConfig) -> int:
        return config.classes or config.token_classes

    @classmethod
    def folder_fields(cls, folder: pathlib.Path) -> dict[str, Any]:
        return sentence_fields(folder)

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> WordPieceTokenizer | None:
        """tokenizer.json, or vocab.txt beside where it would be."""
        return WordPieceTokenizer.from_file_or_vocab(file)

    @property
    def abilities(self) -> tuple[str, ...]:
        c = self.config
        heads = {"classify": c.classes, "tag": c.token_classes, "answer": c.spans, "fill_mask": c.mlm}
        return tuple(name for name in super().abilities if heads.get(name, True))

    # ----------------------------------------------------------------------------------------------------------- arrays

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """From input_ids [b, l], and if there are any attention_mask and token_type_ids [b, l]: transformers' names.

        last_hidden_state [b, l, d], hidden_states, pooler_output [b, d]; of classes or token classes logits; of spans
        start_logits and end_logits [b, l]; of masked words and next sentences prediction_logits [b, l, v] and
        seq_relationship_logits [b, 2], called logits where no other head has logits.
        """
        arrays = (inputs.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
        out: Any = self.module.apply(variables, *arrays)
        result = {"last_hidden_state": out["states"][-1], "hidden_states": tuple(out["states"])}
        if "pooled" in out:
            result["pooler_output"] = out["pooled"]
        heads = {"prediction_logits": "mlm_logits", "seq_relationship_logits": "nsp_logits"}
        logits = {name: out[key] for name, key in heads.items() if key in out}
        if "logits" in out or "token_logits" in out:
            logits["logits"] = out["logits"] if "logits" in out else out["token_logits"]
        elif len(logits) == 1:
            logits = {"logits": next(iter(logits.values()))}
        if "span_logits" in out:
            logits |= {"start_logits": out["span_logits"][..., 0], "end_logits": out["span_logits"][..., 1]}
        return result | logits

    @functools.cached_property
    def _sentences(self) -> Callable[..., Array]:
        """(variables, ids, mask, types) -> the pooled states of a text's tokens, special ones too, of unit length."""

        def encode(variables: Any, ids: Array, mask: Array, types: Array) -> Array:
            out: Any = self.module.apply(variables, ids, mask, types)
            states, keep = out["states"][-1].astype(jnp.float32), mask.astype(bool)[..., None]
            if self.config.pooling == "cls":
                pooled = states[:, 0]
            elif self.config.pooling == "max":
                pooled = jnp.max(jnp.where(keep, states, -jnp.inf), axis=1)
            else:
                pooled = jnp.sum(jnp.where(keep, states, 0), axis=1) / jnp.maximum(keep.sum(1), 1)
            return l2_normalize(pooled)

        return jax.jit(encode)

    @functools.cached_property
    def _words(self) -> Callable[..., Array]:
        """(variables, ids, mask, types, positions [b, m]) -> log probabilities of words there [b, m, v]."""

        def name(variables: Any, ids: Array, mask: Array, types: Array, positions: Array) -> Array:
            out: Any = self.module.apply(variables, ids, mask, types, positions)
            return jax.nn.log_softmax(out["mlm_logits"])

        return jax.jit(name)

    # ------------------------------------------------------------------------------------------------------------ texts

    def encode_text(
        self, texts: str | Sequence[str] | ArrayLike, batch_size: int = 64, length: int | None = None
    ) -> Float[Array, "b d"]:
        """Unit-norm sentence vectors, as of sentence-transformers: the last states of a text's tokens, pooled as the
        config's `pooling` says; all-MiniLM-L6-v2 takes their mean.

        texts: strings, or ids [b, l] without padding.
        length: the tokens of a string, at most; None: the config's `sentence_length`.
        Raises MmjaxError for ids that do not exist.
        """
        if isinstance(texts, np.ndarray | jax.Array) and texts.dtype.kind in "iu":
            inputs = {"input_ids": np.asarray(texts, np.int32)}
            check_ids(inputs, self.id_counts())
            inputs |= {"attention_mask": np.ones_like(inputs["input_ids"])}
            inputs |= {"token_type_ids": np.zeros_like(inputs["input_ids"])}
        else:
            inputs = self._encoded(texts, None, length or self.config.sentence_length)
        return batched(functools.partial(self._sentences, self.variables), batch_size, *inputs.values())

    def fill_mask(self, texts: str | Sequence[str], top: int = 5) -> list[list[tuple[str, float]]]:
        """For each [MASK], in the order of the texts, the most probable pieces and their probabilities, best first.

        Raises MmjaxError: no head for it, no tokenizer, or a text without a [MASK].
        """
        if not self.config.mlm:
            raise MmjaxError("this BERT has no head for masked words (mlm=False)")
        inputs = self._encoded(texts)
        masks = inputs["input_ids"] == self._tokenizer.mask
        counts = masks.sum(1)
        if not counts.all():
            where = int(np.argmin(counts))
            raise MmjaxError(f"text {where} has no [MASK] among its first {self.config.positions} tokens")
        positions = np.argsort(~masks, axis=1, kind="stable")[:, : counts.max()].astype(np.int32)
        logs = self._words(self.variables, *inputs.values(), positions)
        values, ids = jax.lax.top_k(logs, min(top, self.config.vocab_size))
        values, ids, name = np.exp(np.asarray(values)), np.asarray(ids), self._tokenizer.tokenizer.id_to_token
        rows = [(row, mask) for row, count in enumerate(counts) for mask in range(count)]
        return [[(name(int(id)) or "", float(p)) for id, p in zip(ids[at], values[at])] for at in rows]

    def classify(
        self,
        texts: str | Sequence[str],
        labels: Sequence[str] | None = None,
        pairs: str | Sequence[str] | None = None,
        top: int = 5,
    ) -> list[list[tuple[str, float]]]:
        """The most probable classes of each text, or pair of texts, with their probabilities, the best first.

        labels: the names of the head's classes, in its order; None: `self.labels`, or their
        numbers. A head of one class gives a number instead of a probability.
        Raises MmjaxError: no such head, or another number of names than classes.
        """
        classes = self.config.classes
        if not classes:
            raise MmjaxError("this BERT has no head of classes (classes=0): it cannot classify texts")
        names = self.class_names(labels)
        logits = self.forward(**self._encoded(texts, pairs))["logits"]
        shares = logits if classes == 1 else jax.nn.softmax(logits)
        return top_k_labels(shares, names, top)

    def tag(
        self, sentences: Sequence[str] | Sequence[Sequence[str]], labels: Sequence[str] | None = None, length: int = 128
    ) -> list[list[tuple[str, str, float]]]:
        """Each word of each sentence with its most probable tag and that one's probability, read at its first piece.

        sentences: words each; a string is cut at blanks and punctuation, as BERT's tokenizer does it.
        labels: as of `classify`. length: tokens that are read together at most.
        Raises MmjaxError: no such head, another number of names than classes, or a sentence without words.
        """
        classes = self.config.token_classes
        if not classes:
            raise MmjaxError("this BERT has no head of classes of tokens (token_classes=0): it cannot tag words")
        names, tokenizer = self.class_names(labels), self._tokenizer
        words = [tokenizer.words(one) if isinstance(one, str) else list(one) for one in sentences]
        rows, inputs = word_sequences(words, tokenizer, min(length, self.config.positions))
        shares = np.asarray(jax.nn.softmax(self.forward(**inputs)["logits"]))
        best = zip(words, words_of(rows, shares.argmax(-1), len(words)), words_of(rows, shares.max(-1), len(words)))
        return [[(word, names[int(i)], p) for word, i, p in zip(*sentence)] for sentence in best]

    def answer(
        self,
        questions: str | Sequence[str],
        contexts: str | Sequence[str],
        top: int = 1,
        length: int = 384,
        stride: int = 128,
        longest: int = 30,
        null_threshold: float | None = None,
    ) -> list[list[tuple[str, float]]]:
        """For each question the best answers out of its context with their probabilities among 20, the best first.

        The options are those of `mmjax.text.answer_spans`. An empty list where no span fits them.
        """
        if not self.config.spans:
            raise MmjaxError("this BERT has no head that marks answers (spans=False)")
        questions, contexts = ([x] if isinstance(x, str) else list(x) for x in (questions, contexts))
        if len(questions) != len(contexts):
            raise MmjaxError(f"{len(questions)} questions for {len(contexts)} contexts")
        length, tokenizer = min(length, self.config.positions), self._tokenizer
        results = []
        for question, context in zip(questions, contexts):
            parts = windows(tokenizer, question, context, length, stride)
            longest_part = -(-max(len(part.ids) for part in parts) // LENGTHS) * LENGTHS
            inputs = tokenizer.batch([(part.ids, part.types) for part in parts], min(longest_part, length))
            out = self.forward(**inputs)
            starts, ends = (np.asarray(out[f"{end}_logits"]) for end in ("start", "end"))
            matches = best_answers(context, parts, starts, ends, 20, longest, null_threshold)
            shares = jax.nn.softmax(jnp.asarray([answer.score for answer in matches])).tolist() if matches else []
            results.append([(answer.text, share) for answer, share in zip(matches, shares)][:top])
        return results

    @property
    def _tokenizer(self) -> WordPieceTokenizer:
        return fitting(self.tokenizer, self.config.vocab_size, "BERT")

    def _encoded(self, texts: Any, pairs: Any = None, length: int | None = None) -> dict[str, Int[np.ndarray, "b l"]]:
        limit = min(length or self.config.positions, self.config.positions)
        return self._tokenizer(texts, pairs, limit, LENGTHS)
