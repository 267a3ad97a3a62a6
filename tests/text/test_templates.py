"""The templates can be formatted, and no two are the same."""

from mmjax.evaluation.zero_shot import prompts
from mmjax.text.templates import PHOTOS, RENDITIONS


def test_templates_have_one_placeholder_each():
    texts, owners = prompts(["cat", "dog"], PHOTOS + RENDITIONS)
    assert len(set(texts)) == len(texts) == 2 * (len(PHOTOS) + len(RENDITIONS))
    assert owners.sum() == len(texts) / 2
