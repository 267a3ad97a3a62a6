"""Stop strings as an automaton over tokens: one table lookup per generated token, inside compiled decoding.

A stop string may begin inside one token, span others and end inside another. So the automaton reads bytes (Aho and
Corasick, 1975: all strings at once, falling back to the longest suffix that is a prefix of one), and its steps are
composed over the bytes of each token of the vocabulary.

    >>> automaton = stop_automaton(["##"], tokens=[b"a", b"#", b"x#"])
    >>> automaton.advance(automaton.start, [0, 2, 1]) == automaton.matched  # "a", "x#", "#"
    True
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from mmjax.errors import MmjaxError
from mmjax.text.clip_tokenizer import byte_symbols

CLEANUP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""Strings whose surrounding spaces the WordPiece decoder's cleanup removes (tokenizers, decoders/wordpiece.rs)."""


@dataclass(frozen=True)
class StopAutomaton:
    """Detects stop strings in a text, token by token.

    Attributes:
        table: (state, token id) -> state.
        start: the initial state.
        matched: the absorbing state of a text that contains a stop string.
        tokens: the bytes of each id.
        steps: (node, byte) -> node, the byte automaton below the table; nodes are the states other than `matched`.
    """

    table: Int[np.ndarray, "states v"]
    start: int
    matched: int
    tokens: Sequence[bytes]
    steps: Int[np.ndarray, "nodes 256"]

    def advance(self, state: int, ids: Iterable[int]) -> int:
        """The state after a sequence of generated ids."""
        for id in ids:
            state = int(self.table[state, id])
        return state

    def after_prompt(self, ids: Iterable[int]) -> int:
        """The state after a prompt: a stop string may begin in the prompt, but does not count if it ends there.

        ids: the prompt without padding.
        """
        node = self.start
        for byte in b"".join(self.tokens[id] for id in ids):
            node = int(self.steps[node, byte])
        return node


def stop_automaton(strings: Sequence[str], tokens: Sequence[bytes]) -> StopAutomaton:
    """The automaton of stop strings over a vocabulary from `token_bytes`.

    It has one state for each distinct prefix of the strings, and one more. Raises MmjaxError: no strings, or an empty
    string, which every text contains.
    """
    if isinstance(strings, str) or not strings or not all(isinstance(string, str) and string for string in strings):
        raise MmjaxError(f"stop strings: expected a list of non-empty strings, not {strings!r}")
    steps, ends = _byte_automaton([string.encode() for string in strings])
    matched = len(steps)
    steps_to_match = np.vstack([np.where(ends[steps], matched, steps), np.full((1, 256), matched, np.int32)])
    return StopAutomaton(_compose(steps_to_match, tokens), 0, matched, tokens, steps)


def _byte_automaton(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """((node, byte) -> node int32 [nodes, 256], whether a string ends at a node bool [nodes])."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                ends.append(False)
            node = children[node][byte]
        ends[node] = True
    steps = np.zeros((len(children), 256), np.int32)
    # Breadth first: a node's longest proper suffix is shorter, so its row is complete when it is copied.
    suffixes = deque([(0, 0)])
    while suffixes:
        node, suffix = suffixes.popleft()
        ends[node] |= ends[suffix]
        steps[node] = steps[suffix] if node else 0
        for byte, child in children[node].items():
            suffixes.append((child, int(steps[node, byte])))
            steps[node, byte] = child
    return steps, np.array(ends)


def _compose(steps: np.ndarray, tokens: Sequence[bytes]) -> Int[np.ndarray, "states v"]:
    """(state, token) -> state, for all states and tokens at once, byte by byte."""
    lengths = np.array([len(token) for token in tokens], np.int64)
    order = np.argsort(-lengths, kind="stable")
    longest_first = [tokens[i] for i in order]
    starts = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
    text = np.frombuffer(b"".join(longest_first), np.uint8)
    reached = np.repeat(np.arange(len(steps), dtype=np.int32)[:, None], len(tokens), 1)
    for i in range(int(lengths.max(initial=0))):
        active = int(np.count_nonzero(lengths > i))
        reached[:, :active] = steps[reached[:, :active], text[starts[:active] + i]]
    table = np.empty_like(reached)
    table[:, order] = reached
    return table


# ---------------------------------------------------------------------------------------------------------- vocabulary


def token_bytes(tokenizer: tokenizers.Tokenizer, size: int | None = None) -> list[bytes]:
    """The bytes that each id adds to a text, by the rules of the tokenizer's decoder; special tokens are spelled out.

    Byte-level BPE, SentencePiece's spaces (U+2581) with byte fallback, WordPiece. A SentencePiece or WordPiece text
    drops the space before its first token; here every token includes its space.
    size: rows of the model's embedding table, if it has more than the tokenizer has ids; the rest are empty.
    Raises MmjaxError: a decoder of another kind, or a vocabulary larger than `size`.
    """
    spell = _spelling(tokenizer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if size is not None and largest >= size:
        raise MmjaxError(f"size={size}: the tokenizer has the id {largest}")
    tokens = [b""] * (largest + 1 if size is None else size)
    for token, id in vocabulary.items():
        tokens[id] = spell(token)
    return tokens


def _spelling(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        table = {symbol: byte for byte, symbol in byte_symbols().items()}
        # A token with any other character (an added one with a space in it) is spelled as it is.
        return lambda token: bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
    if kinds == ["WordPiece"]:
        return lambda token: _word_piece(token, parts[0]["prefix"], parts[0]["cleanup"])
    if set(kinds) <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        changes = [(part["replacement"], " ") for part in parts if part["type"] == "Metaspace"]
        changes += [(part["pattern"].get("String"), part["content"]) for part in parts if part["type"] == "Replace"]
        if all(old for old, _ in changes):
            return lambda token: _sentence_piece(token, changes, "ByteFallback" in kinds)
    raise MmjaxError(f"stop strings: no rule for the bytes of tokens under the decoder {kinds}")


def _word_piece(token: str, prefix: str, cleanup: bool) -> bytes:
    text = token.removeprefix(prefix) if token.startswith(prefix) else " " + token
    for spaced in CLEANUP if cleanup else ():
        text = text.replace(spaced, spaced.strip())
    return text.encode()


def _sentence_piece(token: str, changes: Sequence[tuple[str, str]], byte_fallback: bool) -> bytes:
    if byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    for old, new in changes:
        token = token.replace(old, new)
    return token.encode()
