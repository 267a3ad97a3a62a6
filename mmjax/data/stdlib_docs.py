"""English that every Python brings: the documentation strings of its standard library, read and never imported."""

import ast
import os
import pathlib
import sysconfig
import warnings
from collections.abc import Iterator
from typing import Any

from mmjax.text.documents import split_sentences

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
TOPICS = "pydoc_data/topics.py"
"""What `help()` shows of the language itself: one string a topic."""


def stdlib_documents(root: str | os.PathLike[str] | None = None, least: int = 4) -> dict[str, list[str]]:
    """Name -> sentences: a document a module, of all its documentation strings, and one for each topic of `help()`.

    root: the folder of modules; None: this Python's library, which differs from one version to another.
    least: sentences of a document; shorter ones are left out.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    texts: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if SKIPPED & set(name.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in strings
                tree = ast.parse(file.read_text("utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        if name.as_posix() == TOPICS:
            texts |= {f"{TOPICS}#{topic}": [text] for topic, text in _topics(tree)}
        else:
            texts[name.as_posix()] = list(_docstrings(tree))
    cut = {name: [s for text in parts for s in split_sentences(text)] for name, parts in texts.items()}
    return {name: sentences for name, sentences in cut.items() if len(sentences) >= least}


def _docstrings(node: Any) -> Iterator[str]:
    """Of a module, a class or a function, and of those inside; not of what stands under an `if`."""
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield str(key.value), value.value
