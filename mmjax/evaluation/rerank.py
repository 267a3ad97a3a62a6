"""Two-stage retrieval as in ALBEF, BLIP and BLIP-2: a matching head reranks the nearest candidates by similarity.

    rerank = Reranker(match, k=256, add_similarity=True)
    shortlists = rerank(params, states, similarities, text_image)   # similarities [n images, m texts]
    shortlists.ranks().scores()

The head scores the k nearest texts of each image and the k nearest images of each text; all other pairs rank behind
them (the originals score those -100). The two directions share many pairs, and the head's score of a pair is the same
in both, so each pair is computed once; pairs of an image are computed together, so that the head can share work.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmjax.evaluation.features import Advance, Encode, Extractor
from mmjax.evaluation.pictures import retrieval_picture
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score, clustered_proportion
from mmjax.evaluation.retrieval import BLOCK, KS, Ranks, checked_scores, owners, ranks_among, shown_queries
from mmjax.types import ArrayLike, Float, Int, MmjaxError, Params

FILL = -100.0


@dataclasses.dataclass(frozen=True)
class Shortlists:
    """The candidates of the first stage, nearest first, and their scores of the second stage.

    texts: int32 [n, k], for each image; text_scores: float32 [n, k].
    images: int32 [m, k], for each text; image_scores: float32 [m, k].
    text_image: int32 [m], the image that a text belongs to.
    """

    texts: Int[np.ndarray, "n k"]
    text_scores: Float[np.ndarray, "n k"]
    images: Int[np.ndarray, "m j"]
    image_scores: Float[np.ndarray, "m j"]
    text_image: Int[np.ndarray, " m"]

    def ranks(self) -> Ranks:
        """Ranks among all candidates. Candidates outside the list tie with each other, and ties count against the
        model as everywhere here: their rank is k or more, so with a k of 10 or more R@1, R@5 and R@10 do not depend on
        it. The originals leave ties to an unstable sort."""
        n, m = len(self.texts), len(self.images)
        images, owner = np.arange(n, dtype=np.int32), self.text_image
        others = m - np.bincount(owner, minlength=n)
        of_images = _ranks(self.text_scores, images, owner[self.texts], others)
        return Ranks(of_images, _ranks(self.image_scores, owner, self.images, np.full(m, n - 1)), owner)

    def plus(self, similarities: Float[np.ndarray, "n m"]) -> "Shortlists":
        """The same candidates, whose scores are the sum of theirs and the similarities."""
        text_scores = self.text_scores + np.take_along_axis(similarities, self.texts, 1)
        image_scores = self.image_scores + np.take_along_axis(similarities.T, self.images, 1)
        return dataclasses.replace(self, text_scores=text_scores, image_scores=image_scores)

    def matching(self) -> dict[str, Score]:
        """`matching_auc` and `matching_gap` of the second stage, over both directions' queries with a match and
        another candidate in their list, {} without any: the share of the other candidates that score below the match,
        ties half, in percent; and by how much the match scores above them on average."""
        of_texts = self.text_scores, self.text_image[self.texts] == np.arange(len(self.texts))[:, None]
        of_images = self.image_scores, self.images == self.text_image[:, None]
        shares, gaps = [], []
        for scores, matches in (of_texts, of_images):
            for row, matching in zip(scores, matches):
                if matching.any() and not matching.all():
                    best, others = row[matching].max(), row[~matching]
                    shares.append(np.mean((others < best) + 0.5 * (others == best)))
                    gaps.append(best - others.mean())
        if not shares:
            return {}
        auc = clustered_proportion(np.array(shares), np.ones(len(shares)), 50.0)
        return {"matching_auc": auc, "matching_gap": Score(float(np.mean(gaps)), len(gaps), unit="logit")}

    def matrices(self) -> tuple[Float[np.ndarray, "n m"], Float[np.ndarray, "m n"]]:
        """The originals' score matrices, images to texts and texts to images, `FILL` where nothing was scored."""
        n, m = len(self.texts), len(self.images)
        forward, backward = np.full((n, m), FILL, np.float32), np.full((m, n), FILL, np.float32)
        np.put_along_axis(forward, self.texts, self.text_scores, 1)
        np.put_along_axis(backward, self.images, self.image_scores, 1)
        return forward, backward


def _ranks(scores: np.ndarray, query: np.ndarray, candidate: np.ndarray, others: np.ndarray) -> np.ndarray:
    ranks = np.asarray(ranks_among(jnp.asarray(scores), jnp.asarray(query), jnp.asarray(candidate)))
    return np.where((candidate == query[:, None]).any(1), ranks, others).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class PairScorer:
    """Scores of pairs by a matching head, compiled once for all pairs and all parameters.

    Attributes:
        match: a pure function (params, states, {"image": int32 [b], "texts": int32 [b, t]}) -> float [b, t], the
            matching scores of each image with each of its texts, given by index. `states` are its further inputs, such
            as the states of both towers on the device.
        batch_size: b above.

    With several processes each computes every pair; `match` may shard its work over a mesh.
    """

    match: Encode
    batch_size: int = 8

    @functools.cached_property
    def _extractor(self) -> Extractor:
        return Extractor(self.match, self.batch_size)

    def __call__(
        self,
        params: Params,
        states: Any,
        image: Int[np.ndarray, "*p"],
        text: Int[np.ndarray, "*p"],
        *,
        similarities: Float[np.ndarray, "n m"] | None = None,
        texts: int | None = None,
        console: Console | None = None,
    ) -> Float[np.ndarray, "*p"]:
        """The head's scores of pairs, plus their similarities if those are given. Equal pairs are computed once.

        image, text: indices. texts: t above; an image with fewer remaining texts is padded with copies. None: a power
        of two that fits the image with the most texts, at most 32. console: shows a progress bar on a terminal.
        Raises MmjaxError for another shape than [b, t], or NaN, from `match`.
        """
        m = int(text.max()) + 1
        ids = image.astype(np.int64) * m + text
        pairs = np.unique(ids)
        images, columns = np.divmod(pairs, m)
        if texts is None:
            texts = min(32, 1 << (int(np.bincount(images).max()) - 1).bit_length())
        groups, slots = _grouped(images, columns, texts)
        with _progress_bar(console, len(groups["image"])) as advance:
            scores = self._extractor(params, states, groups, "match", advance)
        if scores.shape != groups["texts"].shape:
            raise MmjaxError(f"match: should return scores {list(groups['texts'].shape)}, not {list(scores.shape)}")
        pair_scores = scores[slots] + (0 if similarities is None else similarities[images, columns])
        return pair_scores[np.searchsorted(pairs, ids)]


@dataclasses.dataclass(frozen=True)
class Reranker:
    """Scores shortlists by a matching head, compiled once for all shortlists and all parameters.

    Attributes:
        match, batch_size: see `PairScorer`.
        k: length of the shortlists, or all candidates if there are fewer: 256 for COCO, 128 for Flickr30k. A k below
            10 makes R@10 pessimistic.
        add_similarity: whether a score is the head's plus the similarity (BLIP, BLIP-2) or only the head's (ALBEF).
        texts: the texts of an image that are computed together.
    """

    match: Encode
    k: int
    add_similarity: bool
    texts: int = 32
    batch_size: int = 8

    @functools.cached_property
    def scorer(self) -> PairScorer:
        return PairScorer(self.match, self.batch_size)

    def __call__(
        self,
        params: Params,
        states: Any,
        similarities: Float[ArrayLike, "n m"],
        text_image: Int[ArrayLike, " m"] | None = None,
        console: Console | None = None,
    ) -> Shortlists:
        """Shortlists by similarity, and the head's scores of them.

        text_image: the image of each text; None: text i belongs to image i. console: shows a progress bar on a
            terminal.
        Raises MmjaxError naming the argument: shapes, NaN (also from `match`), k or texts below 1, an image without
        text.
        """
        if self.k < 1 or self.texts < 1:
            raise MmjaxError(f"k={self.k} and texts={self.texts}: should be at least 1")
        cosines = np.asarray(checked_scores("similarities", similarities))
        n, m = cosines.shape
        owner = owners(text_image, n, m)
        texts, images = nearest(cosines, self.k), nearest(cosines.T, self.k)
        rows, columns = np.indices(texts.shape)[0], np.indices(images.shape)[0]
        image, text = (
            np.concatenate([one.ravel(), other.ravel()]) for one, other in ((rows, images), (texts, columns))
        )
        added = cosines if self.add_similarity else None
        options = {"similarities": added, "texts": self.texts, "console": console}
        scores = self.scorer(params, states, image, text, **options)
        text_scores, image_scores = np.split(scores, [texts.size])
        return Shortlists(texts, text_scores.reshape(texts.shape), images, image_scores.reshape(images.shape), owner)


def nearest(scores: Float[np.ndarray, "b n"], k: int) -> Int[np.ndarray, "b k"]:
    """The columns of the k highest scores of each row, the highest first; all columns if there are fewer."""
    rows = max(1, BLOCK // scores.shape[1])
    blocks = (scores[start : start + rows] for start in range(0, len(scores), rows))
    return np.concatenate([np.asarray(jax.lax.top_k(block, min(k, block.shape[1]))[1]) for block in blocks])


def _grouped(image: np.ndarray, text: np.ndarray, width: int) -> tuple[dict[str, np.ndarray], Any]:
    """Pairs, sorted by image, in groups of one image and up to `width` texts; and the (group, slot) of each pair."""
    _, first, counts = np.unique(image, return_index=True, return_counts=True)
    within = np.arange(len(image)) - np.repeat(first, counts)
    group = np.cumsum(within % width == 0) - 1
    leads = np.flatnonzero(within % width == 0)
    texts = np.repeat(text[leads, None], width, 1).astype(np.int32)
    texts[group, within % width] = text
    return {"image": image[leads].astype(np.int32), "texts": texts}, (group, within % width)


@contextlib.contextmanager
def _progress_bar(console: Console | None, total: int) -> Iterator[Advance | None]:
    if console is None or not console.is_terminal:
        yield None
        return
    columns = TextColumn("matching"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RerankEvaluation(ScoredEvaluation):
    """R@K of two-stage retrieval, the mean recalls, and a picture of retrieved items.

    Attributes:
        reranker: the second stage. first: (params, state) -> (similarities [n, m], states for `match`).
        text_image: int [m], the image of each text; None: text i belongs to image i.
        sum_name: the name of the scores that the sum of head and similarity has, reported beside those of a head
            without `add_similarity`: the head runs once. None: they are not reported.
        ks: the K of R@K.
        captions, thumbnails, attribution: see `RetrievalEvaluation`; the picture needs the first two.
        console: shows the progress of the second stage; None in training, where the loop has its progress bar.
    """

    name: str = "retrieval"
    reranker: Reranker
    first: Callable[[Params, Any], tuple[ArrayLike, Any]]
    text_image: Int[ArrayLike, " m"] | None = None
    sum_name: str | None = None
    ks: tuple[int, ...] = KS
    captions: Sequence[str] | None = None
    thumbnails: np.ndarray | None = None
    attribution: str | None = None
    console: Console | None = None

    def shortlists(self, params: Params, state: Any = None) -> Shortlists:
        """The shortlists with scores, for paired tests between two models."""
        return self._both(params, state)[0]

    def _both(self, params: Params, state: Any) -> tuple[Shortlists, np.ndarray]:
        similarities, states = self.first(params, state)
        shortlists = self.reranker(params, states, similarities, self.text_image, self.console)
        return shortlists, np.asarray(similarities)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        shortlists, similarities = self._both(params, state)
        scores = self._scores(self.name, shortlists)
        if self.sum_name is not None:
            scores |= self._scores(self.sum_name, shortlists.plus(similarities))
        counts = {f"{self.name}_n": len(shortlists.texts), f"{self.name}_n_texts": len(shortlists.images)}
        picture = self._picture(shortlists) if pictures else None
        images = {} if picture is None else {f"{self.name}_picture": picture}
        return Outcome(scores, counts, images)

    def _scores(self, name: str, shortlists: Shortlists) -> dict[str, Score]:
        ranks, prefix = shortlists.ranks(), "" if name == "retrieval" else f"{name}_"
        # No median rank: outside the shortlists only a lower bound of the rank is known.
        scores = {name: score for name, score in ranks.scores(self.ks).items() if not name.endswith("median_rank")}
        scores |= ranks.mean_recalls(self.ks) | shortlists.matching()
        return {f"{prefix}{name}": score for name, score in scores.items()}

    def _picture(self, shortlists: Shortlists) -> np.ndarray | None:
        if self.thumbnails is None or self.captions is None:
            return None
        queries = shown_queries(len(shortlists.texts), shortlists.text_image)
        lists = (shortlists.texts, shortlists.text_scores), (shortlists.images, shortlists.image_scores)
        of_images, of_texts = (
            (query, np.take_along_axis(ids[query], np.argsort(-scores[query], 1, kind="stable")[:, :5], 1))
            for query, (ids, scores) in zip(queries, lists)
        )
        return retrieval_picture(
            self.thumbnails, self.captions, shortlists.text_image, of_images, of_texts, self.attribution
        )
