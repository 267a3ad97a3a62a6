"""The conversation templates of LLaVA (conversation.py), and the labels of its training texts (train.py).

    template = TEMPLATES["vicuna_v1"]
    template.prompt(["<image>\\nWhat is it?", None])        # None: the turn to be generated
    template.example(tokenizer, turns, has_image=True)      # ids and labels of a training text

Strings and labels are the original's, exactly. Its labels come from counting the ids of parts of a text encoded by
themselves; where these do not add up to the whole, all labels are ignored, and a reader has to refuse the text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int

from mmjax.errors import MmjaxError
from mmjax.text.chat_template import Message
from mmjax.text.image_prompts import IMAGE, encode_with_images
from mmjax.text.packing import IGNORED, labelled_conversation
from mmjax.text.sentencepiece import SPACE
from mmjax.text.tokenizer import Tokenizer

PLACEHOLDER = -200
"""The id of an image in the ids of a training text."""
Style = Literal["single", "two", "mpt", "llama_2", "plain"]
Turns = Sequence[str | None]
"""Texts of user and assistant in turn; a last None is the turn to be generated."""


class Example(NamedTuple):
    """ids, labels: int32 [l]; an image is one id, -200, and labels are -100 where nothing is learned."""

    ids: Int[np.ndarray, "l"]
    labels: Int[np.ndarray, "l"]


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is one text.

    Attributes:
        sep, sep2: after a turn; where sep2 exists, after a turn of the assistant.
        version: how a training text is made of it ("v1", "mpt", ...); with "mmtag" an image has tags around it.
        examples: turns that the original puts before every conversation (its default, v0).
    """

    system: str
    roles: tuple[str, str]
    style: Style
    sep: str
    sep2: str | None = None
    version: str = "Unknown"
    examples: tuple[str, ...] = ()

    @property
    def stop(self) -> str:
        """The string after a generated turn."""
        return self.sep2 or self.sep

    # --------------------------------------------------------------------------------------------------------- prompts

    def prompt(self, turns: Turns, examples: bool = False) -> str:
        """The text of a conversation. examples: with the template's own turns before it.

        Raises MmjaxError: the template "plain" for an answer, or no question in a template that begins with it.
        """
        turns = [*(self.examples if examples else ()), *turns]
        if self.style == "llama_2":
            return self._llama_2(turns)
        if self.style == "plain":
            if len([turn for turn in turns if turn]) > 1:
                raise MmjaxError("template plain: it has one turn; a training text is made by `example`")
            return self.system + "".join(turn + self.sep for turn in turns if turn)
        seps = (self.sep, self.sep2) if self.style == "two" else (self.sep, self.sep)
        colon, space = ("", "") if self.style == "mpt" else (":", " ")
        text = self.system + self.sep
        for i, turn in enumerate(turns):
            start = f"{self.roles[i % 2]}{colon}"
            text += start if turn is None else f"{start}{space}{turn}{seps[i % 2]}"
        return text

    def _llama_2(self, turns: Turns) -> str:
        if not turns or not turns[0]:
            raise MmjaxError("this template puts the system's text before a first question, and there is none")
        text = ""
        for i, turn in enumerate(turns):
            if i % 2:
                text += "" if turn is None else f" {turn} {self.sep2}"
            elif turn is not None:
                system = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system and not i else ""
                text += f"{self.sep}[INST] {system}{turn} [/INST]"
        return text.lstrip(self.sep)

    def with_image(self, turns: Turns) -> list[str | None]:
        """The turns with one image at the beginning of the first, or with tags in a turn before it."""
        question = (turns[0] or "").replace(IMAGE, "").strip()
        if "mmtag" in self.version:
            return [f"<Image>{IMAGE}</Image>", "Received.", question, *turns[1:]]
        return [f"{IMAGE}\n{question}", *turns[1:]]

    # --------------------------------------------------------------------------------------------------- training texts

    def text(self, tokenizer: Tokenizer, turns: Sequence[str]) -> str:
        """A conversation for a message."""
        return turns[0] if self.style == "plain" else self.prompt(turns)

    def example(
        self, tokenizer: Tokenizer, turns: Sequence[str], has_image: bool, max_length: int | None = None
    ) -> Example:
        """A conversation as a training text, in which the answers are learned (train.py, preprocess).

        has_image: `<image>` in a question becomes its beginning; several of one question become one.
        max_length: of a text without an image, which is truncated, and of the check of its labels.
        Raises MmjaxError for the template "plain" unless there are two turns, the first with an image.
        """
        turns = [self._image_first(turn) if has_image and IMAGE in turn else turn for turn in turns]
        make = _plain if self.style == "plain" else _rounds if self._has_rounds else _speakers
        return make(self, _Encoder(tokenizer, has_image, max_length), turns)

    @property
    def _has_rounds(self) -> bool:
        return self.style == "llama_2" or self.version.startswith("v1") or self.version == "mpt"

    def _image_first(self, turn: str) -> str:
        text = f"{IMAGE}\n{turn.replace(IMAGE, '').strip()}".strip()
        return text.replace(IMAGE, f"<Image>{IMAGE}</Image>") if "mmtag" in self.version else text


@dataclasses.dataclass(frozen=True)
class TokenizerTemplate:
    """The chat template of a tokenizer in place of one of LLaVA's; the labels are those of `labelled_conversation`."""

    def text(self, tokenizer: Tokenizer, turns: Sequence[str]) -> str:
        """A conversation, as `example` encodes it."""
        return tokenizer.chat(self._messages(tokenizer, turns), add_generation_prompt=False)

    def example(
        self, tokenizer: Tokenizer, turns: Sequence[str], has_image: bool, max_length: int | None = None
    ) -> Example:
        """The ids of the prompt of a chat and of its answers, which are learned, up to the token that ends each.

        Images of a question are before its text. max_length: of a text without images, which is truncated.
        Raises MmjaxError: no template, or one that renders a message differently when more follow.
        """
        messages = self._messages(tokenizer, turns)
        outside = adds_special_tokens(tokenizer, tokenizer.chat(messages, add_generation_prompt=False))
        if not has_image:
            ids, labels = labelled_conversation(tokenizer, messages, None, outside)
            return Example(ids[:max_length], labels[:max_length])
        known = tokenizer.tokenizer.token_to_id(IMAGE)
        placeholder = PLACEHOLDER if known is None else known
        ids, labels = labelled_conversation(tokenizer, messages, placeholder, outside)
        return Example(np.where(ids == placeholder, PLACEHOLDER, ids), labels)

    def _messages(self, tokenizer: Tokenizer, turns: Sequence[str]) -> list[Message]:
        roles = ("user", "assistant")
        texts = [f"{IMAGE}\n" * turn.count(IMAGE) + turn.replace(IMAGE, "").strip() for turn in turns]
        return chat_messages(tokenizer, [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)])


TrainingTemplate: TypeAlias = Template | TokenizerTemplate


def chat_messages(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Message]:
    """Messages as the tokenizer's template takes them: an image is a part of the content, or else a line `<image>`."""
    parts = "image" in tokenizer.templates.get("default", "")
    return [{**message, "content": _parts(message) if parts else message_text(message)} for message in messages]


def adds_special_tokens(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokenizer's own tokens go around a text of its template: it does not begin with bos itself."""
    bos = tokenizer.special.get("bos_token")
    return bos is None or not text.startswith(bos)


def message_text(message: Message) -> str:
    """A message's content as a string, with a line `<image>` for each image."""
    content = message["content"]
    if isinstance(content, str):
        return content
    images = f"{IMAGE}\n" * sum(part["type"] == "image" for part in content)
    return images + "".join(part["text"] for part in content if part["type"] == "text")


def _parts(message: Message) -> list[dict[str, str]]:
    """The same as transformers' templates of images take it."""
    content = message["content"]
    if not isinstance(content, str):
        return list(content)
    text = content.replace(f"{IMAGE}\n", "").replace(IMAGE, "")
    return [{"type": "image"}] * content.count(IMAGE) + [{"type": "text", "text": text}]


# -------------------------------------------------------------------------------------------------------------- labels


class _Encoder(NamedTuple):
    tokenizer: Tokenizer
    has_image: bool
    max_length: int | None

    def __call__(self, text: str) -> list[int]:
        if self.has_image:
            return encode_with_images(self.tokenizer, text, PLACEHOLDER)
        return self.tokenizer.encode([text])[0][: self.max_length]

    @property
    def legacy(self) -> bool:
        """Whether a text after a special token begins as a text does: with a space (LLaMA's first tokenizers)."""
        end = self.tokenizer.special.get("eos_token", "")
        alone, after = self.tokenizer.encode(["a", f"{end}a"], add_special_tokens=False)
        spaced = (self.tokenizer.tokenizer.id_to_token(alone[0]) or "").startswith(SPACE)
        return spaced and after[1:] == alone


def _plain(template: Template, encode: _Encoder, turns: Sequence[str]) -> Example:
    """train.py, preprocess_plain: an image and its caption."""
    if len(turns) != 2 or IMAGE not in turns[0]:
        raise MmjaxError(f"template plain: an image and a caption are two turns, these are {list(turns)!r}")
    return _masked(encode(f"{IMAGE}{turns[1]}{template.sep}"), [(0, len(encode(IMAGE)))])


def _speakers(template: Template, encode: _Encoder, turns: Sequence[str]) -> Example:
    """train.py, _add_speaker_and_signal and _mask_targets: two ids of each question are learned."""
    header = f"{template.system}\n\n"
    parts = [f"### {template.roles[i % 2]}: {turn}\n" for i, turn in enumerate(turns)]
    current = len(encode(header))
    spans = [(0, current)]
    for i, part in enumerate(parts):
        length = len(encode(part))
        spans += [] if i % 2 else [(current + 2, current + length)]
        current += length
    return _masked(encode(f"{header}{''.join(parts)}### "), spans)


def _rounds(template: Template, encode: _Encoder, turns: Sequence[str]) -> Example:
    """train.py, preprocess_v1, preprocess_llama_2 and preprocess_mpt."""
    text, mpt = template.prompt(turns), template.style == "mpt"
    ids = encode(text)
    if mpt:
        pieces = text.split(template.sep)  # system, question, answer; question, answer; ...
        spans = [slice(0, 3), *(slice(i, i + 2) for i in range(3, len(pieces), 2))]
        rounds = [template.sep.join(pieces[span]) for span in spans]
        separator, current = template.sep + template.roles[1], 0
    else:
        rounds = text.split(template.sep2 or "")
        answer = "[/INST] " if template.style == "llama_2" else f"{template.sep}{template.roles[1]}: "
        separator, current = answer, 1
    ignored = [(0, current)]
    for i, each in enumerate(rounds):
        parts = each.split(separator)
        if not each or len(parts) != 2:
            break
        length, question = len(encode(each)), len(encode(parts[0] + separator)) - (1 if mpt else 2)
        if i and template.style != "llama_2" and encode.legacy == mpt:
            length, question = (length + 1, question + 1) if mpt else (length - 1, question - 1)
        ignored.append((current, current + question))
        current += length
    pad = encode.tokenizer.unk if encode.tokenizer.unk is not None else encode.tokenizer.pad
    whole = sum(id != pad for id in ids)
    fits = encode.max_length is None or current < encode.max_length
    return _masked(ids, [(0, len(ids))] if fits and current != whole else [*ignored, (current, len(ids))])


def _masked(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Example:
    row = np.asarray(ids, np.int32)
    labels = row.copy()
    for start, end in spans:
        labels[start:end] = IGNORED
    return Example(row, labels)


# ----------------------------------------------------------------------------------------------------------- templates


def _helpful(person: str, roles: tuple[str, str], style: Style, *seps: str, **fields: object) -> Template:
    text = (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )
    return Template(text, roles, style, *seps, **fields)  # type: ignore[arg-type]


HUMAN, USER = ("Human", "Assistant"), ("USER", "ASSISTANT")
TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
SAFETY = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
VISUAL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
ENERGY = (
    "What are the key differences between renewable and non-renewable energy sources?",
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, such "
    "as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite and "
    "will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences between renewable "
    "and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
    "finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations than "
    "non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations and "
    "needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable sources "
    "are not, and their depletion can lead to economic and social instability.\n",
)
CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)

V0 = _helpful("human", HUMAN, "single", "###", examples=ENERGY)
V1 = _helpful("user", USER, "two", " ", "</s>", version="v1")
DIRECT = Template("<|im_start|>system\nAnswer the questions.", CHATML, "mpt", "<|im_end|>", version="mpt")
PLAIN = Template("", ("", ""), "plain", "\n")

TEMPLATES: dict[str, Template] = {
    "default": V0,
    "v0": V0,
    "v1": V1,
    "vicuna_v1": V1,
    "llama_2": Template(SAFETY, USER, "llama_2", "<s>", "</s>", "llama_v2"),
    "mistral_instruct": Template("", USER, "llama_2", "", "</s>", "llama_v2"),
    "chatml_direct": DIRECT,
    "mistral_direct": DIRECT,
    "plain": PLAIN,
    "v0_plain": PLAIN,
    "llava_v0": _helpful("human", HUMAN, "single", "###"),
    "v0_mmtag": Template(TAGS, HUMAN, "single", "###", version="v0_mmtag"),
    "llava_v1": _helpful("human", USER, "two", " ", "</s>", version="v1"),
    "v1_mmtag": Template(TAGS, USER, "two", " ", "</s>", "v1_mmtag"),
    "llava_llama_2": Template(VISUAL, USER, "llama_2", "<s>", "</s>", "llama_v2"),
    "mpt": Template(MPT, CHATML, "mpt", "<|im_end|>", version="mpt"),
}
"""By the original's names; some are one template under two names."""


def template_called(name: str) -> Template:
    """Raises MmjaxError, listing the names, for one that does not exist."""
    if name not in TEMPLATES:
        raise MmjaxError(f"template={name!r}: there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def training_template(name: str, tokenizer: Tokenizer) -> TrainingTemplate:
    """Of a config's `template`: "" is the tokenizer's, or Vicuna's (LLaVA 1.5) where it has none."""
    if not name and "default" in tokenizer.templates:
        return TokenizerTemplate()
    return template_called(name or "vicuna_v1")
