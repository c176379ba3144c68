"""Folders of models and letters that the tests of texts share."""

import shutil
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a cache of its own, into which a GGUF file is unpacked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copied(tmp_path: Path, tiny_base: Path) -> Path:
    """Return a copy of the tiny language model, which a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copied"))


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three clients with ten letters each, not to be changed."""
    return import_module("shared.texts").write_letters(tmp_path_factory.mktemp("desk") / "letters")
