"""Fixtures and settings that every test shares."""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

# Before jax is imported: the tests run on CPU, and compiled programs are cached between runs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "mmjax-tests-jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Programs of the tests compile for seconds and run for milliseconds: most of LLVM's work is left out, and so are XLA's
# newer emitters of fused kernels. A step of ALBEF's retrieval compiles in 6.6 s of CPU, not in 19.2. XLA's passes, and
# with them the order of the sums, stay. (Without emitters and without the fusion pass XLA compiles wrong programs.)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    # jaxlib 0.12 aborts at the flag, which it does not know.
    " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib") < "0.11" else ""
)

import pytest

if importlib.util.find_spec("xdist"):
    from xdist.scheduler import LoadFileScheduling

    class OneTorchWorker(LoadFileScheduling):
        """A file's tests run on one worker, as with --dist loadfile; so do those of all files that load PyTorch.

        PyTorch and transformers take 4 s of CPU to load and 0.35 GB for as long as the worker lives.
        """

        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return "torch" if _loads_torch(scope) else scope

    def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
        return OneTorchWorker(config, log) if config.getoption("dist") == "loadfile" else None


if os.environ.get("MMJAX_CHECK_ARRAYS"):
    from jaxtyping import install_import_hook

    install_import_hook("mmjax", "array_checker.check")


@functools.cache
def _loads_torch(file: str) -> bool:
    return re.search(r"mark\.torch|importorskip\(.(torch|transformers)", (ROOT / file).read_text()) is not None


ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


MAPS, RESIDENT = 15_000, 3 * 2**30
"""Memory maps and bytes of a test process from which on a module's end releases what it can."""


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Compiled programs are released before there are too many of them.

    Linux limits a process to 65,530 memory maps, and XLA crashes with a segmentation fault where it gets none. glibc
    keeps what is freed in the arenas of its threads: `malloc_trim` gives it back to the system.
    """
    yield
    status = pathlib.Path("/proc/self/statm")
    if not status.exists():
        return
    resident = int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    maps = pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    if maps > MAPS or resident > RESIDENT:
        import ctypes
        import gc

        import jax

        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> pathlib.Path:
    """The folder of fact sheets, vaults and small real data beside the clone."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """The folder of golden vaults: MMJAX_GOLDEN, or shared/golden beside the clone."""
    folder = pathlib.Path(os.environ.get("MMJAX_GOLDEN", SHARED / "golden"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; MMJAX_GOLDEN names another folder")
    return folder


@pytest.fixture
def unchecked_arrays() -> Iterator[None]:
    """Wrong shapes reach the function, whose own message the test is of: `array_checker.py` is off."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def full_compilation() -> Iterator[None]:
    """All of LLVM's work: for tests that hold two programs to each other in the last bits, and for long trainings.

    All other tests skip most of its optimisations, as this file sets in the environment; children inherit that. XLA's
    own passes, and so the order of the sums, stay.
    """
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
