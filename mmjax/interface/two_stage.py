"""TwoStageModel, the base of models that encode images and texts apart, and then a pair of them together."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.errors import MmjaxError
from mmjax.evaluation.features import batched
from mmjax.evaluation.rerank import nearest
from mmjax.evaluation.two_stage import TwoStages
from mmjax.interface.image_text import ImageTextModel, are_features, are_texts, ranked
from mmjax.interface.inputs import check_ids
from mmjax.interface.model import LENGTHS, top_k_labels
from mmjax.text.captions import TextRules, caption_columns
from mmjax.text.wordpiece import WordPieceTokenizer, fitting
from mmjax.types import Array, ArrayLike, Float, Int


class TwoStageModel(ImageTextModel):
    """Features, matching, classes of pairs, and retrieval: ALBEF, BLIP, and the first stage of BLIP-2.

    A subclass sets the class attributes, and its network has these methods, all in evaluation:

        encode_image(pixels) -> image states            encode_text(ids, mask) -> text states
        image_embeds(image states) -> features          text_embeds(text states) -> features
        encode_pair(ids, mask, text states, *image states) -> pair states: from the ids (BLIP) or the states (ALBEF)
        itm_logits(pair states) -> [b, 2]               classify(pair states) -> [b, c]

    Its config has, by the heads that the network has,
    `embed_dim`, the features' width, `matching`, whether it has an ITM head, `classes`, the number of classes of pairs
    (0: none), and `two_images`, whether those are of two images.

    `tokenizer` is a `mmjax.text.wordpiece.WordPieceTokenizer`. Ids [b, l] are used unchanged; every one of them counts
    as a token.
    """

    rules: ClassVar[TextRules]
    """How strings become ids."""
    add_similarity: ClassVar[bool] = False
    """Whether reranking adds the similarity to the ITM head's logit: not in ALBEF, but in BLIP and BLIP-2."""

    @property
    def abilities(self) -> tuple[str, ...]:
        c = self.config
        heads: dict[str, Any] = {"match": c.matching, "classify_pairs": c.classes}
        heads |= dict.fromkeys(("retrieve", "encode_image", "encode_text"), c.embed_dim)
        return tuple(name for name in super().abilities if heads.get(name, True))

    def apply(self, variables: Mapping[str, Any], name: str, *arrays: Any) -> Any:
        """The output of the network's method of this name, in evaluation; pure."""
        return self.module.apply(variables, *arrays, method=name)

    @property
    def text_config(self) -> Any:
        """The config of the encoder of captions and questions, which has `vocab_size` and `positions`."""
        return self.config.text

    def id_counts(self) -> Mapping[str, int]:
        return dict.fromkeys(("input_ids", "decoder_input_ids"), self.text_config.vocab_size)

    @functools.cached_property
    def stages(self) -> TwoStages:
        """The two stages of retrieval, compiled."""
        return TwoStages(self.apply, batch_size=32, similarity=self.similarity)

    # -------------------------------------------------------------------------------------------------------- features

    def encode_image(self, images: Any, batch_size: int = 32) -> Float[Array, "b e"]:
        """Unit-norm features of images as `preprocess` takes them, or of pixel values [b, height, width, 3].

        Raises MmjaxError for a network without projections.
        """
        self._check_features()
        return self.stages.image_features(self.variables, self.pixels(images), batch_size)

    def encode_text(
        self, texts: str | Sequence[str] | ArrayLike, batch_size: int = 64, length: int | None = None
    ) -> Float[Array, "b e"]:
        """Unit-norm features of strings, or of ids. length: the tokens of a string, at most; None: `rules.length`.

        Raises MmjaxError for a network without projections, or strings without a tokenizer.
        """
        self._check_features()
        columns = self.columns(texts, length or self.rules.length)
        return self.stages.text_features(self.variables, *columns, batch_size)

    def columns(
        self, texts: Any, length: int | None = None, question: bool = False
    ) -> tuple[Int[np.ndarray, "b l"], Int[np.ndarray, "b l"]]:
        """(ids, mask) of captions or questions, or of ids.

        length: the number of columns. None: the length of the longest text, at most the network's positions.
        Raises MmjaxError for no text, strings without a tokenizer that fits, or ids that do not exist.
        """
        if are_texts(texts) and isinstance(texts, np.ndarray | jax.Array):
            ids = np.asarray(texts, np.int32)
            check_ids({"input_ids": ids}, self.id_counts())
            return ids, np.ones_like(ids)
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise MmjaxError("texts: there is none")
        tokenizer, positions = self.fitting_tokenizer(), self.text_config.positions
        clean = self.rules.question if question else self.rules.caption
        longest, multiple = (positions, LENGTHS) if length is None else (min(length, positions), None)
        columns = caption_columns(tokenizer, [clean(text) for text in texts], longest, self.rules.sep, multiple)
        return columns["input_ids"], columns["attention_mask"]

    def fitting_tokenizer(self) -> WordPieceTokenizer:
        """The tokenizer. Raises MmjaxError where there is none, or one with more ids than embeddings."""
        return fitting(self.tokenizer, self.text_config.vocab_size, self.system)

    # ----------------------------------------------------------------------------------------------------------- pairs

    def match(self, images: Any, texts: str | Sequence[str] | ArrayLike, batch_size: int = 32) -> Float[Array, "b"]:
        """The probability that the i-th text belongs to the i-th image, from the ITM head.

            model.match([image, image], ["a red hen", "a boat"])       # [0.97, 0.01]

        Raises MmjaxError for a network without an ITM head, or unless there is one text for each image.
        """
        self._check_matching()
        return jax.nn.softmax(self.pair_logits("itm_logits", texts, batch_size, images))[:, 1]

    def classify_pairs(
        self,
        images: Any,
        texts: str | Sequence[str] | ArrayLike,
        other_images: Any = None,
        top: int = 3,
        batch_size: int = 32,
    ) -> list[list[tuple[str, float]]]:
        """The most probable classes of the i-th image with the i-th text, as (name, probability), the best first.

        SNLI-VE: whether the image entails the text. NLVR2: whether the text is true of two images.

        other_images: the second images, for a network of two images. A class without a name is named by its number.
        Raises MmjaxError for a network without a classifier, unless there is one text for each image, or for second
        images where the network takes one.
        """
        c = self.config
        if not c.classes:
            raise MmjaxError(f"this {self.system} has no head of classes (classes=0): SNLI-VE's or NLVR2's have one")
        if c.two_images != (other_images is not None):
            count = "two images" if c.two_images else "one image"
            raise MmjaxError(f"other_images: this {self.system} classifies texts of {count}")
        logits = self.pair_logits("classify", texts, batch_size, images, *([other_images] if c.two_images else []))
        return top_k_labels(jax.nn.softmax(logits), self.class_names(), top)

    def pair_states(
        self, variables: Mapping[str, Any], ids: Array, mask: Array, *pixels: Array
    ) -> Float[Array, "b l d"]:
        """The states of the i-th text with its image(s); pure."""
        images = (self.apply(variables, "encode_image", one) for one in pixels)
        return self.apply(variables, "encode_pair", ids, mask, self.apply(variables, "encode_text", ids, mask), *images)

    @functools.cached_property
    def _compiled_pairs(self) -> Callable[..., Array]:
        def logits(variables: Any, head: str, *arrays: Array) -> Any:
            return self.apply(variables, head, self.pair_states(variables, *arrays))

        return jax.jit(logits, static_argnums=1)

    def pair_logits(self, head: str, texts: Any, batch_size: int, *images: Any) -> Float[Array, "b c"]:
        """Logits of the i-th text with the i-th image(s). head: "itm_logits" or "classify"."""
        columns, pixels = self.columns(texts), [self.pixels(one) for one in images]
        counts = [len(one) for one in pixels]
        if any(count != len(columns[0]) for count in counts):
            raise MmjaxError(f"{' and '.join(map(str, counts))} images for {len(columns[0])} texts")
        return batched(functools.partial(self._compiled_pairs, self.variables, head), batch_size, *columns, *pixels)

    # ------------------------------------------------------------------------------------------------------- retrieval

    def retrieve(
        self, queries: Any, candidates: Any, k: int = 5, rerank: int = 0, add_similarity: bool | None = None
    ) -> list[list[tuple[int, float]]]:
        """As `ImageTextModel.retrieve`: for each query the k nearest candidates as (index, cosine), the best first.

            model.retrieve("a red hen", images, k=5, rerank=128)

        rerank: how many of the nearest, at least k, are encoded again together with the query and ranked by the ITM
            head: (index, score), the order of the originals' own evaluation (128 for Flickr30k, 256 for COCO). It
            holds the states of all images in memory: 1.8 MB each at 384 pixels.
        add_similarity: whether the score is the head's logit of class 1 plus the similarity, or the logit alone; None:
            as in the system's original (`add_similarity` of the class).
        Raises MmjaxError for a network without projections or ITM head, or to rerank other than images with texts.
        """
        if not rerank:
            return super().retrieve(queries, candidates, k)
        self._check_features()
        self._check_matching()
        of_texts = are_texts(queries)
        if of_texts == are_texts(candidates) or are_features(queries) or are_features(candidates):
            raise MmjaxError("rerank: queries and candidates should be images and texts, or texts and images")
        images, texts = (candidates, queries) if of_texts else (queries, candidates)
        ids, mask = self.columns(texts, self.rules.length)
        columns = {"input_ids": ids, "attention_mask": mask}
        near, states = self.stages.first(self.pixels(images), columns, self.variables)
        near = np.asarray(near)
        shortlist = nearest(near.T if of_texts else near, max(rerank, k))
        query = np.indices(shortlist.shape)[0]
        image, text = (shortlist, query) if of_texts else (query, shortlist)
        add = self.add_similarity if add_similarity is None else add_similarity
        scores = self.stages.scorer(self.variables, states, image, text, similarities=near if add else None)
        best = ranked(jnp.asarray(scores), k)
        return [[(int(row[i]), score) for i, score in pairs] for row, pairs in zip(shortlist, best)]

    def _check_features(self) -> None:
        if not self.config.embed_dim:
            raise MmjaxError(
                f"this {self.system} has no projections (embed_dim=0): pre-trained ones and those of retrieval have"
            )

    def _check_matching(self) -> None:
        if not self.config.matching:
            raise MmjaxError(f"this {self.system} has no ITM head: pre-trained ones and those of retrieval have one")
