"""Lists of images and texts in the published formats: COCO, Karpathy, BLIP, ALBEF, LLaVA (JSON, JSONL), CSV and TSV.

The fields of an entry:
    image           image, file_name, filename, filepath, image_path, img (in that order); below the `images` folder
    text, texts     caption, captions, text, title, sentences: a string, a list of strings, or Karpathy's [{"raw": ...}]
    all other fields pass through under their names (conversations, question, answer, id, ...)
COCO's {"images": [...], "annotations": [...]} gives one record an image, with all its captions in `texts`.

    ImageTextList(["coco.json", "vg.json", "cc3m.jsonl"], images)       # ALBEF's and BLIP's pre-training and captioning
    ImageTextList("coco_train.json", images, numbered=True)             # retrieval; refcoco+_train.json as well
    ImageTextList("coco_test.json", images); retrieval_texts(it)        # and to evaluate it
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mmjax.data.annotation_list import AnnotationList, File
from mmjax.data.decoding import BadRecord, clean_caption
from mmjax.data.sources import Record, read_bytes
from mmjax.errors import MmjaxError

IMAGE_KEYS = ("image", "file_name", "filename", "filepath", "image_path", "img")
TEXT_KEYS = ("caption", "captions", "text", "title", "sentences")


class ImageTextList(AnnotationList):
    """Records {"image": bytes, "text": str, "texts": (str, ...), ...} of annotation files.

    numbered: `image_id` is then a number from 0, the same for all entries of one image. Entries are of one image if
        they have one `image_id` in the files or, without any, one path. Numbers follow the order of first occurrence.

    Raises MmjaxError, naming the file, if it is missing, in no known format, or empty.
    """

    def __init__(
        self,
        files: File | Sequence[File],
        images: File | None = None,
        name: str | None = None,
        numbered: bool = False,
    ):
        super().__init__(files, images, name)
        self._numbers = self._numbered() if numbered else None

    def __getitem__(self, index: int) -> Record:
        entry = self.record(index)
        name = self._named(index, entry)
        record: Record = {key: value for key, value in entry.items() if key not in (*IMAGE_KEYS, *TEXT_KEYS)}
        if self._numbers is not None:
            record["image_id"] = int(self._numbers[index])
        texts = _texts(entry, f"{self.record_name(index)} {name}")
        if texts:
            record |= {"text": texts[0], "texts": texts}
        return record | {"image": read_bytes(self.image_path(index, name))}

    def image_paths(self, index: int) -> tuple[pathlib.Path, ...]:
        return (self.image_path(index, self._named(index, self.record(index))),)

    def _named(self, index: int, entry: Mapping[str, Any]) -> str:
        name = self._image_name(entry)
        if name is None:
            raise BadRecord("list: no image named", self.record_name(index), f"keys {sorted(entry)[:8]}")
        return name

    def _numbered(self) -> Int[np.ndarray, " n"]:
        """The image's number of each entry, int32 [n]. A bad entry has a unique number, which nothing uses."""
        numbers_by_name: dict[Any, int] = {}
        numbers = np.empty(len(self), np.int32)
        for index in range(len(self)):
            try:
                entry = self.record(index)
                value = entry.get("image_id")
                image_key: Any = value if isinstance(value, int | str) else (self._image_name(entry), "path")
            except BadRecord:
                image_key = (index, "bad")
            numbers[index] = numbers_by_name.setdefault(image_key, len(numbers_by_name))
        return numbers

    @staticmethod
    def _image_name(entry: Mapping[str, Any]) -> str | None:
        return next((entry[key] for key in IMAGE_KEYS if isinstance(entry.get(key), str) and entry[key]), None)


def retrieval_texts(pairs: ImageTextList) -> tuple[tuple[str, ...], Int[np.ndarray, " m"]]:
    """The m texts of a list, image by image, not yet cleaned; and the index of each text's record, so its image: [m].

    Raises MmjaxError, naming the record, for one without a text or with a text that is no string: a score needs all.
    """
    texts: list[str] = []
    indices: list[int] = []
    for index in range(len(pairs)):
        captions = _texts(pairs.record(index), pairs.record_name(index))
        if not captions:
            raise MmjaxError(f"{pairs.record_name(index)}: no text, under none of {', '.join(TEXT_KEYS)}")
        texts += captions
        indices += [index] * len(captions)
    return tuple(texts), np.array(indices, np.int32)


def _texts(entry: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value: Any = next((entry[key] for key in TEXT_KEYS if entry.get(key) is not None), None)
    if value is None:
        return ()
    several = value if isinstance(value, list | tuple) else [value]
    raw: list[Any] = [text.get("raw") if isinstance(text, Mapping) else text for text in several]
    if not raw:
        raise BadRecord("caption: empty", name)
    return tuple(clean_caption(text, name) for text in raw)
