"""Flamingo's evaluation: captions or answers after 0, 4, 8, 16 and 32 examples of a support list.

    support = ImageTextList("coco_train.json", images)
    series = by_shots(model, ImageTextList("coco_test.json", images), support, (0, 4, 8), selection="rices")
    series[4].scores["cider"], series[4].facts["prompt"]

Prompts and rules are OpenFlamingo's (eval/evaluate.py): see `mmjax.interface.few_shot`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from etils import epath

from mmjax import tree
from mmjax.data.image_text import ImageTextList
from mmjax.data.task_lists import QuestionList
from mmjax.errors import MmjaxError
from mmjax.evaluation.captions import caption_scores
from mmjax.evaluation.vqa import HumanAnswers, vqa_scores
from mmjax.interface.few_shot import CAPTIONS, QUESTIONS, Example, FewShot, FewShotModel, Selection
from mmjax.interface.protocols import (
    Protocol,
    Track,
    chunks,
    human_answers,
    record_count,
    record_image,
    reference_texts,
)

SHOTS = (0, 4, 8, 16, 32)
"""The paper's numbers of shots."""


def by_shots(
    model: FewShotModel,
    source: ImageTextList | QuestionList,
    support: ImageTextList | QuestionList,
    shots: Sequence[int] = SHOTS,
    selection: Selection = "shared",
    seed: int = 42,
    human: Sequence[HumanAnswers] = (),
    limit: int | None = None,
    folder: epath.Path | None = None,
    track: Track = iter,
) -> dict[int, Protocol]:
    """Number of shots -> the scores of captions (BLEU, ROUGE-L, CIDEr) or of short answers (VQA accuracy).

    source, support: both lists of captions, or both of questions. An example has the first text of its record.
    selection: see `FewShot`; OpenFlamingo's is "random".
    human, limit: as of `mmjax.interface.protocols.questions`.
    folder: predictions are stored in it after every chunk of records, a file for each number of shots, and a second
        run goes on behind them. A file of other weights, data or settings is not used.
    Raises MmjaxError for a model without examples in its prompts, lists of two kinds, missing images, an image of the
    source in the support, fewer examples than shots, or a prompt that is longer than the model's positions.
    """
    if not isinstance(model, FewShotModel):
        raise MmjaxError(f"this {model.system} takes no examples in its prompts")
    asks = isinstance(source, QuestionList)
    if asks != isinstance(support, QuestionList):
        raise MmjaxError(f"{source.name} and {support.name}: one has questions, the other captions")
    wrong = next((k for k in shots if not 0 <= k <= len(support)), None)
    if wrong is not None or not shots:
        raise MmjaxError(f"shots={tuple(shots)} of {len(support)} examples in {support.name}")
    n = record_count(source, limit)
    record_count(support, None)
    _check_apart(source, support, n)
    template = QUESTIONS if asks else CAPTIONS
    few_shot = FewShot(model, examples_of(support), template, max(shots), selection, seed)
    judged = human_answers(source, n, human) if isinstance(source, QuestionList) else []
    common = {"weights": fingerprint(model.variables), "data": source.fingerprint, "support": support.fingerprint}
    series = dict[int, Protocol]()
    for k in shots:
        one = few_shot.with_shots(k)
        first = source[0]
        prompt = one.prompts([record_image(source, first)], [first["text"]] if asks else None)[0]
        facts = {**common, **one.facts(), "generation": one.generation, "records": n, "prompt": prompt}
        file = None if folder is None else folder / f"{k}_shots.jsonl"
        predictions = _predictions(one, source, n, Progress(file, facts), track)
        if isinstance(source, QuestionList):
            scores = vqa_scores(predictions, judged) if judged else {}
        else:
            scores = caption_scores(predictions, reference_texts(source, n), True)
        series[k] = Protocol(scores, facts, predictions)
    return series


def examples_of(support: ImageTextList | QuestionList) -> list[Example]:
    """The records of a list as examples, whose images are paths.

    Raises MmjaxError for a record without a text or an answer.
    """
    paths = [str(support.image_paths(index)[0]) for index in range(len(support))]
    if not isinstance(support, QuestionList):
        texts = reference_texts(support, len(support))
        return [Example(path, captions[0]) for path, captions in zip(paths, texts)]
    examples = []
    for index, path in enumerate(paths):
        answers = support.record(index).get("answer")
        answer = answers if isinstance(answers, str) else next(iter(answers or ()), None)
        if not isinstance(answer, str) or not answer.strip():
            raise MmjaxError(f"{support.record_name(index)}: no answer; an example needs one")
        question = support.text(index, support.record(index), "question")
        examples.append(Example(path, answer.strip(), question))
    return examples


class Progress:
    """Predictions in a file of JSON lines: what they depend on, then one a line.

    file: None: they are in memory alone. Those of a file with the same facts are there at the start.
    """

    def __init__(self, file: epath.Path | None, facts: Mapping[str, Any]):
        self.file, self.first, self.predictions = file, json.dumps(facts, sort_keys=True), list[str]()
        if file is not None and file.exists():
            first, *lines = file.read_text().splitlines() or [""]
            self.predictions = [json.loads(line) for line in lines] if first == self.first else []

    def add(self, predictions: Sequence[str]) -> None:
        """Stores more of them, in a file that replaces the former as a whole."""
        self.predictions += predictions
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            new = self.file.with_suffix(".new")
            lines = [self.first, *(json.dumps(text, ensure_ascii=False) for text in self.predictions)]
            new.write_text("\n".join(lines) + "\n")
            new.replace(self.file)


def fingerprint(variables: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the names, shapes and sums of all arrays: other weights have others."""
    digest = hashlib.sha256()
    leaves = {path: leaf for path, leaf in sorted(tree.flatten(variables).items()) if hasattr(leaf, "shape")}
    for (path, leaf), total in zip(leaves.items(), _sums(leaves.values())):
        digest.update(f"{path} {leaf.shape} {leaf.dtype} {total!r};".encode())
    return digest.hexdigest()[:16]


def _sums(leaves: Any) -> Iterator[float]:
    return (float(jnp.sum(jnp.abs(jnp.asarray(leaf).astype(jnp.float32)))) for leaf in leaves)


def _predictions(
    few_shot: FewShot, source: ImageTextList | QuestionList, n: int, progress: Progress, track: Track
) -> list[str]:
    first = len(progress.predictions)
    for records in chunks(source, n, track, first):
        images = [record_image(source, record) for record in records]
        questions = [record["text"] for record in records] if isinstance(source, QuestionList) else None
        texts = few_shot(images, questions, first)
        progress.add(texts[: n - first])
        first += len(records)
    return progress.predictions


def _check_apart(source: ImageTextList | QuestionList, support: ImageTextList | QuestionList, n: int) -> None:
    queries = {path.resolve() for index in range(n) for path in source.image_paths(index)}
    both = [path for i in range(len(support)) for path in support.image_paths(i) if path.resolve() in queries]
    if both:
        raise MmjaxError(
            f"{support.name}: {len(both)} of its images are in {source.name} too, {both[0]} for one: "
            "an example would show the answer"
        )
