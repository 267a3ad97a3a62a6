"""English that every Python brings: the documentation strings of its standard library, read and never imported."""

import ast
import os
import pathlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmjax.text.documents import split_sentences

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
TOPICS = "pydoc_data/topics.py"
"""The topics of `help()` about the language itself: one string each."""


def stdlib_documents(root: str | os.PathLike[str] | None = None, least: int = 4) -> dict[str, list[str]]:
    """Name -> sentences: a document a module, of all its documentation strings, and one for each topic of `help()`.

    root: the folder of modules; None: this Python's library, which differs from one version to another.
    least: the minimum of sentences in a document; shorter ones are omitted.
    """
    texts: dict[str, list[str]] = {}
    for name, tree in _modules(root):
        if name == TOPICS:
            texts |= {f"{TOPICS}#{topic}": [text] for topic, text in _topics(tree)}
        else:
            texts[name] = [documented.text for documented in _documented(tree, name)]
    cut = {name: [s for text in parts for s in split_sentences(text)] for name, parts in texts.items()}
    return {name: sentences for name, sentences in cut.items() if len(sentences) >= least}


@dataclass(frozen=True)
class Documented:
    """A function, class or module with its documentation string.

    Attributes:
        module: its file, "email/message.py".
        name: of the function, class or module, without its parents.
        parameters: of a function, without self and cls; () of others.
        text: the string, its lines without indentation.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    text: str


def stdlib_documented(root: str | os.PathLike[str] | None = None) -> list[Documented]:
    """Every module, class and function with a documentation string, but for those under an `if` and in functions."""
    return [documented for name, tree in _modules(root) if name != TOPICS for documented in _documented(tree, name)]


def _modules(root: str | os.PathLike[str] | None) -> Iterator[tuple[str, ast.Module]]:
    """(file, content) of each module that can be read, by name."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if SKIPPED & set(name.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in strings
                yield name.as_posix(), ast.parse(file.read_text("utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue


def _documented(node: Any, module: str) -> Iterator[Documented]:
    """A module, a class or a function, and those inside; none under an `if`."""
    text = ast.get_docstring(node)
    if text:
        name = getattr(node, "name", pathlib.PurePath(module).stem)
        yield Documented(module, name, _parameters(getattr(node, "args", None)), text)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, module)


def _parameters(arguments: ast.arguments | None) -> tuple[str, ...]:
    if arguments is None:
        return ()
    every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    return tuple(a.arg for a in every if a is not None and a.arg not in ("self", "cls"))


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield str(key.value), value.value
