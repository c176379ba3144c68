"""examples/hospitals: four hospitals' tables in four styles become one private model without a line of code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "hospitals"
FILES = {
    "make_hospitals.py": "make_hospitals.py",
    "hospitals/schema.yaml": "schema.yaml",
    "hearts.yaml": "federation.yaml",
}


@pytest.mark.parametrize(("block", "file"), FILES.items())
def test_the_page_shows_the_example(block: str, file: str) -> None:
    page = (ROOT / "docs" / "tables.md").read_text()
    found = re.search(
        rf"<!-- file: {re.escape(block)} -->\n```\w+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE
    )
    assert found is not None and found[1] == (EXAMPLE / file).read_text()


def test_real_tables_train_within_their_budget_and_predict(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "HOME": str(tmp_path)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(str(EXAMPLE / "make_hospitals.py"))
    (tmp_path / "hospitals" / "schema.yaml").write_text((EXAMPLE / "schema.yaml").read_text())
    common = (
        "task=csv",
        "task.folder=hospitals",
        "task.held_out_file=public.csv",
        "task.data_id=hospitals",
        "batch_size=50",
    )
    printed = run("-m", "fedveil", "simulate", *common, "num_rounds=4", "hydra.run.dir=first", "--json")
    result = json.loads(printed)
    assert result["data"] == "real" and result["population"] == 4 and result["rng"] == "system"
    assert result["metrics"]["accuracy"] > 0.6
    assert all(row["epsilon"] <= 3 for row in result["privacy"])
    assert (tmp_path / "first" / "schema.yaml").exists()
    run("-m", "fedveil", "predict", "first", "public.csv", "--out", "found.csv")
    found = [line.split(",")[0] for line in (tmp_path / "found.csv").read_text().splitlines()[1:]]
    truth = [line.rsplit(",", 1)[1] != "0" for line in (tmp_path / "public.csv").read_text().splitlines()[1:]]
    right = sum((word == "ill") == ill for word, ill in zip(found, truth, strict=True))
    assert right / len(truth) == pytest.approx(result["metrics"]["accuracy"], abs=1e-6)
