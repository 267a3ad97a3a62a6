"""The verbs that generate text: generate, chat."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import rich

from mmjax.cli.loading import load
from mmjax.errors import MmjaxError
from mmjax.interface.generation import GeneratingModel


def generate(source: str, prompts: Sequence[str], loading: dict[str, Any], options: dict[str, Any]) -> None:
    """Prints each prompt with its generated text; that of a single prompt is streamed.

    loading: keywords of `hub.load`; options: of `generate`.
    """
    model = load(source, **loading)
    if not isinstance(model, GeneratingModel):
        raise MmjaxError(f"{model.system} does not generate text")
    if len(prompts) == 1 and options.get("num_beams", 1) == 1 and options.get("num_return_sequences", 1) == 1:
        _print_pieces(model.stream(prompts[0], **options), prompts[0] if model.padding_side == "left" else "")
        return
    for prompt, generated in zip(prompts, model.generate(list(prompts), **options)):
        for text in [generated] if isinstance(generated, str) else generated:
            rich.get_console().rule()
            print(f"{prompt if model.padding_side == 'left' else ''}{text}")


def chat(source: str, system: str | None, loading: dict[str, Any], options: dict[str, Any]) -> None:
    """A conversation: each line of standard input is a turn."""
    from mmjax.models.language.conversation import Conversation
    from mmjax.models.language.tasks import LanguageModel

    model = load(source, **loading)
    if not isinstance(model, LanguageModel):
        raise MmjaxError(f"{model.system} is not a language model for chat")
    conversation = Conversation(model, system, **options)
    for line in _lines():
        if line:
            _print_pieces(conversation.say(line))


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


def _print_pieces(pieces: Iterator[str], first: str = "") -> None:
    print(first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
