"""Plain text files as documents of sentences: what masked language modelling is trained on."""

import os
import pathlib
import re

from mmjax.errors import MmjaxError

SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]*[A-Z0-9])")


def split_sentences(text: str) -> list[str]:
    """Sentences of prose: a new one begins at a capital or digit behind a full stop, and at an empty line.

    Abbreviations before names are cut too; what predicts masked words does not mind.
    """
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return [sentence for paragraph in paragraphs if paragraph for sentence in SENTENCE_END.split(paragraph)]


def read_documents(folder: str | os.PathLike[str], prose: bool = False) -> dict[str, list[str]]:
    """Name -> sentences, of every .txt file below a folder, in the order of their names.

    A file has a sentence a line and an empty line between documents, as google-research/bert takes it; prose: it is one
    document, and is cut by `split_sentences`.
    Raises MmjaxError: no such folder, no text in it, or a file that is not UTF-8.
    """
    root, found = pathlib.Path(folder), {}
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
        found |= {f"{name}#{i}" if len(numbered) > 1 else name: document for i, document in enumerate(numbered)}
    if not found:
        raise MmjaxError(f"{folder}: no .txt file with text in it")
    return found
