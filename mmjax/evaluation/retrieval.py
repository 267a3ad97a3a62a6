"""Image-text retrieval: R@K in both directions, several captions per image, exact ranks without sorting.

Protocol (the same in ALBEF `Retrieval.py`, BLIP, LAVIS and big_vision): the rank of an image query is that of the best
of its captions; every caption is a query, whose rank is that of its image. R@K is the share of queries of rank below K,
in percent. Ties count against the model: candidates that score the same as the right one rank before it, so a constant
encoder gets 0, not 100.

    >>> ranks = ranks_of_features(np.eye(3), np.array([[1.0, 0, 0], [0, 1, 0.5], [0, 1, 0.9]]))
    >>> print(ranks.scores(ks=(1,))["text_to_image_R@1"].value)
    66.66666666666667
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.pipeline import Pipeline
from mmjax.evaluation.bootstrap import bootstrap_interval, ratio
from mmjax.evaluation.features import (
    Encode,
    Extractor,
    Inputs,
    checked_features,
    checked_integers,
    finite,
)
from mmjax.evaluation.pictures import retrieval_picture
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, clustered_proportion
from mmjax.nn.norm import l2_normalize
from mmjax.types import Array, ArrayLike, Float, Int, MmjaxError, Params

BLOCK = 2**24
"""Number of scores in memory at a time: 64 MiB."""
KS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks from 0 (best) of n images and m texts.

    image: int32 [n], the best rank of an image's texts among all texts.
    text: int32 [m], the rank of a text's image among all images.
    text_image: int32 [m], the image that a text belongs to.
    """

    image: Int[np.ndarray, " n"]
    text: Int[np.ndarray, " m"]
    text_image: Int[np.ndarray, " m"]

    def scores(self, ks: Sequence[int] = KS, resamples: int = 1000, seed: int = 0) -> dict[str, Score]:
        """`image_to_text_R@K` and `text_to_image_R@K` in percent, and the median ranks, counted from 1.

        Intervals resample images with all their captions (the candidates stay the same). Chance is a random order.
        """
        n, m = len(self.image), len(self.text)
        captions = np.bincount(self.text_image, minlength=n)
        results: dict[str, Score] = {}
        for k in ks:
            chance = 100.0 * float(np.mean(_chance_of_hit(captions, m, k)))
            hits = self.image < k
            results[f"image_to_text_R@{k}"] = clustered_proportion(hits, np.ones(n), chance, resamples, seed)
        for k in ks:
            hits = np.bincount(self.text_image, self.text < k, minlength=n)
            chance = 100.0 * min(k, n) / n
            results[f"text_to_image_R@{k}"] = clustered_proportion(hits, captions, chance, resamples, seed)
        results["image_to_text_median_rank"] = Score(float(np.median(self.image)) + 1, n, unit="rank")
        results["text_to_image_median_rank"] = Score(
            float(np.median(self.text)) + 1, m, chance=(n + 1) / 2, unit="rank"
        )
        return results

    def mean_recalls(self, ks: Sequence[int] = KS, resamples: int = 1000, seed: int = 0) -> dict[str, Score]:
        """`image_to_text_R_mean` and `text_to_image_R_mean` over `ks`, and their mean `R_mean`, in percent.

        ALBEF and BLIP choose their best epoch by the latter (`r_mean`). Intervals as in `scores`.
        """
        n, m = len(self.image), len(self.text)
        image_hits = np.sum([self.image < k for k in ks], 0)
        text_hits = np.bincount(self.text_image, np.sum([self.text < k for k in ks], 0), minlength=n)
        of_images, of_texts = np.full(n, len(ks)), len(ks) * np.bincount(self.text_image, minlength=n)
        results = {
            "image_to_text_R_mean": clustered_proportion(image_hits, of_images, None, resamples, seed),
            "text_to_image_R_mean": clustered_proportion(text_hits, of_texts, None, resamples, seed),
        }
        sums = np.stack([image_hits, of_images, text_hits, of_texts], 1)
        low, high = bootstrap_interval(sums, _both_ways, resamples, seed)
        results["R_mean"] = Score(float(_both_ways(sums.sum(0))), n + m, low, high)
        return {
            name: dataclasses.replace(score, n=items) for (name, score), items in zip(results.items(), (n, m, n + m))
        }


def _both_ways(sums: np.ndarray) -> np.ndarray:
    return (ratio(sums[..., :2]) + ratio(sums[..., 2:])) / 2


def _chance_of_hit(captions: np.ndarray, m: int, k: int) -> np.ndarray:
    """The probability that a random order of m texts has one of an image's `captions` among its first k."""
    missed = np.ones(len(captions))
    for drawn_before in range(min(k, m)):
        missed *= np.maximum(m - captions - drawn_before, 0) / (m - drawn_before)
    return 1.0 - missed


def ranks_of_features(
    image_features: Float[ArrayLike, "n d"],
    text_features: Float[ArrayLike, "m d"],
    text_image: Int[ArrayLike, " m"] | None = None,
) -> Ranks:
    """Ranks by cosine similarity; the n x m matrix is computed in blocks.

    Args:
        text_image: the image of each text; None: text i belongs to image i.

    Raises MmjaxError, naming the argument: wrong shapes, no items, NaN, an image without a text.
    """
    images = checked_features("image_features", image_features)
    texts = checked_features("text_features", text_features, images.shape[1])
    owner = owners(text_image, len(images), len(texts))
    own_image = jnp.arange(len(images), dtype=jnp.int32)
    image_ranks = _blockwise(images, own_image, texts, owner)
    text_ranks = _blockwise(texts, owner, images, own_image)
    return Ranks(image_ranks, text_ranks, owner)


def ranks_of_scores(
    image_text_scores: Float[ArrayLike, "n m"],
    text_image: Int[ArrayLike, " m"] | None = None,
    text_image_scores: Float[ArrayLike, "m n"] | None = None,
) -> Ranks:
    """Ranks by arbitrary scores, higher is better, such as those of a matching head on a shortlist with -100 elsewhere.

    Args:
        text_image_scores: scores of the other direction; None: the transpose.

    Raises MmjaxError as `ranks_of_features`.
    """
    forward = checked_scores("image_text_scores", image_text_scores)
    n, m = forward.shape
    backward = forward.T
    if text_image_scores is not None:
        backward = checked_scores("text_image_scores", text_image_scores)
        if backward.shape != (m, n):
            raise MmjaxError(f"text_image_scores: need [{m}, {n}], not {list(backward.shape)}")
    owner = owners(text_image, n, m)
    own_image = jnp.arange(n, dtype=jnp.int32)
    image_ranks, text_ranks = ranks_among(forward, own_image, owner), ranks_among(backward, owner, own_image)
    return Ranks(np.asarray(image_ranks), np.asarray(text_ranks), owner)


def checked_scores(name: str, scores: ArrayLike) -> Float[Array, "n m"]:
    """A matrix of scores as a float32 device array. Raises MmjaxError for another rank, an empty matrix, or NaN."""
    if len(np.shape(scores)) != 2 or 0 in np.shape(scores):
        raise MmjaxError(f"{name}: need [images, texts] scores, not {list(np.shape(scores))}")
    return finite(name, jnp.asarray(scores, jnp.float32))


def owners(text_image: Int[ArrayLike, " m"] | None, n: int, m: int) -> Int[np.ndarray, " m"]:
    """The image of each of m texts, validated: each of n images has a text. None: text i belongs to image i."""
    if text_image is None:
        if n != m:
            raise MmjaxError(f"text_image: {n} images and {m} texts need the index of each text's image")
        return np.arange(n, dtype=np.int32)
    owner = checked_integers("text_image", text_image, m, n)
    without = np.setdiff1d(np.arange(n), owner)
    if len(without):
        raise MmjaxError(f"text_image: {len(without)} of {n} images have no text, image {without[0]} for one")
    return owner


@jax.jit
def ranks_among(
    scores: Float[Array, "b s"], query: Int[Array, " b"], candidate: Int[Array, "*b s"]
) -> Int[Array, " b"]:
    """Number of non-matching candidates that score at least as high as the best matching one.

    A candidate matches a query of the same number. candidate: shared by all queries [s], or per query [b, s].
    """
    matching = query[:, None] == candidate
    best = jnp.max(scores, axis=1, keepdims=True, where=matching, initial=-jnp.inf)
    return jnp.sum(~matching & (scores >= best), axis=1, dtype=jnp.int32)


@jax.jit
def _cosine_ranks(
    queries: Float[Array, "b d"], query: Int[Array, " b"], candidates: Float[Array, "s d"], candidate: Int[Array, " s"]
) -> Int[Array, " b"]:
    return ranks_among(_cosines(queries, candidates), query, candidate)


@jax.jit
def _cosines(queries: Float[Array, "b d"], candidates: Float[Array, "s d"]) -> Float[Array, "b s"]:
    # The matching candidate's score comes from the same product: computed separately it could differ in the last bit.
    return jnp.matmul(l2_normalize(queries), l2_normalize(candidates).T, precision="highest")


def _blockwise(queries: Any, query: Any, candidates: Any, candidate: Any) -> Int[np.ndarray, " b"]:
    """Ranks of all queries in blocks of one shape; the last block overlaps the previous one."""
    size = min(len(queries), max(1, BLOCK // len(candidates)))
    starts = [min(start, len(queries) - size) for start in range(0, len(queries), size)]
    query, candidate = jnp.asarray(query), jnp.asarray(candidate)
    ranks = np.empty(len(queries), np.int32)
    blocks = [
        _cosine_ranks(queries[start : start + size], query[start : start + size], candidates, candidate)
        for start in starts
    ]
    for start, block in zip(starts, blocks):
        ranks[start : start + size] = np.asarray(block)
    return ranks


@functools.partial(jax.jit, static_argnames="k")
def _top(queries: Float[Array, "b d"], candidates: Float[Array, "s d"], k: int) -> Int[Array, "b k"]:
    return jax.lax.top_k(_cosines(queries, candidates), k)[1]


def top_candidates(
    query_features: Float[ArrayLike, "b d"], candidate_features: Float[ArrayLike, "s d"], k: int = 5
) -> Int[np.ndarray, "b k"]:
    """Indices of the k candidates (or all, if there are fewer) nearest by cosine to each query."""
    queries = checked_features("query_features", query_features)
    candidates = checked_features("candidate_features", candidate_features, queries.shape[1])
    return np.asarray(_top(queries, candidates, min(k, len(candidates))))


def shown_queries(n: int, text_image: Int[np.ndarray, " m"]) -> tuple[np.ndarray, np.ndarray]:
    """A few images and a text of each, for a picture; always the same ones, so that pictures are comparable."""
    images = np.unique(np.linspace(0, n - 1, min(6, n)).astype(int))
    return images, np.array([np.flatnonzero(text_image == image)[0] for image in images])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalEvaluation(ScoredEvaluation):
    """R@K of a two-tower model, and a picture of retrieved items.

    Attributes:
        encode_image: (params, state, images [b, ...]) -> features [b, d].
        encode_text: (params, state, texts [b, ...]) -> features [b, d].
        images: an array [n, ...], or a pipeline; uint8 arrays [n, height, width, 3] are also shown in the picture.
            Images that a pipeline cannot read are omitted with their texts, and counted as `retrieval_unreadable`.
        texts: an array [m, ...] or a dict of arrays, of all captions.
        text_image: int [m], the image of each text; None: text i belongs to image i.
        ks: the K of R@K.
        captions: the texts as strings; the picture needs them and uint8 images.
        thumbnails: uint8 [n, height, width, 3], shown in place of `images`.
        attribution: a line under the picture, required by some licences.
        batch_size: items encoded at a time.
    """

    name: str = "retrieval"
    encode_image: Encode
    encode_text: Encode
    images: Inputs
    texts: ArrayLike | Mapping[str, ArrayLike]
    text_image: Int[ArrayLike, " m"] | None = None
    ks: tuple[int, ...] = KS
    captions: Sequence[str] | None = None
    thumbnails: np.ndarray | None = None
    attribution: str | None = None
    batch_size: int = 256

    @functools.cached_property
    def _extractors(self) -> tuple[Extractor, Extractor]:
        return Extractor(self.encode_image, self.batch_size), Extractor(self.encode_text, self.batch_size)

    def ranks(self, params: Params, state: Any = None) -> Ranks:
        """Ranks of every image and text, for paired tests between two models."""
        return ranks_of_features(*self._features(params, state)[:3])

    def _features(self, params: Params, state: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, int]:
        """Image features, text features, the image of each text, and the number of unreadable images."""
        encode_images, encode_texts = self._extractors
        texts = encode_texts(params, state, self.texts, "texts")
        if not isinstance(self.images, Pipeline):
            owner = None if self.text_image is None else np.asarray(self.text_image)
            return encode_images(params, state, self.images, "images"), texts, owner, 0
        images, columns = encode_images.from_pipeline(params, state, self.images)
        total = len(self.images.source)
        owner = owners(self.text_image, total, len(texts))
        new_index = np.full(total, -1, np.int32)
        new_index[columns["index"]] = np.arange(len(images))
        readable = new_index[owner] >= 0
        return images, texts[readable], new_index[owner[readable]], total - len(images)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        images, texts, owner, unreadable = self._features(params, state)
        ranks = ranks_of_features(images, texts, owner)
        # The metrics of the default name have no prefix; a second data set has its name as prefix.
        prefix = "" if self.name == "retrieval" else f"{self.name}_"
        scores = {f"{prefix}{name}": score for name, score in ranks.scores(self.ks).items()}
        counts = {f"{self.name}_n": len(ranks.image), f"{self.name}_n_texts": len(ranks.text)}
        counts |= {f"{self.name}_unreadable": unreadable} if unreadable else {}
        picture = self._picture(images, texts, ranks.text_image) if pictures and not unreadable else None
        return Outcome(scores, counts, {} if picture is None else {f"{self.name}_picture": picture})

    def _picture(self, images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> np.ndarray | None:
        thumbnails = self.thumbnails
        if thumbnails is None and isinstance(self.images, np.ndarray) and self.images.dtype == np.uint8:
            thumbnails = self.images
        if thumbnails is None or self.captions is None:
            return None
        image_queries, text_queries = shown_queries(len(images), owner)
        return retrieval_picture(
            thumbnails,
            self.captions,
            owner,
            (image_queries, top_candidates(images[image_queries], texts)),
            (text_queries, top_candidates(texts[text_queries], images)),
            self.attribution,
        )
