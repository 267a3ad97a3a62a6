"""CLIP in small, on real pairs that pip brings: OpenMoji's drawings and their names; minutes on a laptop's CPU.

    mmjax train experiments/clip_openmoji.py --workdir workdirs/clip_openmoji

About 1,500 drawings are trained on, every fifth name is held out; no training text is a held-out one
(`mmjax.data.openmoji`; `--hold_out family` is the harder split). During training, on the held-out drawings: retrieval
both ways, zero-shot classification over the names of the nine groups, and the mutual information of the features
at least (log N - L).
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmjax.data.openmoji import ATTRIBUTION, OpenMoji, load_openmoji
from mmjax.data.pipeline import Pipeline
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.sources import ArraySource
from mmjax.data.transforms import EncodeText, RandomFlip, RandomResizedCrop
from mmjax.evaluation.retrieval import RetrievalEvaluation
from mmjax.evaluation.zero_shot import ZeroShotEvaluation, prompts
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.pretrain import CLIP
from mmjax.models.resnet.network import ResNetConfig
from mmjax.text.clip_tokenizer import CLIPTokenizer, train_clip_tokenizer
from mmjax.training.experiment import Evaluation, ExperimentConfig
from mmjax.training.optimizer import Optimizer, adamw, warmup_cosine

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
TEMPLATES = ("{}", "a drawing of {}", "an icon of {}")


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    """A run of about 6 minutes on two cores.

    Attributes:
        hold_out: the rule of the split, see `mmjax.data.openmoji`.
        image_size: side of the drawings in pixels.
        vocab_size: ids of the byte-pair encoding that is learned from the training names.
        width: channels of the image tower's first stage; each of the others has twice those of the one before.
        learning_rate: peak; warmup and half a cosine.
        crop: the smallest share of a drawing's area that a training crop keeps.
        word_dropout, label_smoothing: against overfitting, of captions and of pairs; see `EncodeText` and `CLIP`.
    """

    steps: int = 420
    batch_size: int = 256
    log_every: int = 10
    eval_every: int = 105
    checkpoint_every: int = 100
    hold_out: Literal["name", "family"] = "name"
    image_size: int = 64
    vocab_size: int = 1500
    width: int = 32
    learning_rate: float = 2e-3
    warmup: int = 30
    weight_decay: float = 0.5
    crop: float = 0.45
    word_dropout: float = 0.2
    label_smoothing: float = 0.05

    @functools.cached_property
    def pairs(self) -> OpenMoji:
        return load_openmoji(self.image_size, hold_out=self.hold_out)

    @functools.cached_property
    def captioned(self) -> ArraySource:
        """The training drawings; a caption is the name, an alias, or the name with its group or subgroup behind it.

        The name is listed twice, so that half of the samples of a drawing are the name that evaluation uses.
        """
        columns = self.pairs.train.columns
        kinds = zip(columns["texts"], columns["group"], columns["subgroup"])
        texts = [(*names, names[0], f"{names[0]}, {group}", f"{names[0]}, {kind}") for names, group, kind in kinds]
        return ArraySource(name=self.pairs.train.name, **dict(columns) | {"texts": texts})

    @functools.cached_property
    def tokenizer(self) -> CLIPTokenizer:
        texts = [text for texts in self.captioned.columns["texts"] for text in texts]
        return train_clip_tokenizer(texts, self.vocab_size, context_length=16)

    @property
    def network(self) -> CLIPConfig:
        """A ResNet of four short stages and a causal transformer of one block, little more than a bag of words, which
        is what so few captions can fill."""
        widths = tuple(self.width * 2**stage for stage in range(4))
        vision = ResNetConfig((1, 1, 1, 1), "basic", "imagenet", self.width, widths, num_classes=0)
        text = CLIPTextConfig(16, self.tokenizer.vocab_size, width=256, depth=1, heads=4, hidden=1024)
        return CLIPConfig(vision, text, embed_dim=256)

    def method(self) -> CLIP:
        return CLIP(self.network, mean=MEAN, std=STD, label_smoothing=self.label_smoothing)

    def optimizer(self) -> Optimizer:
        return Optimizer(adamw(warmup_cosine(self.learning_rate, self.steps, self.warmup), self.weight_decay))

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        return {
            "image": jax.ShapeDtypeStruct((self.batch_size, self.image_size, self.image_size, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((self.batch_size, self.tokenizer.context_length), jnp.int32),
        }

    def train_data(self) -> Pipeline:
        crop = RandomResizedCrop(self.image_size, scale=(self.crop, 1.0))
        return Pipeline(
            self.captioned,
            self.batch_size,
            seed=self.seed,
            transforms=(crop, RandomFlip(), EncodeText(self.tokenizer, word_dropout=self.word_dropout)),
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluations(self) -> tuple[Evaluation, ...]:
        method, held_out = self.method(), self.pairs.held_out.columns
        images, names = np.asarray(held_out["image"]), list(held_out["text"])
        retrieval = RetrievalEvaluation(
            encode_image=method.encode_image,
            encode_text=method.encode_text,
            images=images,
            texts=self.tokenizer(names),
            captions=names,
            attribution=ATTRIBUTION,
            final_step=self.steps,
        )
        texts, owners = prompts(self.pairs.groups, TEMPLATES)
        zero_shot = ZeroShotEvaluation(
            encode_image=method.encode_image,
            encode_text=method.encode_text,
            images=images,
            labels=np.asarray(held_out["label"]),
            texts=self.tokenizer(texts),
            text_class=owners,
            class_names=self.pairs.groups,
            attribution=ATTRIBUTION,
            final_step=self.steps,
        )
        return retrieval, zero_shot

    def model(self) -> tuple[str, CLIPConfig]:
        return "clip", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """Tokenizer, group names for `mmjax classify`, and the held-out drawings for `mmjax retrieve`."""
        workdir.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(workdir / "tokenizer.json")
        (workdir / "labels.json").write_text(json.dumps(list(self.pairs.groups)) + "\n")
        folder = workdir / "images"
        folder.mkdir(exist_ok=True)
        (folder / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n")
        columns = self.pairs.held_out.columns
        for image, name in zip(columns["image"], columns["text"]):
            safe = "".join(c if c.isalnum() else "-" for c in name)
            Image.fromarray(image).save(folder / f"{safe}.png")
        size = (self.image_size, self.image_size)
        preprocess = ImagePreprocessing(size, None, resample="bilinear", mean=MEAN, std=STD)
        return {"tokenizer": "tokenizer.json", "preprocess": dataclasses.asdict(preprocess)}
