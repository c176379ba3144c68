"""Examples run, and are as short as they are said to be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LINES = {
    "photos": ("torchvision", 12),
    "letters": ("datasets", 30),
}  # what it needs, and the most lines of one's own

# What it needs, the class that its user has already, and the most lines beside that class and the imports.
ADAPTERS = {
    "lightning_module": ("pytorch_lightning", "Net", 5),
    "lora": ("datasets", "", 25),  # beside peft, which the checks have
    "sgd_classifier": ("sklearn", "", 10),
    "jax_function": ("jax", "", 30),
}


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


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapted_model_needs_few_lines_and_learns(name: str, tmp_path: Path) -> None:
    needed, given, most = ADAPTERS[name]
    pytest.importorskip(needed)
    path = EXAMPLES / f"{name}.py"
    tree = ast.parse(path.read_text())
    lines = dict(enumerate(path.read_text().splitlines(), start=1))
    for node in tree.body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text or isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "name", None) == given:
            for number in range(node.lineno, (node.end_lineno or 0) + 1):
                del lines[number]
    own = [line for line in lines.values() if line.strip() and not line.strip().startswith("#")]
    assert 0 < len(own) <= most
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    metrics, epsilon = re.findall(r"'accuracy': ([\d.]+).*\} (\S+)$", done.stdout, re.MULTILINE)[0]
    assert float(metrics) > 0.8 and 0 < float(epsilon) <= 3
