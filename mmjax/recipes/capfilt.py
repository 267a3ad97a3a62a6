"""CapFilt: bootstraps the texts of noisy image-text shards (BLIP, arXiv 2201.12086, section 3.3).

A captioner samples a synthetic text for every image, and a filter keeps those of the web and synthetic texts that its
ITM head matches with the image. The original's script was never published; the choices it states are the defaults here:
nucleus sampling with p = 0.9, and a text is kept at a probability of 0.5 or more (salesforce/BLIP issues 46 and 86).

    models = Models.load("captioner", "filter")
    for shard in find_shards("web/*.tar"):
        scores = score_shard(shard, "out", models, Sampling())     # out/00000.scores.jsonl
        select_shard(shard, scores, "out", Thresholds(0.5))        # out/00000.tar

The two stages are apart because their costs are: scores need the models, and another threshold needs the scores alone.
A shard's scores name each text with its source and its scores, the dropped ones too. Both files of a shard appear when
they are whole, so that an interrupted job continues with the first shard that has none.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import hub, tree
from mmjax.data.decoding import BadRecord, decode_image, open_image
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.webdataset import WebDataset
from mmjax.errors import MmjaxError
from mmjax.interface.two_stage import TwoStageModel
from mmjax.training.storage import write_file
from mmjax.types import Array, Float

Source: TypeAlias = Literal["web", "synthetic"]
SOURCES: tuple[Source, ...] = ("web", "synthetic")
AHEAD = 2
"""Batches that are decoded while the models compute."""
FORMAT = 1
"""Of a file of scores."""


class Captioner(Protocol):
    """A loaded model that captions images."""

    config: Any
    params: Any
    preprocess: ImagePreprocessing

    def caption(self, images: Any, **options: Any) -> list[Any]: ...


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Synthetic captions.

    Attributes:
        captions: sampled for each image; 0: web texts are filtered alone.
        top_p: nucleus sampling; 0: beam search with 3 beams, which the paper finds worse (table 2).
        min_length, max_length: tokens of a caption with its prompt, as in the original's demo.
        seed: captions are a function of it, the shard's name and the image's index in the shard's batches.
        batch_size: images of one program.
    """

    captions: int = 1
    top_p: float = 0.9
    min_length: int = 5
    max_length: int = 20
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Raises MmjaxError for numbers out of range."""
        if self.captions < 0 or self.batch_size < 1 or not 0 <= self.top_p <= 1:
            raise MmjaxError(
                f"captions={self.captions}, batch_size={self.batch_size}, top_p={self.top_p}: expected captions >= 0, "
                "batch_size >= 1 and top_p in [0, 1]"
            )
        if self.captions > 1 and not self.top_p:
            raise MmjaxError(f"captions={self.captions}: a beam search gives one caption; several need top_p")


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """The least scores of a text that is kept.

    Attributes:
        itm: probability of the ITM head that the text matches the image.
        itc: cosine of the text's and the image's features; None: it is not considered.
    """

    itm: float = 0.5
    itc: float | None = None

    def keeps(self, text: Mapping[str, Any], file: str | os.PathLike[str]) -> bool:
        """Raises MmjaxError, naming the file of scores, for an ITC threshold on scores without cosines."""
        if self.itc is None:
            return text["itm"] >= self.itm
        if text["itc"] is None:
            raise MmjaxError(f"{file}: an ITC threshold needs cosines, and this filter has no projections")
        return text["itm"] >= self.itm and text["itc"] >= self.itc


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """The captioner and the filter. Their identities are the hashes of their weights and configs.

    captioner: None where only web texts are filtered.
    """

    captioner: Captioner | None
    filter: TwoStageModel

    def __post_init__(self) -> None:
        """Raises MmjaxError for a model that cannot caption or match."""
        for role, model, ability in (("captioner", self.captioner, "caption"), ("filter", self.filter, "match")):
            abilities = getattr(model, "abilities", (ability,))
            if model is not None and ability not in abilities:
                raise MmjaxError(
                    f"--{role}: this {type(model).__name__} cannot {ability}: it has {', '.join(abilities)}"
                )

    @classmethod
    def load(cls, captioner: str | None, filter: str) -> Self:
        """Loads both by `mmjax.load`; one name for both loads once."""
        filter_model: Any = hub.load(filter)
        captioner_model: Any = (
            None if captioner is None else hub.load(captioner) if captioner != filter else filter_model
        )
        return cls(captioner_model, filter_model)

    @functools.cached_property
    def identity(self) -> dict[str, str | None]:
        def digest(model: Any) -> str | None:
            if model is None:
                return None
            return hashlib.sha256(f"{model.config!r} {tree.tree_hash(model.params)}".encode()).hexdigest()[:16]

        return {"captioner": digest(self.captioner), "filter": digest(self.filter)}

    def sample(self, pixels: Float[np.ndarray, "b h w 3"], sampling: Sampling, seed: int) -> list[list[str]]:
        """`sampling.captions` lists of a caption for each image."""
        if self.captioner is None or not sampling.captions:
            return []
        options: dict[str, Any] = {"min_length": sampling.min_length, "max_length": sampling.max_length}
        options["batch_size"] = sampling.batch_size
        if sampling.top_p:
            options |= {"top_p": sampling.top_p, "num_return_sequences": sampling.captions, "seed": seed}
        captions = self.captioner.caption(pixels, **options)
        return [captions] if sampling.captions == 1 else [list(column) for column in zip(*captions)]

    def match(
        self, pixels: Float[np.ndarray, "b h w 3"], columns: Sequence[Sequence[str]]
    ) -> tuple[list[list[float]], list[list[float]] | None]:
        """The filter's probabilities that the i-th text of each column belongs to the i-th image; and their cosines, if
        it has projections. The images are encoded once for all columns."""
        model = self.filter
        texts = [model.columns(column, model.rules.length) for column in columns]
        probabilities, cosines = self._match(model.variables, pixels, texts)
        return np.asarray(probabilities).tolist(), None if cosines is None else np.asarray(cosines).tolist()

    @functools.cached_property
    def _match(self) -> Callable[..., Any]:
        apply, has_features = self.filter.apply, bool(self.filter.config.embed_dim)

        def match(variables: Any, pixels: Array, columns: Sequence[tuple[Array, Array]]) -> Any:
            images = apply(variables, "encode_image", pixels)
            logits, cosines = [], []
            for ids, mask in columns:
                states = apply(variables, "encode_text", ids, mask)
                logits.append(
                    apply(variables, "itm_logits", apply(variables, "encode_pair", ids, mask, states, images))
                )
                if has_features:
                    embeds = apply(variables, "image_embeds", images), apply(variables, "text_embeds", states)
                    cosines.append(jnp.einsum("be,be->b", *embeds, precision="highest"))
            probabilities = jax.nn.softmax(jnp.stack(logits))[..., 1]
            return probabilities, jnp.stack(cosines) if has_features else None

        return jax.jit(match)


# ------------------------------------------------------------------------------------------------------------- scores


def score_shard(
    shard: str | os.PathLike[str],
    out: str | os.PathLike[str],
    models: Models,
    sampling: Sampling,
    advance: Any = None,
) -> pathlib.Path:
    """Captions a shard's images and scores all texts; returns OUT/NAME.scores.jsonl.

    Its first line holds the identities of the models and the sampling; each further line is {"key", "texts": [{"text",
    "source", "itm", "itc"}]} of an image, or {"key", "problem"} of a record that cannot be used. A file of the same
    models and the same sampling is returned as it is.
    advance: called with the number of images after each batch.
    Raises MmjaxError, naming the file, for scores that other models or other sampling gave.
    """
    file = scores_file(shard, out)
    header = {"capfilt": FORMAT, **models.identity, "sampling": dataclasses.asdict(sampling)}
    if file.exists():
        _check_header(file, header)
        return file
    lines = [header]
    for number, batch in enumerate(prepared_batches(WebDataset(shard), models, sampling.batch_size)):
        lines += _scored(batch, models, sampling, _seed(sampling, shard, number))
        if advance is not None:
            advance(len(batch))
    write_file(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return file


def scores_file(shard: str | os.PathLike[str], out: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(out) / f"{pathlib.Path(shard).stem}.scores.jsonl"


def _check_header(file: pathlib.Path, expected: Mapping[str, Any]) -> None:
    header, _ = load_scores(file)
    differing = [name for name in expected if header.get(name) != expected[name]]
    if differing:
        raise MmjaxError(f"{file}: its scores were computed with another {', '.join(differing)}; use another --out")


def load_scores(file: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a file of scores, and the lines of its images. Raises MmjaxError, naming it, for others."""
    try:
        lines = [json.loads(line) for line in _read(file).splitlines()]
        if lines and lines[0].get("capfilt") == FORMAT:
            return lines[0], lines[1:]
    except (ValueError, AttributeError) as error:
        raise MmjaxError(f"{file}: not a file of scores: {error}") from error
    raise MmjaxError(f"{file}: not a file of scores")


def _read(file: str | os.PathLike[str]) -> bytes:
    try:
        return pathlib.Path(file).read_bytes()
    except OSError as error:
        raise MmjaxError(f"{file}: cannot be read: {error}") from error


def prepared_batches(shard: WebDataset, models: Models, size: int) -> Iterator[list[dict[str, Any]]]:
    """The records of a shard in order, decoded and preprocessed in threads: Pillow releases the interpreter's lock."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        waiting: collections.deque[list[concurrent.futures.Future[dict[str, Any]]]] = collections.deque()
        for start in range(0, len(shard), size):
            indices = range(start, min(start + size, len(shard)))
            waiting.append([pool.submit(_prepared, shard, models, index) for index in indices])
            if len(waiting) > AHEAD:
                yield [future.result() for future in waiting.popleft()]
        for futures in waiting:
            yield [future.result() for future in futures]


def _prepared(shard: WebDataset, models: Models, index: int) -> dict[str, Any]:
    """{"key", "text", "captioner", "filter"}, the last two pixel values [h, w, 3]; or {"key", "problem"}."""
    try:
        record = shard[index]
        image = decode_image(record["image"], record["key"])
    except BadRecord as error:
        return {"key": shard.record_name(index).partition("::")[2], "problem": str(error)}
    pixels = models.filter.preprocess(image)[0]
    same = models.captioner is None or models.captioner.preprocess == models.filter.preprocess
    captioner_pixels = pixels if same else models.captioner.preprocess(image)[0]  # type: ignore[union-attr]
    return {"key": record["key"], "text": record.get("text"), "captioner": captioner_pixels, "filter": pixels}


def _seed(sampling: Sampling, shard: str | os.PathLike[str], batch: int) -> int:
    """The seed of a batch: independent of the order of shards and of the process that has it."""
    name = f"{sampling.seed} {pathlib.Path(shard).name} {batch}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def _scored(batch: Sequence[dict[str, Any]], models: Models, sampling: Sampling, seed: int) -> list[dict[str, Any]]:
    """The lines of a batch."""
    good = [record for record in batch if "problem" not in record]
    scored = iter(_scored_texts(good, models, sampling, seed) if good else ())
    return [
        {"key": record["key"], **({"problem": record["problem"]} if "problem" in record else {"texts": next(scored)})}
        for record in batch
    ]


def _scored_texts(records: list[dict[str, Any]], models: Models, sampling: Sampling, seed: int) -> Iterator[list[Any]]:
    """The texts of each record with their scores, each text once. The i-th texts of all images are scored together."""
    # Copies of the last record fill the batch, and a missing text is scored as an empty one: all use one program.
    filled = [*records, *records[-1:] * (sampling.batch_size - len(records))]
    captioner_pixels, pixels = (np.stack([record[role] for record in filled]) for role in ("captioner", "filter"))
    columns = [[record["text"] or "" for record in filled], *models.sample(captioner_pixels, sampling, seed)]
    probabilities, cosines = models.match(pixels, columns)
    for index in range(len(records)):
        texts: dict[str, dict[str, Any]] = {}
        for number, column in enumerate(columns):
            source: Source = "synthetic" if number else "web"
            if text := column[index]:
                itc = None if cosines is None else cosines[number][index]
                texts.setdefault(
                    text, {"text": text, "source": source, "itm": probabilities[number][index], "itc": itc}
                )
        yield list(texts.values())


# ----------------------------------------------------------------------------------------------------------- selection


def select_shard(
    shard: str | os.PathLike[str],
    scores: str | os.PathLike[str],
    out: str | os.PathLike[str],
    thresholds: Thresholds,
) -> Counter[str]:
    """Writes OUT/NAME.tar with the images that have a kept text; returns counts of texts and images.

    A sample has its image, NAME.txt with the first kept text, and NAME.json: the fields it had, "captions" (all kept
    texts, the web text first) and "capfilt" (each with its source and scores). `mmjax.data.webdataset` reads "captions"
    as `texts`, one of which a training pipeline samples at each visit.
    OUT/NAME.selected.json holds thresholds and counts; a shard selected by the same thresholds is left as it is.
    Raises MmjaxError, naming the file, for scores that are not of this shard.
    """
    target, selected = (
        pathlib.Path(out) / f"{pathlib.Path(shard).stem}{suffix}" for suffix in (".tar", ".selected.json")
    )
    selection = {"thresholds": dataclasses.asdict(thresholds), "scores": hashlib.sha256(_read(scores)).hexdigest()}
    if target.exists() and selected.exists():
        stored = json.loads(selected.read_bytes())
        if stored | selection == stored:
            return Counter(stored["counts"])
    counts = _write_selection(WebDataset(shard), scores, target, thresholds)
    write_file(selected, json.dumps(selection | {"counts": counts}).encode())
    return counts


def _write_selection(
    source: WebDataset, scores: str | os.PathLike[str], target: pathlib.Path, thresholds: Thresholds
) -> Counter[str]:
    _, lines = load_scores(scores)
    counts: Counter[str] = Counter()
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(partial, "w") as archive:
            for index, line in _matched(source, lines, scores):
                kept = [text for text in line.get("texts", []) if thresholds.keeps(text, scores)]
                counts.update(tally(line, kept))
                if kept:
                    _write_sample(archive, source[index], kept)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def tally(line: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Counts of one image: images, texts of each source, and of each how many are kept."""
    counts = Counter({"images": 1, "images kept": int(bool(kept)), "problems": int("problem" in line)})
    counts.update(text["source"] for text in line.get("texts", []))
    counts.update(f"{text['source']} kept" for text in kept)
    return counts


def _matched(source: WebDataset, lines: Sequence[dict[str, Any]], file: os.PathLike[str] | str) -> Iterator[Any]:
    """(index, line) of the records. Raises MmjaxError for lines of another shard."""
    if len(lines) != len(source):
        raise MmjaxError(f"{file}: scores of {len(lines)} images; {source.name} has {len(source)}")
    for index, line in enumerate(lines):
        key = source.record_name(index).partition("::")[2]
        if line["key"] != key:
            raise MmjaxError(f"{file}: scores of {line['key']} where {source.name} has {key}")
        yield index, line


def _write_sample(archive: tarfile.TarFile, record: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> None:
    fields = record["json"] if isinstance(record.get("json"), dict) else {}
    content = fields | {"captions": [text["text"] for text in kept], "capfilt": list(kept)}
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind := str(open_image(record["image"]).format), kind.lower())
    files = {suffix: record["image"], "txt": kept[0]["text"].encode(), "json": json.dumps(content).encode()}
    for name, data in files.items():
        member = tarfile.TarInfo(f"{record['key']}.{name}")  # no owner, no time: equal texts give equal bytes
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
