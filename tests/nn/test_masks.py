"""Each mask against its rule, written out one pair of tokens at a time, and the table that shows them all."""

import importlib.util
import io

import jax
import numpy as np
import pytest
from PIL import Image

from mmjax.nn.masks import (
    causal_mask,
    contrastive_mask,
    grounded_mask,
    matching_mask,
    media_mask,
    padding_mask,
    prefix_mask,
)

N, L = 3, 5


def by_rule(rule, l, s, *args):
    return [[rule(i, j, *args) for j in range(s)] for i in range(l)]


def test_padding():
    np.testing.assert_array_equal(padding_mask(np.array([[1, 1, 0], [0, 1, 1]]))[:, 0, 0], [[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("l, s", [(L, L), (2, 7), (1, 4)])
def test_causal(l, s):
    past = s - l
    np.testing.assert_array_equal(causal_mask(l, s)[0, 0], by_rule(lambda i, j: j <= past + i, l, s))


def test_prefix_of_each_example():
    lengths = np.array([0, 2, L])
    masks = jax.jit(lambda lengths: prefix_mask(lengths, L))(lengths)
    assert masks.shape == (3, 1, L, L)

    def rule(i, j, prefix):
        if i < prefix:
            return j < prefix
        return j <= i

    for mask, prefix in zip(masks[:, 0], lengths):
        np.testing.assert_array_equal(mask, by_rule(rule, L, L, prefix))
        np.testing.assert_array_equal(mask, prefix_mask(int(prefix), L)[0, 0])
    np.testing.assert_array_equal(masks[0], causal_mask(L, L)[0])


def matching(query_is_text, key_is_text, i, j):
    return True


def grounded(query_is_text, key_is_text, i, j):
    if not query_is_text:
        return not key_is_text
    return not key_is_text or j <= i


def contrastive(query_is_text, key_is_text, i, j):
    return query_is_text == key_is_text


@pytest.mark.parametrize(
    "mask, rule", [(matching_mask, matching), (grounded_mask, grounded), (contrastive_mask, contrastive)]
)
def test_q_former(mask, rule):
    expected = by_rule(lambda i, j: rule(i >= N, j >= N, i, j), N + L, N + L)
    np.testing.assert_array_equal(mask(N, L), np.array(expected)[None, None])


def test_media():
    starts = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 1]])
    images, tokens = 3, 2

    def rule(i, j, row, only_last):
        before = sum(row[: i + 1])
        return j // tokens == before - 1 if only_last else j // tokens < before

    for only_last in (True, False):
        masks = media_mask(starts, images, tokens, only_last)
        assert masks.shape == (4, 1, L, images * tokens)
        for mask, row in zip(masks[:, 0], starts):
            np.testing.assert_array_equal(mask, by_rule(rule, L, images * tokens, row, only_last))


def test_masks_join():
    valid = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    joined = causal_mask(L, L) & padding_mask(valid)
    assert joined.shape == (2, 1, L, L) and joined.dtype == bool
    for mask, row in zip(joined[:, 0], valid):
        np.testing.assert_array_equal(mask, by_rule(lambda i, j, row: j <= i and row[j], L, L, row))


def test_the_table_is_drawn(repository, tmp_path, monkeypatch):
    path = repository / "experiments" / "mask_table.py"
    spec = importlib.util.spec_from_file_location("mask_table", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    panels = script.panels()
    assert len({panel.title for panel in panels}) == len(panels) == 9
    for panel in panels:
        assert panel.mask.shape == (len(panel.queries), len(panel.keys)), panel.title
    monkeypatch.setattr("sys.argv", ["mask_table.py", str(tmp_path / "masks.png")])
    script.main()
    picture = np.asarray(Image.open(io.BytesIO((tmp_path / "masks.png").read_bytes())))
    allowed, forbidden = (np.all(picture == colour, axis=-1).mean() for colour in (script.ALLOWED, script.FORBIDDEN))
    assert allowed > 0.05 and forbidden > 0.05
