"""The published protocols of image-text tasks, for a loaded model and the original's annotation files.

pairs = ImageTextList("coco_test.json", "coco/images")
result = retrieval(model, pairs, k=256)
result.scores["text_to_image_R@1"], result.facts          # the formula and k that were used
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mmjax.data.annotation_list import AnnotationList, check_images
from mmjax.data.decoding import decode_image
from mmjax.data.image_text import ImageTextList, retrieval_texts
from mmjax.data.referring import Reference, ReferringList
from mmjax.data.task_lists import EntailmentList, ImagePairList, QuestionList
from mmjax.errors import MmjaxError
from mmjax.evaluation.captions import caption_scores
from mmjax.evaluation.classification import accuracy
from mmjax.evaluation.grounding import Referred, grounding_scores
from mmjax.evaluation.report import Score
from mmjax.evaluation.rerank import RerankEvaluation
from mmjax.evaluation.retrieval import ranks_of_features, ranks_of_scores
from mmjax.evaluation.two_stage import TwoStages
from mmjax.evaluation.vqa import HumanAnswers, vqa_scores
from mmjax.interface.answers import AnsweringModel
from mmjax.interface.grounding import GroundingModel
from mmjax.interface.image_text import ImageTextModel
from mmjax.interface.model import Model
from mmjax.interface.two_stage import TwoStageModel
from mmjax.types import Array

CHUNK = 64
"""Records that are decoded at a time; 113 MB of pixels at 384 x 384."""
Track = Callable[[Sequence[int]], Iterable[int]]
"""Starts of chunks -> the same, for a progress bar."""


class Protocol(NamedTuple):
    """What a protocol gives.

    scores: by name, with intervals; none where the files have no answers. facts: the formula and settings that were
    used. predictions: one for each record, in the order of the list.
    """

    scores: Mapping[str, Score]
    facts: Mapping[str, Any]
    predictions: Sequence[Any] = ()


def questions(
    model: Any,
    source: QuestionList,
    answers: Sequence[str] | None = None,
    human: Sequence[HumanAnswers] = (),
    k: int = 128,
    limit: int | None = None,
    track: Track = iter,
) -> Protocol:
    """VQA accuracy. answers: the list to rank; None: answers are written.

    human: the official annotations; (): the lists of ten answers in the entries themselves, if they have them.
    limit: the number of first records. The predictions are answers, for the server where nobody's answers are known.
    Raises MmjaxError for a model that answers no questions, or ranks no list, missing images, or a question without
    human answers.
    """
    _check(model, Model, "answer", "answers no questions")
    if "pixel_values" not in model.inputs(model.config):
        raise MmjaxError(f"this {model.system} answers no questions about images")
    if answers is not None:
        _check(model, AnsweringModel, "answer", "ranks no list of answers; without one it writes them")
    rules = model.answer_rules if isinstance(model, AnsweringModel) else None
    n = record_count(source, limit)
    predictions: list[str] = []
    for records in chunks(source, n, track):
        images, texts = [record_image(source, record) for record in records], [record["text"] for record in records]
        if answers is None:
            options: dict[str, Any] = {} if rules is None else {"batch_size": 16}
            predictions += model.answer(images, texts, **options)
        else:
            predictions += [best[0][0] for best in model.answer(images, texts, answers, k=k, batch_size=4)]
    judged = human_answers(source, n, human)
    own = "the model's own decoding" if rules is None else str(rules.generation)
    facts: dict[str, Any] = {"answers": "written", "generation": own}
    if answers is not None and rules is not None:
        formula = "log p(all tokens)" + " + log p(first token)" * rules.add_first_token
        facts = {"answers": f"ranked, of {len(answers)}", "k": min(k, len(answers)), "formula": formula}
        facts["label_smoothing"] = rules.label_smoothing
    return Protocol(vqa_scores(predictions[:n], judged) if judged else {}, facts, predictions[:n])


def pair_classes(
    model: Any, source: ImagePairList | EntailmentList, limit: int | None = None, track: Track = iter
) -> Protocol:
    """Accuracy of NLVR2 (two images and a sentence) or SNLI-VE (one image and a sentence).

    The predictions are names of classes. Raises MmjaxError for a model without a head of these classes, or missing
    images.
    """
    _check(model, TwoStageModel, "classify_pairs", "has no head of classes of pairs")
    two, names = isinstance(source, ImagePairList), model.class_names()
    if model.config.two_images != two:
        raise MmjaxError(f"{source.name}: texts of {1 + two} images; this {model.system} classifies those of {2 - two}")
    if len(names) != len(source.classes) or not (model.labels == () or set(names) == set(source.classes)):
        raise MmjaxError(f"{source.name}: classes {', '.join(source.classes)}; the model's are {', '.join(names)}")
    # A head whose classes have no names has them in the original's order.
    order = [names.index(name) if model.labels else i for i, name in enumerate(source.classes)]
    n = record_count(source, limit)
    logits, labels = [], []
    for records in chunks(source, n, track):
        keys = ("image_0", "image_1") if two else ("image",)
        images = [[record_image(source, record, key) for record in records] for key in keys]
        logits.append(np.asarray(model.pair_logits("classify", [record["text"] for record in records], 16, *images)))
        labels += [record["label"] for record in records]
    predicted = np.argmax(np.concatenate(logits)[:n][:, order], 1)
    scores = {"accuracy": accuracy(predicted, np.asarray(labels[:n]))}
    return Protocol(scores, {"classes": list(source.classes)}, [source.classes[i] for i in predicted])


def retrieval(
    model: Any,
    source: ImageTextList,
    k: int = 128,
    add_similarity: bool | None = None,
    limit: int | None = None,
    track: Track = iter,
) -> Protocol:
    """R@K of images and texts in two stages; with k=0 by the similarity of their features alone, for CLIP too.

    add_similarity: whether the ITM head's logit and the similarity are added; None: as in the system's original.
    Raises MmjaxError for a model without features or ITM head, missing images, or an entry without a text.
    """
    _check(model, ImageTextModel, "retrieve", "has no features of images and texts")
    if k:
        _check(model, TwoStageModel, "match", "has no ITM head; k=0 ranks by similarity alone")
    n = record_count(source, limit)
    texts, owner = retrieval_texts(source)
    texts, owner = texts[: int((owner < n).sum())], owner[owner < n]
    if not k:
        features = [
            model.encode_image([record_image(source, r) for r in records]) for records in chunks(source, n, track)
        ]
        images, text_features = jnp.concatenate(features)[:n], model.encode_text(list(texts))
        if images.ndim == 2:
            ranks = ranks_of_features(images, text_features, owner)
        else:  # several features of an image
            ranks = ranks_of_scores(model.similarity(images, text_features), owner)
        return Protocol(ranks.scores() | ranks.mean_recalls(), {"formula": "similarity"})
    preprocess, add = model.preprocess, model.add_similarity if add_similarity is None else add_similarity
    parts = chunks(source, n, track)
    images = [preprocess.to_uint8(record_image(source, record)) for records in parts for record in records][:n]
    ids, mask = model.columns(list(texts), model.rules.length)

    def pixels(images: Array) -> Array:
        return (images.astype(jnp.float32) / 255 - jnp.asarray(preprocess.mean)) / jnp.asarray(preprocess.std)

    stages = TwoStages(model.apply, pixels, batch_size=32, similarity=model.similarity)
    first = functools.partial(stages.first, np.stack(images), {"input_ids": ids, "attention_mask": mask})
    evaluation = RerankEvaluation(reranker=stages.reranker(k, add), first=first, text_image=owner)
    formula = "ITM logit" + " + similarity" * add
    return Protocol(evaluation.scores(model.variables), {"formula": formula, "k": min(k, n), "images": n})


def captions(model: Any, source: ImageTextList, limit: int | None = None, track: Track = iter) -> Protocol:
    """BLEU, ROUGE-L and CIDEr of the model's captions, by its own decoding, against the texts of the list.

    The predictions are captions. Raises MmjaxError for a model that writes no captions, or missing images.
    """
    _check(model, Model, "caption", "writes no captions")
    n = record_count(source, limit)
    predictions: list[str] = []
    for records in chunks(source, n, track):
        predictions += model.caption([record_image(source, record) for record in records])
    scores = caption_scores(predictions[:n], reference_texts(source, n), True)
    return Protocol(scores, {"formula": "the model's own decoding"}, predictions[:n])


def grounding(
    model: Any,
    source: ReferringList,
    references: Mapping[int, Reference],
    proposals: Mapping[int, np.ndarray],
    block: int | None = None,
    limit: int | None = None,
    track: Track = iter,
) -> Protocol:
    """RefCOCO+ as ALBEF evaluates it: the proposed box with the most Grad-CAM, right at an IoU of a half.

    The predictions are {"ref_id", "box"}. Raises MmjaxError for a model without an ITM head, missing images, or an
    expression without a reference or without proposals.
    """
    _check(model, GroundingModel, "ground", "has no ITM head to ground texts with")
    n = record_count(source, limit)
    maps: list[np.ndarray] = []
    expressions: list[Referred] = []
    for records in chunks(source, n, track):
        images = [record_image(source, record) for record in records]
        maps += list(np.asarray(model.heat_maps(images, [record["text"] for record in records], block)[0]))
        for record in records:
            reference = references.get(record["ref_id"])
            if reference is None or reference.image not in proposals:
                what = "annotated object" if reference is None else f"proposed boxes for its image {reference.image}"
                raise MmjaxError(f"{source.name}: ref_id {record['ref_id']} has no {what}")
            boxes = proposals[reference.image]
            expressions.append(Referred(reference.box, boxes, reference.size, reference.split, reference.image))
    scores, reused = grounding_scores(np.stack(maps[:n]), expressions[:n])
    facts = {"formula": "Grad-CAM in a box / sqrt(area)", "block": model.grounding_block(block), "reused": reused}
    return Protocol(scores, facts)


# --------------------------------------------------------------------------------------------------------------- parts


def _check(model: Any, kind: type, ability: str, problem: str) -> None:
    if not isinstance(model, kind) or ability not in model.abilities:
        raise MmjaxError(f"this {model.system} {problem}")


def record_count(source: AnnotationList, limit: int | None) -> int:
    """The number of records; their images are checked first, as a score needs all."""
    if limit is not None and limit < 1:
        raise MmjaxError(f"limit={limit}: should be at least 1")
    n = len(source) if limit is None else min(limit, len(source))
    check_images(source, n)
    return n


def chunks(source: AnnotationList, n: int, track: Track, first: int = 0) -> Iterable[list[Mapping[str, Any]]]:
    """The first n records, from `first` on, in chunks of one size; the last is filled up with copies, so that nothing
    compiles twice."""
    size = min(CHUNK, n)
    for start in track(range(first, n, size)):
        yield [source[min(index, n - 1)] for index in range(start, start + size)]


def record_image(source: AnnotationList, record: Mapping[str, Any], key: str = "image") -> np.ndarray:
    return decode_image(record[key], source.name)


def reference_texts(source: ImageTextList, n: int) -> list[list[str]]:
    """The texts of each of the first n images."""
    texts, owner = retrieval_texts(source)
    return [list(texts[slice(*np.searchsorted(owner, [i, i + 1]))]) for i in range(n)]


def human_answers(source: QuestionList, n: int, human: Sequence[HumanAnswers]) -> list[HumanAnswers]:
    """Those of `human` or, if there are none, the lists of answers in the entries; []: there are none.

    A list of one answer, as of scenes, is that of ten people: the accuracy is then the share of equal answers.
    """
    entries = [source.record(index) for index in range(n)]
    if human:
        by_id = {one.question: one for one in human}
        unknown = [entry.get("question_id") for entry in entries if entry.get("question_id") not in by_id]
        if unknown:
            raise MmjaxError(f"{source.name}: {len(unknown)} questions have no human answers: question_id {unknown[0]}")
        return [by_id[entry["question_id"]] for entry in entries]
    judged = []
    for index, entry in enumerate(entries):
        texts = entry.get("answer")
        if not isinstance(texts, list) or not texts:
            return []
        people = tuple(texts) if len(texts) > 1 else tuple(texts) * 10
        judged.append(HumanAnswers(entry.get("question_id", index), people, str(entry["image"])))
    return judged
