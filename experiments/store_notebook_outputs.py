"""Executes the notebooks and stores them with their outputs, as readers on GitHub and Colab see them.

    python experiments/store_notebook_outputs.py 01_quickstart 03_language

Settings are small enough for a few minutes on two CPU cores; the notebooks name them. The pictures have as
many colours as fit in 380 KB; progress bars and warnings on stderr are dropped.
"""

import base64
import copy
import io
import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 380_000
SETTINGS = {
    "01_quickstart": {"steps": "120"},
    "02_momentum_ablation": {"steps": "200", "flags": "--eval_every 0"},
    "03_language": {"new_tokens": "40"},
    "04_align_and_bootstrap": {"steps": "400", "tuning_steps": "100"},
}


def store(name: str) -> None:
    """Executes one notebook in an empty folder beside a clone and writes it back with its outputs."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for key, value in SETTINGS[name].items():
        os.environ[f"MMJAX_NOTEBOOK_{key.upper()}"] = value
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "mmjax-clone").symlink_to(ROOT, target_is_directory=True)
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources).execute()
        hidden = (f"{folder}/", "")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for colours in (256, 128, 64, 32):
        text = nbformat.writes(cleaned(notebook, colours, hidden), indent=1)
        if len(text.encode()) < LIMIT:
            break
    path.write_text(text + "\n")
    print(f"{path.name}: {len(text)} bytes, pictures of {colours} colours")


def cleaned(notebook: nbformat.NotebookNode, colours: int, hidden: tuple[str, str]) -> nbformat.NotebookNode:
    """A copy without stderr, progress bars and cell metadata, with small pictures."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = joined([clean(output, colours, hidden) for output in outputs])
    return notebook


def clean(output: nbformat.NotebookNode, colours: int, hidden: tuple[str, str]) -> nbformat.NotebookNode:
    """An output with small pictures and without the names of temporary folders."""
    if "text" in output:
        output.text = output.text.replace(*hidden)
    if "image/png" in output.get("data", {}):
        picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
        picture.thumbnail((800, 1600))
        buffer = io.BytesIO()
        picture.quantize(colours).save(buffer, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(buffer.getvalue()).decode()
    return output


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Without the empty outputs that progress bars leave; consecutive pieces of text as one."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if "text" not in output and not any(str(value).strip() for value in output.get("data", {}).values()):
            continue
        if "image/png" not in output.get("data", {}) and not output.get(
            "text", output.get("data", {}).get("text/plain")
        ):
            continue
        if merged and "text" in output and "text" in merged[-1]:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


if __name__ == "__main__":
    for notebook_name in sys.argv[1:] or SETTINGS:
        store(notebook_name)
