"""Trees of arrays joined by path."""

import pytest

from mmjax import tree
from mmjax.errors import MmjaxError


def test_overlay_takes_the_last_leaf_where_merge_refuses_two():
    base = {"text": {"k": 1, "q": 2}, "vision": {"k": 3}}
    role = {"text": {"k": 4}, "decoder": {"v": 5}}
    assert tree.overlay(base, role) == {"decoder": {"v": 5}, "text": {"k": 4, "q": 2}, "vision": {"k": 3}}
    assert base["text"]["k"] == 1
    with pytest.raises(MmjaxError, match="both hold text/k"):
        tree.merge(base, role)
