"""The verbs that generate text: generate, chat."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import rich

from mmjax.cli.images import read_image
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


def chat(
    source: str, system: str | None, images: Sequence[str], loading: dict[str, Any], options: dict[str, Any]
) -> None:
    """A conversation: each line of standard input is a turn; a line `/image FILE` is an image of the next one.

    images: those of the first turn. Ctrl-C stops an answer, and what there is of it stays in the conversation.
    """
    from mmjax.interface.chat import ChatModel
    from mmjax.interface.conversation import Conversation

    model = load(source, **loading)
    if not isinstance(model, ChatModel):
        raise MmjaxError(f"{model.system} is not a language model for chat")
    if images and "pixel_values" not in model.inputs(model.config):
        raise MmjaxError(f"--image: {model.system} sees no images")
    conversation = Conversation(model, system, **options)
    waiting = [read_image(file) for file in images]
    for line in _lines():
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                waiting.append(read_image(rest.strip()))
            elif line:
                turn, waiting = waiting, []
                _print_pieces(conversation.say(line, turn))
        except KeyboardInterrupt:
            print()
        except MmjaxError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)


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
