"""ChatModel, the base of language models that answer the messages of a conversation."""

import abc
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mmjax.errors import MmjaxError
from mmjax.interface.generation import GeneratingModel
from mmjax.text.chat_template import Message


class ChatPrompt(NamedTuple):
    """A conversation as one text.

    add_special_tokens: whether the tokenizer adds its own around the text, since the template has none.
    stop: strings that end an answer, beside the model's ids.
    """

    text: str
    add_special_tokens: bool = False
    stop: tuple[str, ...] = ()


class ChatModel(GeneratingModel):
    """A model with a template of conversations."""

    @abc.abstractmethod
    def chat_prompt(self, messages: Sequence[Message]) -> ChatPrompt:
        """The text that the assistant continues. Raises MmjaxError without a template."""

    @abc.abstractmethod
    def empty_past(self, size: int) -> Any:
        """A cache of one conversation with `size` slots and no token, as `remember` returns it."""

    @abc.abstractmethod
    def remember(self, state: Any, size: int) -> Any:
        """The final state of a generation as the input `past` of the next turn; compiled for each size."""

    @property
    @abc.abstractmethod
    def reuses(self) -> bool:
        """Whether keys of a short text serve a longer one."""

    @property
    def image_id(self) -> int | None:
        """The id of a feature of an image among `turn_ids`; None: there are no images."""
        return None

    def turn_ids(self, prompt: ChatPrompt, lengths: Sequence[int]) -> list[int]:
        """The ids of a conversation. lengths: of each image the number of its features."""
        if self.tokenizer is None:
            raise MmjaxError("a conversation needs a tokenizer")
        return self.tokenizer.encode([prompt.text], prompt.add_special_tokens)[0]

    def feature_count(self, image: Any) -> int:
        """The number of ids that an image becomes. Raises MmjaxError for a model without images."""
        raise MmjaxError(f"{self.system} sees no images")

    def chat(self, messages: str | Sequence[Message], **options: Any) -> str:
        """The assistant's next turn.

        messages: the user's message, or a conversation so far: [{"role": "user", "content": "..."}, ...].
        options: as of `generate`. Raises MmjaxError where the tokenizer has no chat template.
        """
        text, merged = self._chat_options(messages, options)
        return self.generate(text, **merged)

    def stream_chat(self, messages: str | Sequence[Message], **options: Any) -> Iterator[str]:
        """The same, piece by piece; see `stream`."""
        text, merged = self._chat_options(messages, options)
        return self.stream(text, **merged)

    def _chat_options(self, messages: str | Sequence[Message], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        prompt = self.chat_prompt(conversation)
        stop = [*self.strings(options.pop("stop", ())), *prompt.stop]
        return prompt.text, {"add_special_tokens": prompt.add_special_tokens, "stop": stop, **options}
