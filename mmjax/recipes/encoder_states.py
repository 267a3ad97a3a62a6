"""The data of recipes on two frozen encoders: drawings and their names, as states that are computed once.

Each thing has pictures and texts: OpenMoji's drawing, mirrored too, and its names; other vendors' drawings of it; and
the things of further tars of pictures with sentences. The held-out names are in none of them.
"""

import dataclasses
import functools
import hashlib
import io
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from grain import transforms
from PIL import Image

from mmjax import tree
from mmjax.data.cache import cache_folder, cached
from mmjax.data.mismatch import mismatched
from mmjax.data.openmoji import OpenMoji, load_openmoji
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource, Record
from mmjax.data.splits import is_held_out
from mmjax.data.vendor_emoji import drawn_by_all, load_vendor_emoji
from mmjax.data.webdataset import WebDataset
from mmjax.evaluation.features import Extractor
from mmjax.hub import load
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.objectives.language import IGNORED
from mmjax.recipes.image_text import EncoderStart
from mmjax.text.captions import albef_caption, caption_columns
from mmjax.text.training import train_wordpiece
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.initial_parts import resized_positions
from mmjax.types import Array, Float, Int, Params

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANDOM_VOCABULARY = 1500
MASKINGS = 4
"""Maskings of each text, from which the data samples one."""


class Pairs:
    """Things, each with its texts and pictures: `images` has the indices of a thing's `pictures`."""

    def __init__(self, texts: list[tuple[str, ...]], pictures: np.ndarray):
        self.texts, self.parts = texts, [pictures]
        self.images = [[i] for i in range(len(pictures))]

    def add(self, pictures: np.ndarray, owners: Iterable[int]) -> None:
        """Further pictures, of the things `owners`; things without a picture come in order."""
        start = sum(map(len, self.parts))
        self.parts.append(pictures)
        self.images.extend([] for _ in range(len(self.texts) - len(self.images)))
        for index, owner in enumerate(owners):
            self.images[owner].append(start + index)

    @property
    def pictures(self) -> np.ndarray:
        return np.concatenate(self.parts)


@dataclasses.dataclass(frozen=True, eq=False)
class SampleStates(transforms.RandomMap):
    """A record of indices -> the states of one of its pictures and of one of its captions.

    masked: the columns of maskings, [m, MASKINGS, ...]; {}: a record has none.
    """

    images: Float[np.ndarray, "n t d"]
    texts: Float[np.ndarray, "m l d"]
    columns: Mapping[str, np.ndarray]
    masked: Mapping[str, np.ndarray]

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        image, text = rng.choice(element["pictures"]), rng.choice(element["captions"])
        ids = {name: column[text] for name, column in self.columns.items()}
        if self.masked:
            variant = rng.integers(MASKINGS)
            ids |= {name: column[text, variant] for name, column in self.masked.items()}
        return {**ids, "image": self.images[image], "text": self.texts[text], "image_id": element["image_id"]}


def one_masked(columns: Mapping[str, np.ndarray], mask_id: int, seed: int) -> dict[str, np.ndarray]:
    """For each text [m, l] MASKINGS copies in which one piece, any but [CLS], is [MASK]: the names are too short for a
    share of 15 %. "input_ids", "attention_mask" [m, MASKINGS, l]; "masked_positions", "masked_labels" [m, MASKINGS, 1].
    """
    ids, mask = (np.repeat(columns[name][:, None], MASKINGS, 1) for name in ("input_ids", "attention_mask"))
    pieces = np.maximum(mask.sum(-1, keepdims=True) - 1, 1)
    positions = 1 + np.floor(np.random.default_rng(seed).random(pieces.shape) * pieces).astype(np.int32)
    present = np.take_along_axis(mask, positions, -1) == 1
    labels = np.where(present, np.take_along_axis(ids, positions, -1), IGNORED).astype(np.int32)
    np.put_along_axis(ids, positions, np.where(present, mask_id, np.take_along_axis(ids, positions, -1)), -1)
    return {"input_ids": ids, "attention_mask": mask, "masked_positions": positions, "masked_labels": labels}


def read_stamps(tar: str, size: int, known: Collection[str]) -> tuple[np.ndarray, list[str]]:
    """Pictures [n, size, size, 3] and captions; without a fifth, by the caption's hash, and those in `known`."""
    pictures, captions = [], []
    source = WebDataset(tar, needs=("image", "text"))
    for record in (source[i] for i in range(len(source))):
        caption = record["text"]
        if not is_held_out(caption, 0.2) and albef_caption(caption) not in known:
            with Image.open(io.BytesIO(record["image"])) as file:
                pictures.append(np.asarray(file.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
            captions.append(caption)
    return np.stack(pictures), captions


def cached_states(
    extract: Extractor, config: Any, params: Params, inputs: Any, content: bytes, shape: tuple[int, ...]
) -> Float[np.ndarray, "n ..."]:
    """An encoder's outputs for inputs of this content, float16, from the cache on disk if they are in it."""
    digest = hashlib.sha256(f"{config!r} {shape} {tree.tree_hash(params)}".encode() + content)

    def compute() -> dict[str, np.ndarray]:
        return {"states": extract(params, None, inputs).astype(np.float16)}

    return cached(cache_folder() / "features" / f"albef-{digest.hexdigest()}.npz", compute)["states"]


@dataclasses.dataclass(frozen=True)
class EncoderStates(EncoderStart):
    """Base of the recipes.

    Attributes:
        init_vision: a ViT; None: a ViT-S/14 of random weights, by the seed.
        init_text: a BERT with its tokenizer; None: MiniLM-L6's sizes, random weights and pieces of the training names.
        stamps: a tar of further pairs in WebDataset's form, such as Tux Paint's stamps: a picture of one thing on
            white, and a sentence. None: there are none.
        vendors: whose drawings of the training names are further images, see `mmjax.data.vendor_emoji`.
        shuffled: the share of things whose texts are another one's, by the seed: see `mmjax.data.mismatch`.
        image_size: side of the images in pixels, a multiple of the patch (14).
        length: tokens of a text, [CLS] included.
    """

    batch_size: int = 64
    stamps: str | None = None
    vendors: tuple[str, ...] = ()
    shuffled: float = 0.0
    image_size: int = 70
    length: int = 8

    # ------------------------------------------------------------------------------------------------------- encoders

    @functools.cached_property
    def image_encoder(self) -> tuple[ViTConfig, Params]:
        """Config and parameters, for images of `image_size`."""
        side = (self.image_size, self.image_size)
        if self.init_vision is None:
            config = ViTConfig.s14_dinov2(image_size=side)
            variables: Any = ViT(config).init(jax.random.key(self.seed), jnp.zeros((1, *side, 3)))
            return config, variables["params"]
        model: Any = load(self.init_vision)
        config, params = dataclasses.replace(model.config, image_size=side), model.weights()["params"]
        return config, {**params, "positions": resized_positions(params["positions"], config)}

    @functools.cached_property
    def text_encoder(self) -> tuple[BertConfig, Params, WordPieceTokenizer]:
        """Config, parameters and tokenizer."""
        if self.init_text is None:
            texts = (albef_caption(text) for row in self.drawings.train.columns["texts"] for text in row)
            tokenizer = train_wordpiece(texts, RANDOM_VOCABULARY)
            config = BertConfig.minilm(vocab_size=tokenizer.vocab_size, pooler=False)
            variables: Any = Bert(config).init(jax.random.key(self.seed), jnp.zeros((1, 4), jnp.int32))
            return config, variables["params"], tokenizer
        model: Any = load(self.init_text)
        return model.config, model.weights()["params"], model.tokenizer

    @property
    def tokenizer(self) -> WordPieceTokenizer:
        return self.text_encoder[2]

    def encode_images(self, images: np.ndarray) -> Float[np.ndarray, "n t d"]:
        """All tokens of uint8 images, after the final norm; float16."""
        config, params = self.image_encoder

        def encode(params: Params, state: Any, images: Array) -> Array:
            pixels = (images.astype(jnp.float32) / 255 - jnp.asarray(MEAN)) / jnp.asarray(STD)
            return ViT(config).apply({"params": params}, pixels).tokens  # type: ignore[union-attr]

        return cached_states(Extractor(encode, 32), config, params, images, images.tobytes(), images.shape)

    def encode_texts(self, columns: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n l d"]:
        """The text encoder's last states; float16."""
        config, params, _ = self.text_encoder

        def encode(params: Params, state: Any, texts: Any) -> Array:
            outputs: Any = Bert(config).apply({"params": params}, texts["input_ids"], texts["attention_mask"])
            return outputs["states"][-1]

        content = columns["input_ids"].tobytes() + columns["attention_mask"].tobytes()
        return cached_states(Extractor(encode), config, params, columns, content, columns["input_ids"].shape)

    # ----------------------------------------------------------------------------------------------------------- data

    @functools.cached_property
    def drawings(self) -> OpenMoji:
        return load_openmoji(self.image_size)

    @functools.cached_property
    def pairs(self) -> Pairs:
        columns = self.drawings.train.columns
        pictures = np.asarray(columns["image"])
        pairs = Pairs(list(columns["texts"]), pictures)
        pairs.add(pictures[:, :, ::-1], range(len(pictures)))
        codepoints = list(columns["codepoints"])
        for vendor in self.vendors:
            owners = drawn_by_all(codepoints, (vendor,))
            drawings = load_vendor_emoji([codepoints[i] for i in owners], self.image_size, (vendor,))
            pairs.add(drawings[vendor], owners)
        if self.stamps is not None:
            known = {albef_caption(name) for name in self.drawings.held_out.columns["text"]}
            stamps, captions = read_stamps(self.stamps, self.image_size, known)
            pairs.texts.extend((caption,) for caption in captions)
            pairs.add(stamps, range(len(pairs.texts) - len(captions), len(pairs.texts)))
        return pairs

    @property
    def masks_texts(self) -> bool:
        """Whether batches have masked texts for MLM."""
        return False

    def caption_columns(self, texts: list[str]) -> dict[str, Int[np.ndarray, "n l"]]:
        return caption_columns(self.tokenizer, [albef_caption(text) for text in texts], self.length, sep=False)

    @functools.cached_property
    def states(self) -> SampleStates:
        """The states of all training pictures and texts."""
        texts = self.caption_columns([text for row in self.pairs.texts for text in row])
        masked: dict[str, np.ndarray] = {}
        if self.masks_texts:
            masked = one_masked(texts, self.tokenizer.mask, self.seed)
            ids = {name: masked.pop(name).reshape(-1, self.length) for name in ("input_ids", "attention_mask")}
            masked["masked_text"] = self.encode_texts(ids).reshape(
                -1, MASKINGS, self.length, self.text_encoder[0].width
            )
        return SampleStates(self.encode_images(self.pairs.pictures), self.encode_texts(texts), texts, masked)

    @functools.cached_property
    def source(self) -> ArraySource:
        """A record a thing: indices of its pictures and captions in `states`."""
        counts = [len(row) for row in self.pairs.texts]
        firsts = np.cumsum([0, *counts[:-1]])
        captions = [list(range(first, first + count)) for first, count in zip(firsts.tolist(), counts)]
        captions = [captions[i] for i in mismatched(len(captions), self.shuffled, self.seed)]
        ids = np.arange(len(counts), dtype=np.int32)
        return ArraySource(name="pairs", pictures=self.pairs.images, captions=captions, image_id=ids)

    def train_data(self) -> Pipeline:
        return Pipeline(
            self.source,
            self.batch_size,
            seed=self.seed,
            transforms=(self.states,),
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        vision, width = self.image_encoder[0], self.text_encoder[0].width
        b, (rows, columns) = self.batch_size, vision.grid
        tokens = jax.ShapeDtypeStruct((b, self.length), jnp.int32)
        text = jax.ShapeDtypeStruct((b, self.length, width), jnp.float16)
        shapes = {
            "image": jax.ShapeDtypeStruct((b, vision.prefix + rows * columns, vision.width), jnp.float16),
            "text": text,
            "input_ids": tokens,
            "attention_mask": tokens,
            "image_id": jax.ShapeDtypeStruct((b,), jnp.int32),
        }
        if self.masks_texts:
            one = jax.ShapeDtypeStruct((b, 1), jnp.int32)
            shapes |= {"masked_text": text, "masked_positions": one, "masked_labels": one}
        return shapes
