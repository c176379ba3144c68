"""examples/hospitals: four hospitals' tables in four styles become one private model without a line of code."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedveil.__main__ import run

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

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


def test_real_tables_train_within_their_budget_and_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("XDG_DATA_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, str(EXAMPLE / "make_hospitals.py")], check=True)
    (tmp_path / "hospitals" / "schema.yaml").write_text((EXAMPLE / "schema.yaml").read_text())
    common = (
        "task=csv",
        "task.folder=hospitals",
        "task.held_out_file=public.csv",
        "task.data_id=hospitals",
        "batch_size=50",
    )
    capsys.readouterr()
    assert run(["simulate", *common, "num_rounds=4", "hydra.run.dir=first", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["data"] == "real" and result["population"] == 4 and result["rng"] == "system"
    assert result["metrics"]["accuracy"] > 0.6
    assert all(row["epsilon"] <= 3 for row in result["privacy"])
    assert (tmp_path / "first" / "schema.yaml").exists()
    assert run(["predict", "first", "public.csv", "--out", "found.csv"]) == 0
    found = [line.split(",")[0] for line in (tmp_path / "found.csv").read_text().splitlines()[1:]]
    truth = [line.rsplit(",", 1)[1] != "0" for line in (tmp_path / "public.csv").read_text().splitlines()[1:]]
    right = sum((word == "ill") == ill for word, ill in zip(found, truth, strict=True))
    assert right / len(truth) == pytest.approx(result["metrics"]["accuracy"], abs=1e-6)
