"""Sinusoids by hand, in each of the three tables, and as transformers writes Marian's."""

import numpy as np
import pytest

from mmjax.errors import MmjaxError
from mmjax.nn.sinusoids import sinusoids


def test_the_papers_table_by_hand():
    table = sinusoids(7, 6)
    assert table.shape == (7, 6) and table.dtype == np.float32
    for k in range(3):
        angle = 5 * 10000 ** (-2 * k / 6)
        np.testing.assert_allclose(table[5, 2 * k : 2 * k + 2], [np.sin(angle), np.cos(angle)], rtol=1e-6)
    np.testing.assert_array_equal(table[0], [0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(("width", "sines"), [(10, 5), (7, 4)])
def test_marians_table_is_the_same_numbers_in_another_order(width, sines):
    paper, marian = sinusoids(13, width), sinusoids(13, width, "concatenated")
    np.testing.assert_array_equal(marian[:, :sines], paper[:, 0::2])
    np.testing.assert_array_equal(marian[:, sines:], paper[:, 1::2])


def test_tensor2tensors_table_has_its_own_frequencies():
    table = sinusoids(11, 9, "tensor2tensor")
    frequencies = [10000 ** (-k / 3) for k in range(4)]
    np.testing.assert_allclose(table[3, :4], np.sin(3 * np.array(frequencies)), rtol=1e-6)
    np.testing.assert_allclose(table[3, 4:], [*np.cos(3 * np.array(frequencies)), 0], rtol=1e-6)
    assert np.abs(table[:, :8] - sinusoids(11, 8, "concatenated")).max() > 0.1


def test_angles_are_exact_at_large_positions():
    """Float32 angles would be off by 1e-4 and more there."""
    np.testing.assert_allclose(sinusoids(4001, 4)[4000, :2], [np.sin(4000.0), np.cos(4000.0)], atol=1e-7)


def test_bad_tables_are_refused():
    with pytest.raises(MmjaxError, match="'halves': choose interleaved"):
        sinusoids(3, 4, "halves")  # type: ignore[arg-type]
    with pytest.raises(MmjaxError, match="width 2: should be at least 4"):
        sinusoids(3, 2, "tensor2tensor")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [18, 7])
def test_marians_table_is_transformers_to_the_bit(width):
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    reference = MarianSinusoidalPositionalEmbedding(513, width).create_weight().numpy()
    np.testing.assert_array_equal(sinusoids(513, width, "concatenated"), reference)
