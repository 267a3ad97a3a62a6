"""Stop strings: the automaton against plain search in the text, and tokens against their own decoders."""

import time

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from mmjax.errors import MmjaxError
from mmjax.text.stop_strings import stop_automaton, token_bytes


def random_bytes(rng, shortest, longest, alphabet=b"ab\xc3\xa9"):
    return bytes(rng.choice(list(alphabet), rng.integers(shortest, longest + 1)).tolist())


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_plain_search(seed):
    """Two letters and the two bytes of é: strings overlap, repeat and end in the middle of tokens."""
    rng = np.random.default_rng(seed)
    tokens = [random_bytes(rng, 0, 5) for _ in range(17)]
    strings = ["".join(rng.choice(list("abé"), rng.integers(1, 6))) for _ in range(rng.integers(1, 4))]
    automaton = stop_automaton(strings, tokens)
    assert automaton.table.shape == (automaton.matched + 1, 17) and automaton.table.dtype == np.int32
    for _ in range(11):
        prompt, ids = rng.integers(0, 17, rng.integers(0, 7)), rng.integers(0, 17, 13)
        # From a text's start: any string anywhere.
        state = automaton.start
        for count, id in enumerate(ids, 1):
            state = automaton.table[state, id]
            text = b"".join(tokens[i] for i in ids[:count])
            assert (state == automaton.matched) == any(string.encode() in text for string in strings)
        # After a prompt: any string that ends behind it.
        state, before = automaton.after_prompt(prompt), b"".join(tokens[i] for i in prompt)
        for count in range(14):
            text = before + b"".join(tokens[i] for i in ids[:count])
            ended = any(text.find(s.encode(), max(0, len(before) - len(s.encode()) + 1)) >= 0 for s in strings)
            assert (automaton.advance(state, ids[:count]) == automaton.matched) == ended


def test_matched_is_never_left():
    automaton = stop_automaton(["ab", "b!"], [b"a", b"b", b"!", b"xxabxx", b""])
    assert (automaton.table[automaton.matched] == automaton.matched).all()
    assert automaton.advance(0, [3]) == automaton.matched, "it begins and ends inside one token"
    assert automaton.advance(0, [0, 4, 1]) == automaton.matched
    assert automaton.advance(0, [0, 2, 1]) != automaton.matched


def test_a_longer_string_may_follow_a_shorter_one_in_the_prompt():
    automaton = stop_automaton(["\n", "\n\n"], [b"x", b"\n"])
    assert automaton.after_prompt([1, 0, 1]) != automaton.matched
    assert automaton.advance(automaton.after_prompt([0, 1]), [1]) == automaton.matched


def test_a_large_vocabulary_takes_well_under_a_second():
    rng = np.random.default_rng(0)
    tokens = [bytes(rng.integers(97, 123, size).tolist()) for size in rng.integers(1, 12, 49_152)] + [b" " * 131]
    strings = ["a stop of 20 letters", "another of 20 letter", "third of 20 letters!"]
    start = time.process_time()
    automaton = stop_automaton(strings, tokens)
    took = time.process_time() - start
    assert automaton.table.shape == (60 + 1, 49_153)
    assert took < 1, f"{took:.2f} s"


@pytest.mark.parametrize("strings", [[], [""], ["a", ""], "abc", [b"a"]])
def test_invalid_stop_strings_are_refused(strings):
    with pytest.raises(MmjaxError, match="stop strings"):
        stop_automaton(strings, [b"a"])


# ----------------------------------------------------------------------------------------------------------- decoders

SENTENCE_PIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
WORDS = ["##ing", "walk", ".", "'", "n't", "##s", "do", "!", "é", "[SEP]", "'s", "a.", ","]
PIECES = ["▁walk", "ing", "▁", "<0xC3>", "<0xA9>", "a▁b", "é", "▁▁", "<0xZZ>", "</s>"]
BYTES = ["Ġwalk", "ing", "Ã", "©", "Ċ", "Ġ", "a", "!", "âĢ", "Ŀ"]


@pytest.mark.parametrize(
    "tokens, decoder",
    [
        (BYTES, decoders.ByteLevel()),
        (PIECES, SENTENCE_PIECE),
        (WORDS, decoders.WordPiece()),
        (WORDS, decoders.WordPiece(cleanup=False)),
        ([piece for piece in PIECES if "0x" not in piece], decoders.Metaspace()),
    ],
)
def test_bytes_join_to_the_decoded_text(tokens, decoder):
    """A first token "Q" keeps decoders from stripping what they strip at the beginning of a text."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(["Q", *tokens])}, "Q"))
    tokenizer.decoder = decoder
    tokenizer.add_tokens([" two  words "])
    spelled = token_bytes(tokenizer)
    rng = np.random.default_rng(1)
    for _ in range(200):
        ids = [0, *rng.integers(0, len(spelled), rng.integers(0, 7)).tolist()]
        joined = b"".join(spelled[id] for id in ids).decode(errors="replace")
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        # Where bytes are no UTF-8, decoders differ in how many U+FFFD they write.
        assert joined.lstrip().replace("\ufffd", "") == decoded.replace("\ufffd", "")


def test_rows_beyond_the_vocabulary_are_empty():
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 3}, []))
    tokenizer.decoder = decoders.ByteLevel()
    assert token_bytes(tokenizer) == [b"a", b"", b"", b"b"]
    assert token_bytes(tokenizer, 7) == [b"a", b"", b"", b"b", b"", b"", b""]
    with pytest.raises(MmjaxError, match="size=3: the tokenizer has the id 3"):
        token_bytes(tokenizer, 3)
    for other in (decoders.CTC(), decoders.Replace(tokenizers.Regex("b+"), " ")):
        tokenizer.decoder = other
        with pytest.raises(MmjaxError, match="no rule for the bytes of tokens under the decoder"):
            token_bytes(tokenizer)
