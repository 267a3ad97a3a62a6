"""Three things to fine-tune on that every Python brings: labels from its standard library that nobody invented.

    package_texts()       documentation strings, by the package that they are from
    parameter_words()     their words, tagged where one is a parameter in the function's own signature
    return_questions()    "What does NAME return?", answered by the clause behind the word "return", or by nothing

The labels depend on the version of Python. Those of the first two are in the files; a parameter called `file` is tagged
also where the word is plain English, which no reader could know. The third comes from a rule (`RETURNS`), so it
tests whether a network learns to mark spans, not whether it understands questions.
"""

import collections
import itertools
import pathlib
import re
from collections.abc import Sequence

from mmjax.data.stdlib_docs import Documented, stdlib_documented
from mmjax.text.labelled_texts import LabelledText
from mmjax.text.squad import Question
from mmjax.text.tagged_words import TaggedWords

LEAST = 100
"""Texts of a package."""
WORD = re.compile(r"\w+|[^\w\s]")
RETURNS = re.compile(r"\b[Rr]eturns?:?\s+(?P<answer>[^.;\n]+(?:\n[ \t]*\S[^.;\n]*)?)")
"""Up to the end of the sentence, at most two lines."""
WIDEST = 60
"""The maximum of words of a text with a question."""


def package_texts(documented: Sequence[Documented] | None = None, least: int = LEAST) -> list[LabelledText]:
    """A text a documentation string, each once, of packages and modules with `least` of them; its label is the package.

    documented: what is documented; None: `stdlib_documented()`.
    """
    texts: dict[str, LabelledText] = {}
    for item in stdlib_documented() if documented is None else documented:
        package = pathlib.PurePath(item.module).parts[0].removesuffix(".py")
        texts.setdefault(item.text, LabelledText(item.text, package, location=f"{item.module}: {item.name}"))
    counts = collections.Counter(text.label for text in texts.values())
    return [text for text in texts.values() if counts[text.label] >= least]


def parameter_words(documented: Sequence[Documented] | None = None) -> list[TaggedWords]:
    """Paragraphs of functions' documentation strings that name a parameter at all; such words are B-PARAMETER."""
    sentences = []
    for item in stdlib_documented() if documented is None else documented:
        for paragraph in re.split(r"\n\s*\n", item.text):
            words = tuple(WORD.findall(paragraph))
            tags = tuple("B-PARAMETER" if word in item.parameters else "O" for word in words)
            if "B-PARAMETER" in tags:
                sentences.append(TaggedWords(words, tags, item.module, item.module))
    return sentences


def return_questions(documented: Sequence[Documented] | None = None) -> list[Question]:
    """A question per function with a documentation string of 8 to 60 words, answered by the clause on its return."""
    questions = []
    number = itertools.count()
    for item in stdlib_documented() if documented is None else documented:
        if not item.parameters or not 8 <= len(item.text.split()) <= WIDEST:
            continue
        match = RETURNS.search(item.text)
        answers = ()
        if match is not None:
            text = match["answer"].rstrip()
            answers = ((text, match.start("answer")),)
        question = f"What does {item.name} return?"
        questions.append(Question(f"{item.module}:{next(number)}", question, item.text, answers, item.module))
    return questions
