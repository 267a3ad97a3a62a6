"""The published annotation files of ALBEF's and BLIP's tasks: questions, pairs of images, entailment.

    QuestionList(["vqa_train.json", "vqa_val.json", "vg_qa.json"], {"vqa": coco, "vg": genome})
    QuestionList("vqa_test.json", {"vqa": coco}); read_answers("answer_list.json")
    ImagePairList("nlvr_train.json", nlvr2)
    EntailmentList("ve_train.json", flickr30k)

A record's `text` is the question or sentence, not yet cleaned; images are bytes. Captions, retrieval and RefCOCO+ are
lists of images and texts: `mmjax.data.image_text`.
"""

import collections
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from mmjax.data.annotation_list import AnnotationList, File, read_json
from mmjax.data.decoding import BadRecord
from mmjax.data.sources import Record, read_bytes
from mmjax.errors import MmjaxError


class QuestionList(AnnotationList):
    """VQA and Visual Genome (`vqa_dataset.py` of both), entries {dataset, image, question, question_id?, answer?}.

    Records {"image": bytes, "text": str}, with "question_id", int64, where the entry has one. An entry with answers
    also gives "answers", without repetitions, and "answer_weights": the share of people that gave each answer of a
    list. An answer that is no list, as in Visual Genome, has the weight `alone`.

    images: the folder of each `dataset` of the entries ("vqa", "vg").
    alone: 0.5 in ALBEF, 0.2 in BLIP.
    """

    def __init__(
        self, files: File | Sequence[File], images: Mapping[str, File], alone: float = 0.5, name: str | None = None
    ):
        """Raises MmjaxError, naming the file, as `AnnotationList` does."""
        super().__init__(files, None, name)
        self.folders = {dataset: pathlib.Path(folder) for dataset, folder in images.items()}
        self.alone = alone

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: "list: no question", "list: unknown dataset", "answer: empty", "file: missing", ..."""
        entry = self.record(index)
        record: Record = {"text": self.text(index, entry, "question")}
        if isinstance(entry.get("question_id"), int):
            record["question_id"] = np.int64(entry["question_id"])
        if "answer" in entry:
            record |= self._answers(index, entry)
        return record | {"image": read_bytes(*self.image_paths(index))}

    def image_paths(self, index: int) -> tuple[pathlib.Path, ...]:
        entry = self.record(index)
        dataset = self.field(index, entry, "dataset", str)
        if dataset not in self.folders:
            detail = f"{dataset!r}; there are folders for {', '.join(self.folders)}"
            raise BadRecord("list: unknown dataset", self.record_name(index), detail)
        return (self.image_path(index, self.field(index, entry, "image", str), self.folders[dataset]),)

    def _answers(self, index: int, entry: Mapping[str, object]) -> Record:
        value = self.field(index, entry, "answer", (str, list))
        answers = [value] if isinstance(value, str) else value
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise BadRecord("answer: empty", self.record_name(index), f"{value!r:.80}")
        counts = collections.Counter(answers)
        whole = self.alone if isinstance(value, str) else 1.0
        weights = tuple(whole * count / counts.total() for count in counts.values())
        return {"answers": tuple(counts), "answer_weights": weights}


def read_answers(file: File) -> tuple[str, ...]:
    """A JSON list of the answers to rank (`answer_list.json`, 3,128 of them).

    Raises MmjaxError naming the file, and the index of an invalid answer.
    """
    answers = read_json(pathlib.Path(file))
    if not isinstance(answers, list) or not answers:
        raise MmjaxError(f"{file}: expected a list of answers, not {type(answers).__name__}")
    wrong = next((i for i, answer in enumerate(answers) if not isinstance(answer, str) or not answer.strip()), None)
    if wrong is not None:
        raise MmjaxError(f"{file}[{wrong}]: {answers[wrong]!r:.40} is no answer")
    return tuple(answers)


class ImagePairList(AnnotationList):
    """NLVR2 (`nlvr_dataset.py`), entries {images: [left, right], sentence, label: "True" or "False"}.

    Records {"image_0": bytes, "image_1": bytes, "text": str, "label": 0 or 1}; `mmjax.data.image_pairs` augments them.
    """

    classes = ("False", "True")

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: "list: no images", "list: no sentence", "list: unknown label", "file: missing", ..."""
        entry = self.record(index)
        paths = self.image_paths(index)
        record = {"text": self.text(index, entry, "sentence"), "label": _label(self, index, entry, self.classes)}
        return record | {f"image_{side}": read_bytes(path) for side, path in enumerate(paths)}

    def image_paths(self, index: int) -> tuple[pathlib.Path, ...]:
        names = self.field(index, self.record(index), "images", list)
        if len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise BadRecord("list: no images", self.record_name(index), f"expected two names, not {names!r:.80}")
        return tuple(self.image_path(index, name) for name in names)


class EntailmentList(AnnotationList):
    """SNLI-VE (`ve_dataset.py`), entries {image: name without ".jpg", sentence, label}.

    Records {"image": bytes, "text": str, "label": the index of its label in `classes`}.
    """

    classes = ("contradiction", "neutral", "entailment")

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: "list: no image", "list: no sentence", "list: unknown label", "file: missing", ..."""
        entry = self.record(index)
        record = {"text": self.text(index, entry, "sentence"), "label": _label(self, index, entry, self.classes)}
        return record | {"image": read_bytes(*self.image_paths(index))}

    def image_paths(self, index: int) -> tuple[pathlib.Path, ...]:
        return (self.image_path(index, f"{self.field(index, self.record(index), 'image', (str, int))}.jpg"),)


def _label(source: AnnotationList, index: int, entry: Mapping[str, object], classes: tuple[str, ...]) -> int:
    value = str(source.field(index, entry, "label", (str, bool)))
    if value not in classes:
        raise BadRecord("list: unknown label", source.record_name(index), f"{value!r} is none of {', '.join(classes)}")
    return classes.index(value)
