"""Recipes of the documentation for a part of the package, followed to the letter in a copy of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = re.compile(r" [\w/]+\.(py|yaml)")


def follow(diff: str, root: Path) -> None:
    """Apply a recipe: additions stand after the line shown before them, in the place of a removed one, or at the end."""
    path, lines, added = root, list[str](), list[str]()
    place: int | None = None
    for line in [*diff.splitlines(), " end/of.py"]:
        sign, text = line[:1], line[1:]
        if sign == "+":
            added.append(text)
            continue
        if sign == "-":
            assert lines.count(text) == 1, text
            place = lines.index(text)
            lines[place : place + 1] = added
            place, added = place + len(added), []
            continue
        end = len(lines) if place is None else place
        lines[end:end], added, place = added, [], None
        if FILE.fullmatch(line):
            if lines:
                path.write_text("\n".join(lines) + "\n")
            path = root / text
            lines = path.read_text().splitlines() if path.exists() else []
        elif text != "...":
            assert lines.count(text) == 1, text
            place = lines.index(text) + 1


def test_the_recipe_of_a_cohort_adds_one(tmp_path: Path) -> None:
    copy = tmp_path / "there" / "fedveil"
    other = shutil.ignore_patterns("tests", "docs", "benchmarks", "typings", ".*", "__pycache__", "build")
    shutil.copytree(ROOT, copy, ignore=other)
    page = (ROOT / "docs" / "architecture.md").read_text()
    (recipe,) = re.findall(r"### A cohort\n.*?```diff\n(.*?)```", page, re.DOTALL)
    follow(recipe, copy)
    environment = os.environ | {"PYTHONPATH": str(copy.parent), "HOME": str(tmp_path)}
    common = ["task=digits", "task.num_clients=40", "cohort=in_order", "cohort.size=10", "num_rounds=2"]
    command = [sys.executable, "-m", "fedveil", "simulate", *common, "privacy.target_epsilon=50"]
    command += ["privacy.allow_large_delta=true", "seed=1", "hydra.run.dir=run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["invited"] for row in rows] == [10, 10]
    assert "in_order" in (tmp_path / "run" / "config.yaml").read_text()
