"""From a path or a hub id to the files of a model: the download, and the choice of the weight file."""

import os
import pathlib
import re
from collections.abc import Iterable

from mmjax.errors import MmjaxError

NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
"""The file names of weights in a folder or a hub repository, the preferred first."""

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".gguf")
"""The suffixes of weight files with other names, the preferred first."""

SHARDS = {
    "model.safetensors.index.json": r"model-\d+-of-\d+\.safetensors",
    "pytorch_model.bin.index.json": r"pytorch_model-\d+-of-\d+\.bin",
}
"""The names of the shards of an index, as save_pretrained and the hub write them."""

SMALL = (".json", ".txt", ".model", ".spm", ".jinja")
"""Suffixes of configs, tokenizers and chat templates."""

Source = str | os.PathLike[str]


def resolve_source(source: Source) -> pathlib.Path:
    """A path that exists; a hub id is downloaded first.

    Raises MmjaxError: neither a file nor a folder nor a hub id, or the download failed.
    """
    path = pathlib.Path(source)
    if path.exists():
        return path
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not path.parent.exists():
        return _download(source)
    raise MmjaxError(f"{source}: neither a file nor a folder, nor a hub id of the form owner/name")


def _download(repository: str) -> pathlib.Path:
    """A folder with the files of a hub repository that `load` needs; without network, the local copy if any."""
    import huggingface_hub

    errors = (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError)
    try:
        names = huggingface_hub.list_repo_files(repository)
    except errors as error:
        try:
            return pathlib.Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
        except errors:
            raise MmjaxError(f"{repository}: not a file or folder, and the hub could not be read: {error}") from error
    chosen = files_to_download(repository, names)
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=chosen))
    except errors as error:
        raise MmjaxError(f"{repository}: the download from the hub failed: {error}") from error


def files_to_download(repository: str, names: Iterable[str]) -> list[str]:
    """One copy of the weights, and all configs, tokenizers and templates beside it.

    names: every file of the repository. Sub-folders hold other formats (onnx/, original/) and other copies; only chat
        templates and sentence-transformers' pooling are taken from them. Safetensors come before PyTorch files, a
        single file before shards.
    Raises MmjaxError: no weights, or several files and no rule which of them is meant.
    """
    every = sorted(names)
    top = [name for name in every if "/" not in name]
    small = [name for name in top if name.endswith(SMALL) and not name.endswith(".index.json")]
    small += [name for name in every if name.startswith("additional_chat_templates/")]
    small += [name for name in every if re.fullmatch(r"\d+_Pooling/config\.json", name)]
    preferred = next((name for name in NAMES if name in top), None)
    if preferred is not None:
        shards = SHARDS.get(preferred)
        return [*small, preferred, *(name for name in top if shards and re.fullmatch(shards, name))]
    for suffix in SUFFIXES:
        candidates = [name for name in top if name.endswith(suffix)]
        if len(candidates) > 1:
            raise MmjaxError(
                f"{repository} holds several weight files ({', '.join(candidates)}); download one, and load that file"
            )
        if candidates:
            return [*small, *candidates]
    raise MmjaxError(f"{repository} holds no weight file")


def find_weight_file(path: pathlib.Path) -> pathlib.Path:
    """The file that holds the weights of a folder; a file is returned as it is.

    Raises MmjaxError: no weight file, or several and no rule which of them is meant.
    """
    if path.is_file():
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    candidates = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.name[0] != ".")
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(file.name for file in candidates)
    raise MmjaxError(f"{path} holds " + (f"several weight files ({names}); name one" if names else "no weight file"))
