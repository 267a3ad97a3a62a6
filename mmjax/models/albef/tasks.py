"""AlbefModel: features, matching, classes of texts with images, and answers out of a list."""

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
    """Answers to each question out of one list.

    states: what the encoder made of question and image. start_logits: of the first word. losses: summed over the words
    of each of the k answers with the most probable first word, in that order; places: in the list, the best first;
    probabilities: over the k.
    """

    states: Float[Array, "b l d"]
    start_logits: Float[Array, "b v"]
    losses: Float[Array, "b k"]
    places: Int[Array, "b k"]
    probabilities: Float[Array, "b k"]


class AlbefModel(ImageTextModel):
    """An ALBEF with its weights; `tokenizer` is a `mmjax.text.wordpiece.WordPieceTokenizer`. Its files hold none: put
    bert-base-uncased's vocab.txt beside them.

    Texts are cleaned as the original does (`mmjax.text.captions`) and read as [CLS] text, without [SEP]; ids [b, l] in
    their place are taken as they are, all of them tokens.

    stats: with `config.holds_state` "momentum" (parameters) and "queue" {"image", "text" [q, e], "cursor", of retrieval
    also "ids" [q, 1]}, so that an export writes back what was read.
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
        """Also the momentum encoders and the queues, where the file held them."""
        told: dict[str, Any] = {"params": self.params, "stats": {}}
        momentum, queue = self.stats.get("momentum"), dict(self.stats.get("queue", {}))
        if momentum:
            told["ema"] = momentum
        if queue:
            cursor = queue.pop("cursor")
            told["queues"] = {name: {"keys": keys, "cursor": cursor} for name, keys in queue.items()}
        return told

    @classmethod
    def default_preprocess(cls, config: AlbefConfig, layout: str) -> ImagePreprocessing:
        """Stretched to the square, bicubic; CLIP's means and deviations (dataset/__init__.py)."""
        return ImagePreprocessing.albef(config.vision.image_size[0])

    @classmethod
    def num_classes(cls, config: AlbefConfig) -> int:
        return config.classes

    @classmethod
    def default_labels(cls, config: AlbefConfig) -> tuple[str, ...]:
        """Of NLVR2 for two images, of SNLI-VE (dataset/ve_dataset.py:14) for one."""
        labels = ("False", "True") if config.two_images else ("contradiction", "neutral", "entailment")
        return labels if config.classes == len(labels) else ()

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> WordPieceTokenizer | None:
        """tokenizer.json, or vocab.txt beside where it would be."""
        return WordPieceTokenizer.from_file_or_vocab(file)

    @property
    def abilities(self) -> tuple[str, ...]:
        c = self.config
        heads = {"match": c.matching, "entails": c.classes, "answer": c.decoder}
        heads |= dict.fromkeys(("retrieve", "encode_image", "encode_text"), c.embed_dim)
        return tuple(name for name in super().abilities if heads.get(name, True))

    # ----------------------------------------------------------------------------------------------------------- arrays

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Of images alone vision_model_output and, where texts are compared with images, image_embeds; of texts alone
        text_model_output and text_embeds; of both besides logits_per_image and logits_per_text, and of the i-th image
        with the i-th text last_hidden_state [b, l, d] and what the heads say of it: itm_score [b, 2],
        prediction_logits [b, l, v] of words, assignment_logits [b, 3]: the first image's, the second's or neither's,
        logits [b, c] of classes or, of decoder_input_ids, [b, t, v] of words.

        pixel_values of pairs: [2 b, height, width, 3], the first images of all, then the second ones.
        """
        c, told = self.config, dict[str, Any]()

        def ask(name: str, *given: Any) -> Any:
            return self.module.apply(variables, *given, method=name)

        tokens: list[Array] = []
        mask = inputs.get("attention_mask")
        if "pixel_values" in inputs:
            tokens = [ask("encode_image", x) for x in _images(inputs["pixel_values"], c) if x is not None]
            told["vision_model_output"] = {"last_hidden_state": jnp.concatenate(tokens)}
            told |= {"image_embeds": ask("image_embeds", tokens[0])} if c.embed_dim else {}
        if "input_ids" in inputs:
            states = ask("encode_text", inputs["input_ids"], mask)
            told["text_model_output"] = {"last_hidden_state": states}
            told |= {"text_embeds": ask("text_embeds", states)} if c.embed_dim else {}
        if not tokens or "input_ids" not in inputs:
            return told
        if c.embed_dim:
            cosines = similarities(told["image_embeds"], told["text_embeds"])
            logits = cosines / variables["params"]["temperature"]
            told |= {"logits_per_image": logits, "logits_per_text": logits.T}
        if len(tokens[0]) != len(states):
            raise MmjaxError(f"{len(tokens[0])} images and {len(states)} texts: ALBEF reads them in pairs")
        states = ask("encode_multimodal", states, mask, *tokens)
        told["last_hidden_state"] = states
        told |= {"itm_score": ask("itm_logits", states)} if c.matching else {}
        told |= {"prediction_logits": ask("mlm_logits", states)} if c.text.mlm else {}
        told |= {"assignment_logits": ask("assign", states)} if c.assigning else {}
        told |= {"logits": ask("classify", states)} if c.classes else {}
        if c.decoder is not None and "decoder_input_ids" in inputs:
            answers = inputs["decoder_input_ids"], inputs.get("decoder_attention_mask")
            told["logits"] = ask("decode", *answers, states, mask)
        return told

    @functools.cached_property
    def _asked(self) -> Callable[..., Any]:
        """(variables, names, *arrays) -> what methods of the network with these names make of arrays, in turn."""

        def ask(variables: Any, names: tuple[str, ...], *arrays: Array) -> Any:
            for name in names:
                arrays = (self.module.apply(variables, *arrays, method=name),)  # type: ignore[assignment]
            return arrays[0]

        return jax.jit(ask, static_argnums=1)

    @functools.cached_property
    def _judged(self) -> Callable[..., Array]:
        """(variables, "itm_logits" or "classify", ids, mask, *images) -> logits of the i-th text and its image."""

        def judge(variables: Any, head: str, ids: Array, mask: Array, *images: Array) -> Any:
            def ask(name: str, *given: Any) -> Any:
                return self.module.apply(variables, *given, method=name)

            states = ask("encode_text", ids, mask)
            return ask(head, ask("encode_multimodal", states, mask, *(ask("encode_image", one) for one in images)))

        return jax.jit(judge, static_argnums=1)

    # ------------------------------------------------------------------------------------------------ images and texts

    def encode_image(self, images: Any, batch_size: int = 32) -> Float[Array, "b e"]:
        """Unit-norm features of images as `preprocess` takes them, or of pixel values [b, height, width, 3].

        Raises MmjaxError for a network that compares nothing.
        """
        self._check_compares()
        ask = functools.partial(self._asked, self.variables, ("encode_image", "image_embeds"))
        return batched(ask, batch_size, self.pixels(images))

    def encode_text(
        self, texts: str | Sequence[str] | ArrayLike, batch_size: int = 64, length: int = 30
    ) -> Float[Array, "b e"]:
        """Unit-norm features of strings, or of ids. length: tokens of a string; the rest is cut.

        Raises MmjaxError for a network that compares nothing, or strings without a tokenizer.
        """
        self._check_compares()
        ask = functools.partial(self._asked, self.variables, ("encode_text", "text_embeds"))
        return batched(ask, batch_size, *self._columns(texts, albef_caption, length))

    def match(self, images: Any, texts: str | Sequence[str] | ArrayLike, batch_size: int = 32) -> Float[Array, "b"]:
        """The probability that the i-th text belongs to the i-th image, by the head that matches.

        Raises MmjaxError: no such head, or not a text for each image.
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
        """The most probable classes of the i-th image with the i-th text, with their probabilities, the best first: of
        SNLI-VE whether the image entails the text, of NLVR2 whether the text is true of two images.

        other_images: the second ones, of a network for pairs. Classes without names have their numbers.
        Raises MmjaxError: no such head, not a text for each image, or second images where there should be none.
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

        rerank: so many of the nearest, at least k, are read again together with the query and ranked by the head that
        matches: (index, its logit of class 1), which is the order of ALBEF's own evaluation (128 of Flickr30k, 256 of
        COCO). The tokens of all images are kept for it: 1.8 MB each at 384 pixels.
        Raises MmjaxError: nothing compares or matches, or rerank of other than images with texts.
        """
        if not rerank:
            return super().retrieve(queries, candidates, k)
        self._check_compares()
        self._check_matches()
        of_texts = are_texts(queries)
        if of_texts == are_texts(candidates) or are_features(queries) or are_features(candidates):
            raise MmjaxError("rerank: queries and candidates should be images and texts, or texts and images")
        images, texts = (candidates, queries) if of_texts else (queries, candidates)
        ask, (ids, mask) = functools.partial(self._asked, self.variables), self._columns(texts, albef_caption, 30)
        tokens = batched(functools.partial(ask, ("encode_image",)), batch_size, self.pixels(images))
        states = batched(functools.partial(ask, ("encode_text",)), batch_size, ids, mask)
        cosines = similarities(ask(("text_embeds",), states), ask(("image_embeds",), tokens))
        cosines = cosines if of_texts else cosines.T
        near = np.asarray(jax.lax.top_k(cosines, min(max(rerank, k), cosines.shape[1]))[1])
        rows = np.broadcast_to(np.arange(len(near))[:, None], near.shape)
        image, text = (near, rows) if of_texts else (rows, near)

        def fuse(image: np.ndarray, text: np.ndarray) -> Array:
            return ask(("encode_multimodal", "itm_logits"), states[text], mask[text], tokens[image])[:, 1]

        logits = batched(fuse, batch_size, image.ravel(), text.ravel()).reshape(near.shape)
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
        """(ids, mask) of strings, or of ids. length: of all; None: that of the longest, or the network's positions."""
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
        """Of the i-th text with the i-th images."""
        columns, pixels = self._columns(texts, albef_caption), [self.pixels(one) for one in images]
        counts = [len(one) for one in pixels]
        if any(count != len(columns[0]) for count in counts):
            raise MmjaxError(f"{' and '.join(map(str, counts))} images for {len(columns[0])} texts")
        return batched(functools.partial(self._judged, self.variables, head), batch_size, *columns, *pixels)

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
        """For each question about its image the best of some answers with their probabilities, the best first.

        answers: all that can be said (VQA: the 3,128 of answer_list.json). k: see `rank`.
        Raises MmjaxError: a network that writes nothing, no tokenizer, no answers, or not an image for each question.
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
            told = self.rank(pixels, ids, mask, choices["input_ids"], choices["attention_mask"], k)
            return told.places, told.probabilities

        places, shares = (x.tolist() for x in batched(rank, batch_size, pixels, *columns))
        return [[(names[i], p) for i, p in zip(*row)][:top] for row in zip(places, shares)]

    def rank(
        self,
        pixel_values: ArrayLike,
        input_ids: ArrayLike,
        attention_mask: ArrayLike,
        answer_ids: ArrayLike,
        answer_mask: ArrayLike,
        k: int = 128,
    ) -> Ranking:
        """Answers out of one list, [n, t] ids from [CLS] to [SEP], for questions [b, l] (model_vqa.py:149-206).

        The k answers with the most probable first word are told apart by log p(first word) + log p(all words): as in
        the original the first word counts twice. Raises MmjaxError for a network that writes nothing.
        """
        self._check_writes()
        given = (jnp.asarray(x) for x in (pixel_values, input_ids, attention_mask, answer_ids, answer_mask))
        return self._ranked(self.variables, *given, min(k, len(answer_ids)))

    def _check_writes(self) -> None:
        if self.config.decoder is None:
            raise MmjaxError("this ALBEF has no decoder: answers are those of one fine-tuned for VQA")

    @functools.cached_property
    def _ranked(self) -> Any:
        def ask(variables: Any, name: str, *given: Any) -> Any:
            return self.module.apply(variables, *given, method=name)

        def ranked(
            variables: Any, pixels: Array, ids: Array, mask: Array, answers: Array, kept: Array, k: int
        ) -> Ranking:
            states = ask(variables, "encode_text", ids, mask)
            states = ask(variables, "encode_multimodal", states, mask, ask(variables, "encode_image", pixels))
            start = jnp.broadcast_to(answers[:1, :1], (len(ids), 1))
            start_logits = ask(variables, "decode", start, None, states, mask)[:, 0]
            first = jax.nn.log_softmax(start_logits)[:, answers[:, 1]]  # [b, n]
            begun, places = jax.lax.top_k(first, k)

            def rows(x: Array) -> Array:
                return jnp.repeat(x, k, axis=0)

            chosen, chosen_mask = (x[places].reshape(-1, x.shape[1]) for x in (answers, kept))
            logits = ask(variables, "decode", chosen, chosen_mask, rows(states), rows(mask))
            after = jnp.where(chosen_mask == 1, chosen, IGNORED)[:, 1:]
            losses = text_cross_entropy(logits[:, :-1], after).reshape(-1, k)
            probabilities, order = jax.lax.top_k(jax.nn.softmax(begun - losses), k)
            return Ranking(states, start_logits, losses, jnp.take_along_axis(places, order, 1), probabilities)

        return jax.jit(ranked, static_argnums=6)


def _images(pixels: Array, config: AlbefConfig) -> tuple[Array, Array | None]:
    """The images of texts, and of pairs the second ones. Raises MmjaxError for an odd number of these."""
    if not config.two_images:
        return pixels, None
    if len(pixels) % 2:
        raise MmjaxError(f"{len(pixels)} images: of pairs there are the first ones of all, then the second ones")
    half = len(pixels) // 2
    return pixels[:half], pixels[half:]
