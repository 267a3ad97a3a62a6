"""Plain text files as documents of sentences, for masked language modelling.

>>> split_sentences("One ends. Two follows! A third.")
['One ends.', 'Two follows!', 'A third.']
"""

import os
import pathlib
import re

from mmjax.errors import MmjaxError

SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]*[A-Z0-9])")


def split_sentences(text: str) -> list[str]:
    """Sentences of prose: a new one begins at a capital or digit after a full stop, and at an empty line.

    Abbreviations before names also end sentences, which is harmless for masked language modelling.
    """
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [sentence for paragraph in paragraphs if paragraph for sentence in SENTENCE_END.split(paragraph)]


def read_documents(folder: str | os.PathLike[str], prose: bool = False) -> dict[str, list[str]]:
    """Name -> sentences of every .txt file below a folder, in the order of names.

    A file has one sentence per line and an empty line between documents, as in google-research/bert; with `prose` it is
    one document, split by `split_sentences`.
    Raises MmjaxError: no such folder, no text in it, or a file that is not UTF-8.
    """
    root, result = pathlib.Path(folder), {}
    for file in sorted(root.rglob("*.txt")):
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MmjaxError(f"{file}: {error}") from error
        name = file.relative_to(root).as_posix()
        if prose:
            documents = [split_sentences(text)]
        else:
            documents = [
                [line.strip() for line in part.splitlines() if line.strip()] for part in re.split(r"\n\s*\n", text)
            ]
        numbered = [document for document in documents if document]
        result |= {f"{name}#{i}" if len(numbered) > 1 else name: document for i, document in enumerate(numbered)}
    if not result:
        raise MmjaxError(f"{folder}: no .txt file with text in it")
    return result
