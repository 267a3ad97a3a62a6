"""The layers of the package: every import points down, and data and text never reach jax.

Imports are read from the source, those inside functions too: a late import is an arrow as well.
"""

import ast
import functools
import pathlib

import pytest

from mmjax.training.experiment import load_experiment

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmjax"
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))

LAYERS = (
    {"channels", "errors", "tree", "types"},
    {"nn", "weights"},
    {"objectives"},
    {"training"},
    {"data", "text"},
    {"generation"},
    {"evaluation"},
    {"interface"},
    {"models"},
    {"hub", "adapters"},
    {"recipes"},
    {"cli", "__init__", "__main__"},
)
"""Lowest first. Packages of one set are neighbours."""
APART = ({"nn", "weights"},)
"""Neighbours that must not import each other."""
ABOVE_WEIGHTS = {"models", "hub", "adapters"}
"""Only these packages import weights/: training, evaluation and data know no public layout."""
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}

OUTSIDE_NETWORKS = {"training", "evaluation", "interface"}
"""Packages that a system's training and task code imports and its networks do not: this distinguishes the two."""
COMPILERS = {
    "jit",
    "pjit",
    "pmap",
    "shard_map",
    "make_mesh",
    "set_mesh",
    "use_mesh",
    "Mesh",
    "AbstractMesh",
    "sharding",
}
"""The names of jax that shard or compile a step."""
INQUIRIES = {"jax.sharding.get_abstract_mesh"}
"""These only read what the lift has set."""


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: pathlib.Path) -> set[str]:
    """Everything a file imports, as dotted names down to the module: `from mmjax import hub` is mmjax.hub."""
    names_imported: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names_imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & MODULES.keys()
            names_imported |= modules | ({node.module} if names - modules else set())
    return names_imported


def package_of(module: str) -> str:
    """mmjax.training.loop -> training; mmjax itself -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def own_imports(module: str) -> set[str]:
    return {name for name in imports(MODULES[module]) if name.split(".")[0] == "mmjax"}


def reached(module: str) -> set[str]:
    """The package's modules that are loaded with this one, their parents' __init__ apart from the package's own."""
    visited, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in visited:
            visited.add(name)
            parents = [".".join(name.split(".")[:depth]) for depth in range(2, name.count(".") + 1)]
            waiting += [*own_imports(name), *(parent for parent in parents if parent in MODULES)]
    return visited


def imported(module: str) -> set[str]:
    """This module and all of the package's that it imports, directly or not; `reached` without the parents."""
    visited, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in visited:
            visited.add(name)
            waiting += own_imports(name) & MODULES.keys()
    return visited


def test_every_package_has_a_level():
    packages = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert packages <= LEVEL.keys(), f"not in LAYERS: {sorted(packages - LEVEL.keys())}"
    assert {"training", "models", "data", "nn", "evaluation"} <= packages


def test_late_and_nested_imports_are_read(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(
        "import jax.numpy\ndef f():\n    from mmjax import hub, load\n    from mmjax.training import loop\n"
    )
    assert imports(file) == {"jax.numpy", "mmjax.hub", "mmjax", "mmjax.training.loop"}
    file.write_text("import jax\n@jax.jit\ndef f(x):\n    from jax import pmap\n    return jax.sharding.Mesh\n")
    assert {name for _, name in compilers(tree_of.__wrapped__(file))} == {"jax.jit", "jax.pmap", "jax.sharding.Mesh"}


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
    here = package_of(module)
    wrong = []
    for target in sorted(own_imports(module)):
        there = package_of(target)
        walled = any({here, there} == wall for wall in APART)
        weights = there == "weights" and here != "weights" and here not in ABOVE_WEIGHTS
        if LEVEL[there] > LEVEL[here] or walled or weights:
            wrong.append(target)
    assert not wrong, f"{module} ({here}) imports upwards: {', '.join(wrong)}"


def test_no_module_imports_itself_through_others():
    imported = {module: own_imports(module) - {module} for module in MODULES}
    cyclic = []
    for module in MODULES:
        reachable: set[str] = set()
        waiting = [module]
        while waiting:
            new = imported[waiting.pop()] - reachable
            reachable |= new
            waiting += new
        if module in reachable:
            cyclic.append(module)
    assert not cyclic, f"they import each other: {', '.join(cyclic)}"


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) in ("data", "text")])
def test_data_and_text_import_no_jax(module):
    for name in reached(module):
        outside = {target.split(".")[0] for target in imports(MODULES[name])}
        wrong = outside & {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
        assert not wrong, f"{module} reaches {name}, which imports {', '.join(wrong)}"


@pytest.mark.parametrize("module", [name for name in MODULES if package_of(name) == "models"])
def test_systems_share_networks_but_no_training_and_no_tasks(module):
    system = module.split(".")[2] if module.count(".") >= 2 and MODULES[module].parent.name != "models" else None
    for target in own_imports(module):
        parts = target.split(".")
        if len(parts) == 4 and parts[1] == "models" and parts[2] != system:
            wrong = sorted(name for name in imported(target) if package_of(name) in OUTSIDE_NETWORKS)
            assert not wrong, f"{module} imports {target}, which is no network alone: it imports {', '.join(wrong)}"


def compilers(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, name) of what compiles or places: `jax.jit`, `from jax import pmap`, `jax.sharding.Mesh`."""
    compiling = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "jax" and COMPILERS & set(rest):
                compiling.append((node.lineno, name))
    # `jax.sharding` inside `jax.sharding.Mesh` is the same use, and inside an inquiry part of it.
    return [
        (line, name)
        for line, name in compiling
        if name not in INQUIRIES and not any(o.startswith(name + ".") for at, o in compiling if at == line)
    ]


def runs_in_a_lift(tree: ast.AST) -> bool:
    """Whether a file has a function or a field called axis_name: what a lift hands down to whatever runs inside it."""
    return any(
        (isinstance(node, ast.arg) and node.arg == "axis_name")
        or (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "axis_name")
        for node in ast.walk(tree)
    )


def training_path() -> list[str]:
    """Training, objectives and nn; of models what runs in a lift, and the models' modules that it imports."""
    inside = {name for name in MODULES if package_of(name) in ("training", "objectives", "nn")}
    for name in MODULES:
        if package_of(name) == "models" and runs_in_a_lift(tree_of(MODULES[name])):
            inside |= {name, *(other for other in imported(name) if package_of(other) == "models")}
    return sorted(inside)


def test_the_training_path_is_determined_by_content():
    path = training_path()
    for name in (
        "albef.pretrain",
        "albef.assignment",
        "albef.network",
        "vit.supervised",
        "clip.network",
        "bert.finetune",
    ):
        assert f"mmjax.models.{name}" in path
    assert "mmjax.models.albef.tasks" not in path  # a loaded model, which compiles by itself
    assert runs_in_a_lift(ast.parse("class A:\n    axis_name: str | None = None"))
    assert not runs_in_a_lift(ast.parse("def f(x): return g(x, axis_name=None)"))


@pytest.mark.parametrize("module", training_path())
def test_only_lift_compiles_the_training_path(module):
    compiling = compilers(tree_of(MODULES[module]))
    if module == "mmjax.training.lift":
        assert {"jax.jit", "jax.pmap", "jax.make_mesh"} <= {name for _, name in compiling}
    else:
        assert not compiling, "; ".join(f"{MODULES[module]}:{line}: {name}" for line, name in compiling)


@pytest.mark.parametrize("module", MODULES)
def test_no_other_framework(module):
    outside = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not outside & {"torch", "torchvision", "transformers", "tensorflow", "timm", "open_clip"}


def defines_config(path: pathlib.Path) -> bool:
    return any(isinstance(node, ast.ClassDef) and node.name == "Config" for node in tree_of(path).body)


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if defines_config(path)], ids=lambda path: path.stem)
def test_an_experiment_loads_and_its_defaults_are_valid(path):
    config = load_experiment(path)()
    assert config.steps > 1 and config.batch_size > 1
    systems = {folder.name for folder in (PACKAGE / "models").iterdir()}
    known = systems | {"finetune", "segment", "detect"}
    assert any(f"{path.stem}_".startswith(f"{name}_") for name in known), (
        "<system>_<variant>, or what is for all systems"
    )


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if not defines_config(path)], ids=lambda path: path.stem)
def test_what_is_not_an_experiment_is_a_program(path):
    assert 'if __name__ == "__main__":' in path.read_text()
