"""ResNets of every published size, and the differences between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.resnet.checkpoint import LAYOUTS
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.models.resnet.tasks import ResNetModel
from mmjax.weights.files import write_safetensors
from mmjax.weights.table import load_table, save_table

COUNTS = {
    "r18": (ResNetConfig.r18(), 11_689_512),
    "r34": (ResNetConfig.r34(), 21_797_672),
    "r50": (ResNetConfig.r50(), 25_557_032),
    "r50 without head": (ResNetConfig.r50(num_classes=0), 23_508_032),
    "r101": (ResNetConfig.r101(), 44_549_160),
    "r152": (ResNetConfig.r152(), 60_192_808),
    "resnext50_32x4d": (ResNetConfig.resnext50_32x4d(), 25_028_904),
    "resnext101_32x8d": (ResNetConfig.resnext101_32x8d(), 88_791_336),
    "resnext101_64x4d": (ResNetConfig.resnext101_64x4d(), 83_455_272),
    "wide_r50_2": (ResNetConfig.wide_r50_2(), 68_883_240),
    "wide_r101_2": (ResNetConfig.wide_r101_2(), 126_886_696),
    "cifar 20 A": (ResNetConfig.cifar(20), 269_722),
    "cifar 56 A": (ResNetConfig.cifar(56), 853_018),
    "cifar 110 A": (ResNetConfig.cifar(110), 1_727_962),
    "cifar 20 B": (ResNetConfig.cifar(20, "projection"), 272_474),
    "cifar 110 B": (ResNetConfig.cifar(110, "projection"), 1_730_714),
    "cifar 56 plain": (ResNetConfig.cifar(56, "none"), 853_018),
}

SMALL = ResNetConfig(layers=(1, 2, 1, 1), stem_width=8, stage_widths=(4, 6, 4, 10), num_classes=7)
BASIC = ResNetConfig(layers=(2, 1), block="basic", stem_width=6, stage_widths=(6, 10), num_classes=5)


def randomised(config, seed=0):
    """Variables of a config, with random parameters and statistics."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path.endswith("count"):
            return jnp.int32(rng.integers(3, 11))
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.1
        values = rng.normal(size=leaf.shape) * scale
        return jnp.asarray(np.abs(values) + 0.7 if path.endswith(("var", "scale")) else values, jnp.float32)

    shapes = ResNetModel.shapes(config)
    return {name: tree.map_with_path(draw, shapes[name]) for name in shapes}


def outputs(config, variables, x, **options):
    collections = {"params": variables["params"], "batch_stats": variables["stats"]}
    return jax.jit(lambda collections, x: ResNet(config).apply(collections, x, **options))(collections, x)


def images(b=2, height=37, width=41, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(b, height, width, 3)), jnp.float32)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    config, count = COUNTS[name]
    shapes = ResNetModel.shapes(config)
    assert tree.count(shapes["params"]) == count
    norms = sum(path.endswith("count") for path in tree.flatten(shapes["stats"]))
    assert norms == sum(path.endswith("scale") for path in tree.flatten(shapes["params"]))


def test_moco_s_wide_nets_widen_every_layer():
    config = ResNetConfig.r50w2x()
    assert (config.stem_width, config.features, config.inner_width(0)) == (128, 4096, 128)
    assert ResNetConfig.r50w4x().features == 8192
    assert ResNetConfig.wide_r50_2().features == 2048 and ResNetConfig.wide_r50_2().inner_width(3) == 1024


def test_feature_maps_have_the_strides_of_the_paper_whatever_the_size():
    variables = randomised(SMALL)
    features = outputs(SMALL, variables, images())
    sizes = {name: features[name].shape[1:3] for name in ("stem", "C2", "C3", "C4", "C5")}
    assert sizes == {"stem": (10, 11), "C2": (10, 11), "C3": (5, 6), "C4": (3, 3), "C5": (2, 2)}
    np.testing.assert_allclose(features["pooled"], features["C5"].mean((1, 2)), rtol=1e-5, atol=1e-6)
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        features["logits"], features["pooled"] @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5
    )
    pixel = outputs(SMALL, variables, images(1, 1, 1))
    assert pixel["C5"].shape == (1, 1, 1, 40) and np.isfinite(pixel["logits"]).all()


def test_v1_and_v1_5_have_the_same_parameters_and_different_numbers():
    old = dataclasses.replace(SMALL, stride_in_1x1=True)
    variables = randomised(SMALL)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, randomised(old))
    new_maps, old_maps = (outputs(config, variables, images()) for config in (SMALL, old))
    np.testing.assert_array_equal(new_maps["C2"], old_maps["C2"])  # no stride there
    assert new_maps["C3"].shape == old_maps["C3"].shape
    assert float(jnp.abs(new_maps["C3"] - old_maps["C3"]).max()) > 0.1


def test_dilation_keeps_the_size_and_the_strided_values():
    """At the pixels that the strided net computes, the first dilated block has the same values."""
    config = ResNetConfig(layers=(1, 1), stem_width=8, stage_widths=(4, 6), num_classes=0)
    dilated = dataclasses.replace(config, dilate=(True, False, False))
    variables = randomised(config)
    plain, wide = (outputs(c, variables, images())["C3"] for c in (config, dilated))
    assert wide.shape[1:3] == (10, 11)
    np.testing.assert_allclose(wide[:, ::2, ::2], plain, rtol=1e-4, atol=1e-5)


def test_option_a_pads_channels_on_both_sides_and_plain_adds_nothing():
    x = images(3, 8, 8)
    shared = {"layers": (1, 1), "stage_widths": (4, 10), "stem_width": 4, "num_classes": 0}
    padded, plain = (ResNetConfig.cifar(8, skip, **shared) for skip in ("pad", "none"))
    variables = randomised(padded)
    muted = dict(variables["params"]["stage2_block0"])
    muted["bn2"] = {"scale": jnp.zeros(10), "bias": jnp.zeros(10)}
    stats = {name: dict(value) for name, value in variables["stats"].items()}
    silent = {"params": variables["params"] | {"stage2_block0": muted}, "stats": stats}
    features = outputs(padded, silent, x)  # the branch is silent: only the shortcut is left
    np.testing.assert_array_equal(features["C3"][..., 3:7], features["C2"][:, ::2, ::2])
    assert not features["C3"][..., :3].any() and not features["C3"][..., 7:].any()
    assert not outputs(plain, silent, x)["C3"].any()


def test_initialisation_is_torchvision_s():
    config = ResNetConfig(layers=(1, 1), stem_width=64, stage_widths=(64, 128), zero_init_residual=True)
    params = jax.jit(ResNet(config).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    block = params["stage2_block0"]
    assert float(block["conv2"]["kernel"].std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.03)
    assert float(params["stem_conv"]["kernel"].std()) == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.03)
    assert not block["bn3"]["scale"].any()
    assert (block["bn2"]["scale"] == 1).all() and (block["shortcut_bn"]["scale"] == 1).all()
    bound = 512**-0.5
    for leaf in params["head"].values():
        assert float(jnp.abs(leaf).max()) <= bound and float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_training_gradients_are_the_same_with_remat_and_with_groups_they_differ():
    variables, x = randomised(BASIC), images(4, 16, 13)

    def gradient(config, groups):
        def loss(params):
            collections = {"params": params, "batch_stats": variables["stats"]}
            out, new = ResNet(config).apply(collections, x, train=True, bn_groups=groups, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(out["logits"])), new["batch_stats"]

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    once, stats = gradient(BASIC, 1)
    again, same = gradient(dataclasses.replace(BASIC, remat=True), 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (once, stats), (again, same))
    grouped, _ = gradient(BASIC, 2)
    assert float(jnp.abs(grouped["stem_conv"]["kernel"] - once["stem_conv"]["kernel"]).max()) > 1e-3
    assert int(stats["stem_bn"]["count"]) == int(variables["stats"]["stem_bn"]["count"]) + 1


ROUND_TRIPS = {
    "torchvision": SMALL,
    "torchvision basic": dataclasses.replace(BASIC, layers=(1, 1, 1, 2), stage_widths=(6, 10, 4, 8)),
    "torchvision groups": dataclasses.replace(SMALL, groups=2, width_per_group=96),
    "torchvision headless": dataclasses.replace(SMALL, num_classes=0),
    "hf": SMALL,
    "cifar": ResNetConfig.cifar(14, "pad", stage_widths=(4, 6, 10), stem_width=4),
    "cifar B": ResNetConfig.cifar(8, "projection", stage_widths=(4, 6, 10), stem_width=4),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_file_is_recognised_and_written_back_bit_for_bit(tmp_path, name):
    config, layout = ROUND_TRIPS[name], name.split()[0]
    model = ResNetModel(config, **randomised(config))
    mmjax.export(model, tmp_path / "once", layout=layout)
    loaded = mmjax.load(tmp_path / "once" / "model.safetensors")
    assert loaded.layout == layout and loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.params), model.params)
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.stats), model.stats)
    mmjax.export(loaded, tmp_path / "twice", layout=layout)
    files = [(tmp_path / part / "model.safetensors").read_bytes() for part in ("once", "twice")]
    assert files[0] == files[1]


def test_old_files_and_wrapped_files_load_too(tmp_path):
    table = next(layout for layout in LAYOUTS if layout.name == "torchvision").table(SMALL)
    variables = randomised(SMALL)
    arrays = save_table(table, variables)
    old = {f"module.{key}": value for key, value in arrays.items() if not key.endswith("num_batches_tracked")}
    write_safetensors(tmp_path / "old.safetensors", old, {})
    loaded = mmjax.load(tmp_path / "old.safetensors")
    assert loaded.config == SMALL and int(loaded.stats["stem_bn"]["count"]) == 0
    np.testing.assert_array_equal(loaded.params["stem_conv"]["kernel"], variables["params"]["stem_conv"]["kernel"])
    short = {key: value for key, value in arrays.items() if key != "layer2.0.bn1.weight"}
    with pytest.raises(MmjaxError, match=r"layer2\.0\.bn1\.weight"):
        load_table(table, short, ResNetModel.shapes(SMALL), "short")


def test_encoders_of_other_systems_are_not_taken_for_a_resnet():
    table = next(layout for layout in LAYOUTS if layout.name == "torchvision").table(SMALL)
    keys = [key for entry in table for key in entry.sources]
    for prefix in ("module.encoder_q.", "visual.", "module.base_encoder."):
        for layout in LAYOUTS:
            assert not layout.recognise(layout.unwrap([prefix + key for key in keys]).keys(), None)


def test_unsupported_layouts_and_blocks_are_refused():
    model = ResNetModel(ResNetConfig.cifar(8), {}, {})
    for layout in ("torchvision", "hf"):
        with pytest.raises(MmjaxError, match="stem='cifar'"):
            mmjax.export(model, "nowhere", layout=layout)
    with pytest.raises(MmjaxError, match="groups"):
        ResNetConfig.r18(groups=2)
    with pytest.raises(MmjaxError, match="depth=21"):
        ResNetConfig.cifar(21)
    with pytest.raises(MmjaxError, match="layers"):
        ResNetConfig(layers=(1, 2))


def test_the_model_encodes_and_classifies():
    model = ResNetModel(SMALL, **randomised(SMALL))
    x = np.asarray(images(3))
    features = model.encode_image(x)
    pooled = outputs(SMALL, randomised(SMALL), x)["pooled"]
    np.testing.assert_allclose(features, pooled / jnp.linalg.norm(pooled, axis=1, keepdims=True), rtol=1e-4, atol=1e-5)
    predictions = model.classify(x, labels="abcdefg", top=7)
    logits = model.forward(pixel_values=x)["logits"]
    chances = jax.nn.softmax(logits)
    assert [best[0][0] for best in predictions] == ["abcdefg"[i] for i in np.argmax(logits, 1)]
    for row, best in zip(chances, predictions):
        assert sum(chance for _, chance in best) == pytest.approx(1, abs=1e-5)
        assert dict(best)["c"] == pytest.approx(float(row[2]), rel=1e-5)
    with pytest.raises(MmjaxError, match="2 names for the"):
        model.classify(x, labels=["a", "b"])
    with pytest.raises(MmjaxError, match="no classification head"):
        ResNetModel(dataclasses.replace(SMALL, num_classes=0), {}, {}).classify(x)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_training_gradients_of_a_whole_net_are_torch_s():
    """Hugging Face's bottleneck net in training mode, gradients of every parameter."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(SMALL, layers=(1, 2, 1, 1))
    sizes = {"num_labels": 7, "embedding_size": 8, "hidden_sizes": [16, 24, 16, 40], "depths": [1, 2, 1, 1]}
    hf_model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).train()
    table = next(layout for layout in LAYOUTS if layout.name == "hf").table(config)
    variables = randomised(config)
    arrays = save_table(table, variables)
    hf_model.load_state_dict({key: torch.tensor(value) for key, value in arrays.items()})
    x = images(5, 64, 53)
    logits = hf_model(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).logits
    torch.sin(logits).sum().backward()

    def loss(params):
        collections = {"params": params, "batch_stats": variables["stats"]}
        out, new = ResNet(config).apply(collections, x, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(out["logits"])), (out["logits"], new["batch_stats"])

    grads, (actual, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    scale = float(logits.abs().max())
    np.testing.assert_allclose(actual, logits.detach().numpy(), rtol=0, atol=1e-4 * scale)
    after = save_table(table, {"params": grads, "stats": stats})
    buffers = dict(hf_model.named_buffers())
    gradients = {name: parameter.grad for name, parameter in hf_model.named_parameters()}
    for key, value in after.items():
        reference = (gradients[key] if key in gradients else buffers[key]).numpy()
        np.testing.assert_allclose(value, reference, rtol=0, atol=1e-4 * np.abs(reference).max(), err_msg=key)
