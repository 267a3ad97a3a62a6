"""The published annotation files of ALBEF's and BLIP's tasks: questions, pairs of images, entailment.

    QuestionList(["vqa_train.json", "vqa_val.json", "vg_qa.json"], {"vqa": coco, "vg": genome})
    QuestionList("vqa_test.json", {"vqa": coco}); read_answers("answer_list.json")
    ImagePairList("nlvr_train.json", nlvr2)
    EntailmentList("ve_train.json", flickr30k)

A record's `text` is what is said or asked, not yet cleaned; images are bytes. Captions, retrieval and RefCOCO+ are
lists of images and texts: `mmjax.data.image_text`.
"""

import collections
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from mmjax.data.annotation_list import AnnotationList, File, read_json
from mmjax.data.decoding import BadRecord
from mmjax.data.sources import Record
from mmjax.errors import MmjaxError


class QuestionList(AnnotationList):
    """VQA and Visual Genome (`vqa_dataset.py` of both), rows {dataset, image, question, question_id?, answer?}.

    Records {"image": bytes, "text": str}; with "question_id", int64, where the row has one; and where it has answers
    with "answers", each once, and "answer_weights": in a list, of so many people, the share of each; of one answer,
    as in Visual Genome, `alone`.

    images: the folder of each `dataset` of the rows ("vqa", "vg").
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
        row = self.row(index)
        record: Record = {"text": self.text(index, row, "question")}
        if isinstance(row.get("question_id"), int):
            record["question_id"] = np.int64(row["question_id"])
        if "answer" in row:
            record |= self._answers(index, row)
        dataset = self.field(index, row, "dataset", str)
        if dataset not in self.folders:
            told = f"{dataset!r}; there are folders for {', '.join(self.folders)}"
            raise BadRecord("list: unknown dataset", self.record_name(index), told)
        return record | {"image": self.image(index, self.field(index, row, "image", str), self.folders[dataset])}

    def _answers(self, index: int, row: Mapping[str, object]) -> Record:
        told = self.field(index, row, "answer", (str, list))
        given = [told] if isinstance(told, str) else told
        if not given or not all(isinstance(answer, str) and answer.strip() for answer in given):
            raise BadRecord("answer: empty", self.record_name(index), f"{told!r:.80}")
        counts = collections.Counter(given)
        whole = self.alone if isinstance(told, str) else 1.0
        weights = tuple(whole * count / counts.total() for count in counts.values())
        return {"answers": tuple(counts), "answer_weights": weights}


def read_answers(file: File) -> tuple[str, ...]:
    """A JSON list of the answers to rank (`answer_list.json`, 3,128 of them).

    Raises MmjaxError naming the file, and the place of what is no answer.
    """
    told = read_json(pathlib.Path(file))
    if not isinstance(told, list) or not told:
        raise MmjaxError(f"{file}: want a list of answers, found {type(told).__name__}")
    wrong = next((i for i, answer in enumerate(told) if not isinstance(answer, str) or not answer.strip()), None)
    if wrong is not None:
        raise MmjaxError(f"{file}[{wrong}]: {told[wrong]!r:.40} is no answer")
    return tuple(told)


class ImagePairList(AnnotationList):
    """NLVR2 (`nlvr_dataset.py`), rows {images: [left, right], sentence, label: "True" or "False"}.

    Records {"image_0": bytes, "image_1": bytes, "text": str, "label": 0 or 1}; `mmjax.data.image_pairs` augments them.
    """

    classes = ("False", "True")

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: "list: no images", "list: no sentence", "list: unknown label", "file: missing", ..."""
        row = self.row(index)
        names = self.field(index, row, "images", list)
        if len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise BadRecord("list: no images", self.record_name(index), f"want two names, found {names!r:.80}")
        record = {"text": self.text(index, row, "sentence"), "label": _label(self, index, row, self.classes)}
        return record | {f"image_{side}": self.image(index, name) for side, name in enumerate(names)}


class EntailmentList(AnnotationList):
    """SNLI-VE (`ve_dataset.py`), rows {image: name without ".jpg", sentence, label}.

    Records {"image": bytes, "text": str, "label": the place of its label among `classes`}.
    """

    classes = ("contradiction", "neutral", "entailment")

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord: "list: no image", "list: no sentence", "list: unknown label", "file: missing", ..."""
        row = self.row(index)
        record = {"text": self.text(index, row, "sentence"), "label": _label(self, index, row, self.classes)}
        return record | {"image": self.image(index, f"{self.field(index, row, 'image', (str, int))}.jpg")}


def _label(source: AnnotationList, index: int, row: Mapping[str, object], classes: tuple[str, ...]) -> int:
    told = str(source.field(index, row, "label", (str, bool)))
    if told not in classes:
        raise BadRecord("list: unknown label", source.record_name(index), f"{told!r} is none of {', '.join(classes)}")
    return classes.index(told)
