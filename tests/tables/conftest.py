"""Fixtures of tests of tables."""

from pathlib import Path

import pytest
from shared.tables import write_hospitals


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    return write_hospitals(tmp_path)
