"""Chat templates: untrusted Jinja, rendered in a sandbox exactly as transformers renders it.

As in transformers 5, utils/chat_template_utils.py: blocks are trimmed, loop controls are on, `tojson` escapes no HTML,
`raise_exception` and `strftime_now` exist, {% generation %} marks text without changing it, keys whose value is None
are dropped. Templates only get values of JSON types.

    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    >>> render(template, [{"role": "user", "content": "Hello"}])
    '<user>Hello'
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jinja2
import numpy as np
from jinja2 import ext, nodes, sandbox

from mmjax.errors import MmjaxError

Message: TypeAlias = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | ..., "content": text, or a list of {"type": ..., "text": ...}}."""


def render(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The text of a conversation.

    variables: the template's variables beside `messages`: add_generation_prompt, bos_token, tools, ...
    Raises MmjaxError: a message that is not a dictionary, a template that does not parse or raises.
    """
    wrong = next((message for message in messages if not isinstance(message, Mapping)), None)
    if wrong is not None:
        raise MmjaxError(f"messages: each is a dictionary with role and content, not {type(wrong).__name__}: {wrong!r}")
    visible = [{key: _plain(value) for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compile(template).render(messages=visible, **{key: _plain(value) for key, value in variables.items()})
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise MmjaxError(f"the chat template fails: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


class _Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope, as transformers' block is: what is set inside does not reach the text after it.
        return nodes.Scope(body).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _plain(value: Any) -> Any:
    """The value in JSON's types; for an image or an array only the name of its type, which suffices for templates."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
