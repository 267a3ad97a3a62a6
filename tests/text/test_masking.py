"""Which tokens are masked and how: counts, rates, whole words, reproducibility."""

import numpy as np
import pytest

from mmjax.data.masked_text import MaskTokens
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError
from mmjax.text.masking import Masking

VOCAB, MASK, CLS, SEP = 101, 4, 2, 3


def texts(n=7, l=37):
    """ids [n, l], their lengths: [CLS] words [SEP] padding."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, l + 1, n)
    ids = rng.integers(5, VOCAB, (n, l)).astype(np.int32)
    for row, length in enumerate(lengths):
        ids[row, 0], ids[row, length - 1], ids[row, length:] = CLS, SEP, 0
    return ids, lengths


def test_number_of_selected_tokens():
    masking = Masking(VOCAB, MASK, (CLS, SEP), limit=11)
    for length in (3, 4, 10, 17, 30, 50, 130):
        ids = np.full(131, 7, np.int32)
        ids[0], ids[length - 1] = CLS, SEP
        masked = masking(ids, length, np.random.default_rng(length))
        expected = min(11, max(1, round(length * 0.15)))  # 10 -> 2, 30 -> 4, 50 -> 8: half to even
        assert int(masked["masked_weights"].sum()) == expected, length
        positions = masked["masked_positions"][:expected]
        assert (np.diff(positions) > 0).all() and positions.min() > 0 and positions.max() < length - 1
        assert not masked["masked_positions"][expected:].any() and not masked["masked_ids"][expected:].any()


def test_masked_ids_restore_the_text():
    ids, lengths = texts()
    masked = Masking(VOCAB, MASK, (CLS, SEP)).mask_all(ids, lengths, seed=3)
    back = masked["input_ids"].copy()
    for row in range(len(ids)):
        count = int(masked["masked_weights"][row].sum())
        back[row, masked["masked_positions"][row, :count]] = masked["masked_ids"][row, :count]
    np.testing.assert_array_equal(back, ids)
    assert (masked["input_ids"] != ids).any()


def test_eighty_ten_ten_of_the_whole_vocabulary():
    ids = np.full(20_000, 50, np.int32)
    masking = Masking(VOCAB, MASK, (CLS, SEP), rate=0.9, limit=18_000)
    masked_ids = masking(ids, len(ids), np.random.default_rng(1))["input_ids"]
    counts = np.bincount(masked_ids, minlength=VOCAB)
    # 18,000 chosen: standard deviations 54 and 40; of a single piece 1800 / 101 = 17.8, 4.2.
    assert abs(counts[MASK] - 0.8 * 18_000) < 220
    assert abs(counts[50] - 2_000 - 1_800) < 165
    others = np.delete(counts, [MASK, 50])
    assert others.min() > 3 and others.max() < 40 and abs(others.sum() - 1_800 * 99 / 101) < 165


def test_whole_words_are_selected_together():
    ids, lengths = texts(n=41)
    joins = np.arange(VOCAB) % 3 == 0
    masking = Masking(VOCAB, MASK, (CLS, SEP), limit=9, continuations=joins)
    masked = masking.mask_all(ids, lengths, seed=0)
    for row, length in enumerate(lengths):
        words, word = {}, 0
        for position in range(1, length - 1):
            word += not (joins[ids[row, position]] and position > 1)
            words[position] = word
        count = int(masked["masked_weights"][row].sum())
        chosen = {words[position] for position in masked["masked_positions"][row, :count]}
        assert sum(word in chosen for word in words.values()) == count <= min(9, max(1, round(length * 0.15)))


def test_static_masks_depend_on_seed_and_index_and_dynamic_ones_on_the_epoch():
    ids, lengths = texts()
    masking = Masking(VOCAB, MASK, (CLS, SEP))
    one = masking.mask_all(ids, lengths, seed=5)
    np.testing.assert_array_equal(masking.mask_all(ids[:3], lengths[:3], seed=5)["input_ids"], one["input_ids"][:3])
    assert (masking.mask_all(ids, lengths, seed=6)["input_ids"] != one["input_ids"]).any()

    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int32)
    pipeline = Pipeline(ArraySource(input_ids=ids, attention_mask=mask), 7, seed=2, transforms=(MaskTokens(masking),))
    batches = iter(pipeline)
    first, second = next(batches), next(batches)
    again = next(iter(pipeline))
    np.testing.assert_array_equal(first["masked_positions"], again["masked_positions"])
    order = [np.argsort(batch["index"]) for batch in (first, second)]
    np.testing.assert_array_equal(first["attention_mask"][order[0]], second["attention_mask"][order[1]])
    assert (first["masked_positions"][order[0]] != second["masked_positions"][order[1]]).any()


def test_invalid_masking_is_refused():
    with pytest.raises(MmjaxError, match=r"rate=0 \(above 0"):
        Masking(VOCAB, MASK, (), rate=0)
    with pytest.raises(MmjaxError, match="continuations of 5 pieces, not 101"):
        Masking(VOCAB, MASK, (), continuations=np.zeros(5, bool))
