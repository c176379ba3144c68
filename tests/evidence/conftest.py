"""Runs that the tests of reports share."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shared.reports import GOLDEN, KEPT


@pytest.fixture
def golden() -> dict[str, Any]:
    """Return the report of the run that is kept."""
    return json.loads(GOLDEN.read_text())


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Return a copy of the run that is kept, without its report."""
    return Path(shutil.copytree(KEPT, tmp_path / "kept", ignore=shutil.ignore_patterns("golden")))
