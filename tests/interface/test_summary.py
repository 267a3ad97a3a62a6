"""The `repr` of a loaded model: five lines, whatever its size."""

import jax
import jax.numpy as jnp
from models.tiny_text import random_params, tiny_decoder

from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.tasks import AlbefModel
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.tasks import BertModel
from mmjax.models.vit.network import ViTConfig
from mmjax.models.vit.tasks import ViTModel


def test_a_classifier_in_five_lines():
    config = ViTConfig(width=12, depth=1, heads=3, hidden=24, patch=4, image_size=(8, 12), num_classes=5)
    model = ViTModel(config, random_params(ViTModel, config), layout="timm")
    assert repr(model).splitlines() == [
        "ViTModel, read from the layout timm",
        "  sizes: width 12, depth 1, heads 3, hidden 24, patch 4, image_size 8 x 12, num_classes 5",
        "  parameters: 2,057 float32; computes in float32",
        "  forward: pixel_values",
        "  can: classify, encode_image",
    ]
    half = model.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    assert "  parameters: 2,057 bfloat16;" in repr(half)


def test_what_no_head_allows_is_left_out():
    headless = ViTConfig(width=12, depth=1, heads=3, hidden=24, patch=4, image_size=(8, 12))
    assert repr(ViTModel(headless, {})).endswith("\n  can: encode_image")
    assert BertModel(BertConfig.base(mlm=True), {}).abilities == ("fill_mask", "encode_text")
    assert AlbefModel(AlbefConfig.vqa(), {}).abilities == ("answer",)
    retrieval = ("match", "retrieve", "ground", "encode_image", "encode_text")
    assert AlbefModel(AlbefConfig.retrieval(), {}).abilities == retrieval
    assert AlbefModel(AlbefConfig.nlvr(), {}).abilities == ("classify_pairs",)


def test_the_largest_config_and_every_weight_stay_short():
    for model in (AlbefModel(AlbefConfig.base(), {}), tiny_decoder()):
        lines = repr(model).splitlines()
        assert len(lines) == 5 and max(map(len, lines)) <= 120
