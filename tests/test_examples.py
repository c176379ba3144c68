"""Examples run, and are as short as they are said to be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LINES = {
    "photos": ("torchvision", 12),
    "letters": ("datasets", 30),
}  # what it needs, and the most lines of one's own


@pytest.mark.parametrize("name", LINES)
def test_an_example_runs_and_is_short(name: str, tmp_path: Path) -> None:
    needed, most = LINES[name]
    pytest.importorskip(needed)
    path = EXAMPLES / f"{name}.py"
    own = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign)
    ]
    lines = [
        line for node in own for line in path.read_text().splitlines()[node.lineno - 1 : node.end_lineno]
    ]
    assert len([line for line in lines if line.strip()]) <= most
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
