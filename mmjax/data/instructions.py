"""Conversations about images in LLaVA's format, and ShareGPT's without: JSON or JSONL.

    [{"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                          {"from": "gpt", "value": "A cup."}]}, ...]

Without `image` an entry is text alone; several images are a list. `<image>` is where an image is in the text.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.data.annotation_list import AnnotationList, File
from mmjax.data.decoding import BadRecord
from mmjax.data.sources import Record, read_bytes
from mmjax.text.interleaved import IMAGE

ROLES = {"human": 0, "user": 0, "gpt": 1, "chatgpt": 1, "assistant": 1, "bard": 1, "bing": 1}
"""Who says a turn: 0 the user, 1 the assistant. ("system", at the beginning, is left out.)"""


class InstructionList(AnnotationList):
    """Records {"turns": (str, ...), "images": (bytes, ...)}: the user's turn first, then in alternation.

    Raises MmjaxError, naming the file, if it is missing, in no known format, or empty. An entry raises BadRecord with
    its id: no turns, turns out of order, another number of `<image>` than of images, a missing file.

    image_first: a single image is before the first question unless that has `<image>` once (xGen-MM).
    """

    def __init__(self, files: File | Sequence[File], images: File | None = None, *, image_first: bool = False):
        super().__init__(files, images)
        self.image_first = image_first

    def __getitem__(self, index: int) -> Record:
        entry = self.record(index)
        turns = self.turns(index)
        paths = self.image_paths(index)
        count = sum(turn.count(IMAGE) for turn in turns)
        if count != len(paths):
            detail = f"{count} times {IMAGE} for {len(paths)} images: {turns[0][:200]!r}"
            raise BadRecord("conversation: images", self._id(index, entry), detail)
        return {"turns": turns, "images": tuple(map(read_bytes, paths))}

    def turns(self, index: int) -> tuple[str, ...]:
        """The turns of an entry. A first turn that is not the user's is left out (train.py:408)."""
        entry = self.record(index)
        said = self.field(index, entry, "conversations", list)
        turns: list[tuple[int, str]] = []
        for each in said:
            role, value = (each.get("from"), each.get("value")) if isinstance(each, Mapping) else (None, None)
            if role == "system" and not turns:
                continue
            if role not in ROLES or not isinstance(value, str):
                raise BadRecord("conversation: no turn", self._id(index, entry), f"{each!r:.200}")
            turns.append((ROLES[role], value))
        turns = turns[1:] if turns and turns[0][0] else turns
        if not turns or any(role != i % 2 for i, (role, _) in enumerate(turns)):
            raise BadRecord(
                "conversation: order", self._id(index, entry), f"the roles are {[role for role, _ in turns]}"
            )
        texts = [value for _, value in turns]
        if self.image_first and len(self.image_paths(index)) == 1 and texts[0].count(IMAGE) != 1:
            texts[0] = f"{IMAGE}\n{texts[0].replace(IMAGE, '').strip()}"
        return tuple(texts)

    def image_paths(self, index: int) -> tuple[pathlib.Path, ...]:
        image = self.record(index).get("image")
        names = [image] if isinstance(image, str) else image or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadRecord("list: no image named", self._id(index, self.record(index)), f"image is {image!r:.80}")
        return tuple(self.image_path(index, name) for name in names if name)

    def _id(self, index: int, entry: Mapping[str, Any]) -> str:
        return f"{self.record_name(index)} (id {entry.get('id')!r})"
