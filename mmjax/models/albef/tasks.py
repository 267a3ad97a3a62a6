"""AlbefModel: features, image-text matching, classification of image-text pairs, and answers from a list."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.image_text import ImageTextModel, are_features, are_texts, ranked, similarities
from mmjax.interface.inputs import IMAGES_AND_TEXTS, Input
from mmjax.interface.model import LENGTHS, batched, top_k_labels
from mmjax.models.albef.network import Albef, AlbefConfig
from mmjax.objectives.language import IGNORED, text_cross_entropy
from mmjax.text.captions import albef_caption, albef_question, caption_columns
from mmjax.text.wordpiece import WordPieceTokenizer, fitting
from mmjax.types import Array, ArrayLike, Float, Int


class Ranking(NamedTuple):
    """The ranking of one list of answers for each question.

    states: the multimodal encoder's hidden states of question and image. start_logits: logits of the first word.
    losses: the loss summed over the words of each of the k answers with the most probable first word, in that order.
    places: indices into the list, the best first. probabilities: over the k answers, in the order of `places`.
    """

    states: Float[Array, "b l d"]
    start_logits: Float[Array, "b v"]
    losses: Float[Array, "b k"]
    places: Int[Array, "b k"]
    probabilities: Float[Array, "b k"]


class AlbefModel(ImageTextModel):
    """A loaded ALBEF: image and text features, matching, pair classification, retrieval, and answers.

    `tokenizer` is a `mmjax.text.wordpiece.WordPieceTokenizer`. The published files hold none: put bert-base-uncased's
    vocab.txt beside them.

    Texts are cleaned as the original does (`mmjax.text.captions`) and encoded as [CLS] text, without [SEP]. Ids [b, l]
    are used unchanged; every one of them counts as a token.

    stats: with `config.holds_state`, "momentum" (parameters) and "queue" {"image", "text" [q, e], "cursor", for
    retrieval also "ids" [q, 1]}, so that an export writes back everything that was loaded.
    """

    system: ClassVar[str] = "albef"
    config_class: ClassVar[type] = AlbefConfig
    config: AlbefConfig

    @classmethod
    def build(cls, config: AlbefConfig) -> nn.Module:
        return Albef(config)

    @classmethod
    def inputs(cls, config: AlbefConfig) -> Mapping[str, Input]:
        decoder = {"decoder_input_ids": Input("texts t"), "decoder_attention_mask": Input("texts t")}
        return IMAGES_AND_TEXTS | (decoder if config.decoder else {})

    @classmethod
    def example(cls, config: AlbefConfig) -> dict[str, jax.ShapeDtypeStruct]:
        pixels = jax.ShapeDtypeStruct((2 if config.two_images else 1, *config.vision.image_size, 3), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids}

    @classmethod
    def shapes(cls, config: AlbefConfig) -> dict[str, Any]:
        module, inputs = Albef(config), cls.example(config)

        def init(rng: Any, inputs: Any) -> Any:
            images, other = _images(inputs["pixel_values"], config)
            return module.init(rng, images, inputs["input_ids"], inputs["attention_mask"], other_images=other)

        params = config.stored_params(jax.eval_shape(init, jax.random.key(0), inputs)["params"])
        if not config.holds_state:
            return {"params": params}
        stats: dict[str, Any] = {"momentum": {part: params[part] for part in config.momentum_parts if part in params}}
        if config.queue:
            keys = jax.ShapeDtypeStruct((config.queue, config.embed_dim), jnp.float32)
            stats["queue"] = {"image": keys, "text": keys, "cursor": jax.ShapeDtypeStruct((), jnp.int32)}
            if config.by_image:
                stats["queue"]["ids"] = jax.ShapeDtypeStruct((config.queue, 1), jnp.int32)
        return {"params": params, "stats": stats}

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.config.module_params(self.params)}

    def weights(self) -> dict[str, Any]:
        """{"params", "stats"}, and "ema" and "queues" where the file has momentum encoders and queues."""
        weights: dict[str, Any] = {"params": self.params, "stats": {}}
        momentum, queue = self.stats.get("momentum"), dict(self.stats.get("queue", {}))
        if momentum:
            weights["ema"] = momentum
        if queue:
            cursor = queue.pop("cursor")
            weights["queues"] = {name: {"keys": keys, "cursor": cursor} for name, keys in queue.items()}
        return weights

    @classmethod
    def default_preprocess(cls, config: AlbefConfig, layout: str) -> ImagePreprocessing:
        """Resized to a square, bicubic, with CLIP's means and deviations (dataset/__init__.py)."""
        return ImagePreprocessing.albef(config.vision.image_size[0])

    @classmethod
    def num_classes(cls, config: AlbefConfig) -> int:
        return config.classes

    @classmethod
    def default_labels(cls, config: AlbefConfig) -> tuple[str, ...]:
        """The labels of NLVR2 for two images, of SNLI-VE (dataset/ve_dataset.py:14) for one."""
        labels = ("False", "True") if config.two_images else ("contradiction", "neutral", "entailment")
        return labels if config.classes == len(labels) else ()

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> WordPieceTokenizer | None:
        """Reads tokenizer.json, or vocab.txt in the same folder."""
        return WordPieceTokenizer.from_file_or_vocab(file)

    @property
    def abilities(self) -> tuple[str, ...]:
        c = self.config
        heads = {"match": c.matching, "entails": c.classes, "answer": c.decoder}
        heads |= dict.fromkeys(("retrieve", "encode_image", "encode_text"), c.embed_dim)
        return tuple(name for name in super().abilities if heads.get(name, True))

    # ----------------------------------------------------------------------------------------------------------- arrays

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """The outputs that the inputs allow, by transformers' names.

        Images give vision_model_output and, with projections (`embed_dim`), image_embeds. Texts give text_model_output
        and, with projections, text_embeds. Images with texts also give logits_per_image and logits_per_text. The i-th
        image with the i-th text gives last_hidden_state [b, l, d] and the outputs of the heads: itm_score [b, 2],
        prediction_logits [b, l, v] of the MLM head, assignment_logits [b, 3] (first image, second image, neither),
        logits [b, c] of the classifier, or logits [b, t, v] of the decoder for decoder_input_ids.

        pixel_values of pairs: [2 b, height, width, 3], the first images of all pairs, then the second images.
        """
        c, outputs = self.config, dict[str, Any]()

        def apply(name: str, *arrays: Any) -> Any:
            return self.module.apply(variables, *arrays, method=name)

        tokens: list[Array] = []
        mask = inputs.get("attention_mask")
        if "pixel_values" in inputs:
            tokens = [apply("encode_image", x) for x in _images(inputs["pixel_values"], c) if x is not None]
            outputs["vision_model_output"] = {"last_hidden_state": jnp.concatenate(tokens)}
            outputs |= {"image_embeds": apply("image_embeds", tokens[0])} if c.embed_dim else {}
        if "input_ids" in inputs:
            states = apply("encode_text", inputs["input_ids"], mask)
            outputs["text_model_output"] = {"last_hidden_state": states}
            outputs |= {"text_embeds": apply("text_embeds", states)} if c.embed_dim else {}
        if not tokens or "input_ids" not in inputs:
            return outputs
        if c.embed_dim:
            cosines = similarities(outputs["image_embeds"], outputs["text_embeds"])
            logits = cosines / variables["params"]["temperature"]
            outputs |= {"logits_per_image": logits, "logits_per_text": logits.T}
        if len(tokens[0]) != len(states):
            raise MmjaxError(f"{len(tokens[0])} images and {len(states)} texts: ALBEF reads them in pairs")
        states = apply("encode_multimodal", states, mask, *tokens)
        outputs["last_hidden_state"] = states
        outputs |= {"itm_score": apply("itm_logits", states)} if c.matching else {}
        outputs |= {"prediction_logits": apply("mlm_logits", states)} if c.text.mlm else {}
        outputs |= {"assignment_logits": apply("assign", states)} if c.assigning else {}
        outputs |= {"logits": apply("classify", states)} if c.classes else {}
        if c.decoder is not None and "decoder_input_ids" in inputs:
            answers = inputs["decoder_input_ids"], inputs.get("decoder_attention_mask")
            outputs["logits"] = apply("decode", *answers, states, mask)
        return outputs

    @functools.cached_property
    def _apply_methods(self) -> Callable[..., Any]:
        """(variables, names, *arrays) -> the result of the network's methods of these names, applied in order."""

        def apply_methods(variables: Any, names: tuple[str, ...], *arrays: Array) -> Any:
            for name in names:
                arrays = (self.module.apply(variables, *arrays, method=name),)  # type: ignore[assignment]
            return arrays[0]

        return jax.jit(apply_methods, static_argnums=1)

    @functools.cached_property
    def _pair_logits(self) -> Callable[..., Array]:
        """(variables, "itm_logits" or "classify", ids, mask, *images) -> logits of the i-th text with its image(s)."""

        def pair_logits(variables: Any, head: str, ids: Array, mask: Array, *images: Array) -> Any:
            def apply(name: str, *arrays: Any) -> Any:
                return self.module.apply(variables, *arrays, method=name)

            states = apply("encode_text", ids, mask)
            return apply(
                head, apply("encode_multimodal", states, mask, *(apply("encode_image", one) for one in images))
            )

        return jax.jit(pair_logits, static_argnums=1)

    # ------------------------------------------------------------------------------------------------ images and texts

    def encode_image(self, images: Any, batch_size: int = 32) -> Float[Array, "b e"]:
        """Unit-norm features of images as `preprocess` takes them, or of pixel values [b, height, width, 3].

        Raises MmjaxError for a network without projections.
        """
        self._check_compares()
        encode = functools.partial(self._apply_methods, self.variables, ("encode_image", "image_embeds"))
        return batched(encode, batch_size, self.pixels(images))

    def encode_text(
        self, texts: str | Sequence[str] | ArrayLike, batch_size: int = 64, length: int = 30
    ) -> Float[Array, "b e"]:
        """Unit-norm features of strings, or of ids. length: the tokens of a string; longer ones are truncated.

        Raises MmjaxError for a network without projections, or strings without a tokenizer.
        """
        self._check_compares()
        encode = functools.partial(self._apply_methods, self.variables, ("encode_text", "text_embeds"))
        return batched(encode, batch_size, *self._columns(texts, albef_caption, length))

    def match(self, images: Any, texts: str | Sequence[str] | ArrayLike, batch_size: int = 32) -> Float[Array, "b"]:
        """The probability that the i-th text belongs to the i-th image, from the ITM head.

        Raises MmjaxError for a network without an ITM head, or unless there is one text for each image.
        """
        self._check_matches()
        return jax.nn.softmax(self._logits("itm_logits", texts, batch_size, images))[:, 1]

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
            raise MmjaxError("this ALBEF has no head of classes (classes=0): those fine-tuned on SNLI-VE or NLVR2 have")
        if c.two_images != (other_images is not None):
            raise MmjaxError(f"other_images: this ALBEF reads texts of {'two images' if c.two_images else 'one image'}")
        logits = self._logits("classify", texts, batch_size, images, *([other_images] if c.two_images else []))
        return top_k_labels(jax.nn.softmax(logits), self.class_names(), top)

    def retrieve(
        self, queries: Any, candidates: Any, k: int = 5, rerank: int = 0, batch_size: int = 32
    ) -> list[list[tuple[int, float]]]:
        """As `ImageTextModel.retrieve`: for each query the k nearest candidates as (index, cosine), the best first.

        rerank: how many of the nearest, at least k, are encoded again together with the query and ranked by the ITM
        head: (index, its logit of class 1), the order of ALBEF's own evaluation (128 for Flickr30k, 256 for COCO). It
        holds the tokens of all images in memory: 1.8 MB each at 384 pixels.
        Raises MmjaxError for a network without projections or ITM head, or to rerank other than images with texts.
        """
        if not rerank:
            return super().retrieve(queries, candidates, k)
        self._check_compares()
        self._check_matches()
        of_texts = are_texts(queries)
        if of_texts == are_texts(candidates) or are_features(queries) or are_features(candidates):
            raise MmjaxError("rerank: queries and candidates should be images and texts, or texts and images")
        images, texts = (candidates, queries) if of_texts else (queries, candidates)
        apply = functools.partial(self._apply_methods, self.variables)
        ids, mask = self._columns(texts, albef_caption, 30)
        tokens = batched(functools.partial(apply, ("encode_image",)), batch_size, self.pixels(images))
        states = batched(functools.partial(apply, ("encode_text",)), batch_size, ids, mask)
        cosines = similarities(apply(("text_embeds",), states), apply(("image_embeds",), tokens))
        cosines = cosines if of_texts else cosines.T
        near = np.asarray(jax.lax.top_k(cosines, min(max(rerank, k), cosines.shape[1]))[1])
        query_indices = np.broadcast_to(np.arange(len(near))[:, None], near.shape)
        image, text = (near, query_indices) if of_texts else (query_indices, near)

        def itm_scores(image: np.ndarray, text: np.ndarray) -> Array:
            return apply(("encode_multimodal", "itm_logits"), states[text], mask[text], tokens[image])[:, 1]

        logits = batched(itm_scores, batch_size, image.ravel(), text.ravel()).reshape(near.shape)
        return [[(int(near[i, j]), score) for j, score in row] for i, row in enumerate(ranked(logits, k))]

    def _check_compares(self) -> None:
        if not self.config.embed_dim:
            raise MmjaxError("this ALBEF has no features (embed_dim=0): pre-trained ones and those of retrieval have")

    def _check_matches(self) -> None:
        if not self.config.matching:
            raise MmjaxError("this ALBEF has no head that matches: pre-trained ones and those of retrieval have")

    def _columns(
        self, texts: Any, clean: Callable[[str], str], length: int | None = None
    ) -> tuple[Int[np.ndarray, "b l"], Int[np.ndarray, "b l"]]:
        """(ids, mask) of strings, or of ids.

        length: the number of columns. None: the length of the longest text, at most the network's positions.
        """
        if are_texts(texts) and isinstance(texts, np.ndarray | jax.Array):
            ids = np.asarray(texts, np.int32)
            return ids, np.ones_like(ids)
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise MmjaxError("texts: there is none")
        tokenizer, most = fitting(self.tokenizer, self.config.text.vocab_size, "ALBEF"), self.config.text.positions
        most, multiple = (most, LENGTHS) if length is None else (min(length, most), None)
        columns = caption_columns(tokenizer, [clean(text) for text in texts], most, False, multiple)
        return columns["input_ids"], columns["attention_mask"]

    def _logits(self, head: str, texts: Any, batch_size: int, *images: Any) -> Float[Array, "b c"]:
        """Logits of the i-th text with the i-th image(s)."""
        columns, pixels = self._columns(texts, albef_caption), [self.pixels(one) for one in images]
        counts = [len(one) for one in pixels]
        if any(count != len(columns[0]) for count in counts):
            raise MmjaxError(f"{' and '.join(map(str, counts))} images for {len(columns[0])} texts")
        return batched(functools.partial(self._pair_logits, self.variables, head), batch_size, *columns, *pixels)

    # --------------------------------------------------------------------------------------------------------- answers

    def answer(
        self,
        images: Any,
        questions: str | Sequence[str] | ArrayLike,
        answers: Sequence[str],
        top: int = 1,
        k: int = 128,
        batch_size: int = 4,
    ) -> list[list[tuple[str, float]]]:
        """For each question about its image the most probable answers, as (answer, probability), the best first.

        answers: the list to choose from (VQA: the 3,128 of answer_list.json). k: see `rank`.
        Raises MmjaxError for a network without a decoder, no tokenizer, no answers, or unless there is one image for
        each question.
        """
        self._check_writes()
        if isinstance(answers, str) or not len(answers):
            raise MmjaxError(f"answers: {answers!r} should be a list of strings to choose from")
        names = list(answers)
        columns = self._columns(questions, lambda text: albef_question(text, 50))
        pixels = self.pixels(images)
        if len(pixels) != len(columns[0]):
            raise MmjaxError(f"{len(pixels)} images for {len(columns[0])} questions")
        tokenizer, most = fitting(self.tokenizer, self.config.text.vocab_size, "ALBEF"), self.config.text.positions
        choices = caption_columns(tokenizer, names, most, sep=True, multiple=1)

        def rank(pixels: Array, ids: Array, mask: Array) -> tuple[Array, Array]:
            ranking = self.rank(pixels, ids, mask, choices["input_ids"], choices["attention_mask"], k)
            return ranking.places, ranking.probabilities

        indices, probabilities = (x.tolist() for x in batched(rank, batch_size, pixels, *columns))
        return [[(names[i], p) for i, p in zip(*row)][:top] for row in zip(indices, probabilities)]

    def rank(
        self,
        pixel_values: ArrayLike,
        input_ids: ArrayLike,
        attention_mask: ArrayLike,
        answer_ids: ArrayLike,
        answer_mask: ArrayLike,
        k: int = 128,
    ) -> Ranking:
        """Ranks one list of answers, [n, t] ids from [CLS] to [SEP], for questions [b, l] (model_vqa.py:149-206).

        The k answers with the most probable first word are ranked by log p(first word) + log p(all words): as in the
        original the first word counts twice. Raises MmjaxError for a network without a decoder.
        """
        self._check_writes()
        arrays = (jnp.asarray(x) for x in (pixel_values, input_ids, attention_mask, answer_ids, answer_mask))
        return self._ranked(self.variables, *arrays, min(k, len(answer_ids)))

    def _check_writes(self) -> None:
        if self.config.decoder is None:
            raise MmjaxError("this ALBEF has no decoder: answers are those of one fine-tuned for VQA")

    @functools.cached_property
    def _ranked(self) -> Any:
        def apply(variables: Any, name: str, *arrays: Any) -> Any:
            return self.module.apply(variables, *arrays, method=name)

        def ranked(
            variables: Any, pixels: Array, ids: Array, mask: Array, answers: Array, answer_mask: Array, k: int
        ) -> Ranking:
            states = apply(variables, "encode_text", ids, mask)
            states = apply(variables, "encode_multimodal", states, mask, apply(variables, "encode_image", pixels))
            start = jnp.broadcast_to(answers[:1, :1], (len(ids), 1))
            start_logits = apply(variables, "decode", start, None, states, mask)[:, 0]
            first_log_probs = jax.nn.log_softmax(start_logits)[:, answers[:, 1]]  # [b, n]
            start_log_probs, indices = jax.lax.top_k(first_log_probs, k)

            def repeat(x: Array) -> Array:
                return jnp.repeat(x, k, axis=0)

            chosen, chosen_mask = (x[indices].reshape(-1, x.shape[1]) for x in (answers, answer_mask))
            logits = apply(variables, "decode", chosen, chosen_mask, repeat(states), repeat(mask))
            labels = jnp.where(chosen_mask == 1, chosen, IGNORED)[:, 1:]
            losses = text_cross_entropy(logits[:, :-1], labels).reshape(-1, k)
            probabilities, order = jax.lax.top_k(jax.nn.softmax(start_log_probs - losses), k)
            return Ranking(states, start_logits, losses, jnp.take_along_axis(indices, order, 1), probabilities)

        return jax.jit(ranked, static_argnums=6)


def _images(pixels: Array, config: AlbefConfig) -> tuple[Array, Array | None]:
    """The first images, and the second images or None. Raises MmjaxError for an odd number of images of pairs."""
    if not config.two_images:
        return pixels, None
    if len(pixels) % 2:
        raise MmjaxError(f"{len(pixels)} images: of pairs there are the first ones of all, then the second ones")
    half = len(pixels) // 2
    return pixels[:half], pixels[half:]
