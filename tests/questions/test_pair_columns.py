"""Questions about pairs: their columns from a schema, and the command in every mode."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fedveil as fv
from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.questions.pair_columns import schema_path, with_columns

SCHEMA = """
label: ill
columns:
  age: {low: 20, high: 80}
  dose: {low: 0, high: 8, edges: [1, 2, 3, 4, 5]}
  ward: {categories: [a, b, c, d, e, f, g, h]}
  ill: {categories: ["no", "yes", worse]}
"""
STUDY = """
label: {kind: survival, time: days, event: died, bins: 4}
columns:
  age: {low: 20, high: 80}
  days: {low: 0, high: 60}
  died: {categories: ["no", "yes"]}
"""


def completed(tmp_path: Path, text: str, **question: object) -> dict[str, object]:
    (tmp_path / "schema.yaml").write_text(text)
    keys = with_columns({"name": "x", "ask": [{"kind": "pairs", **question}]}, tmp_path / "schema.yaml")
    return keys["ask"][0]


def test_a_schema_gives_the_label_and_few_levels_of_each_input(tmp_path: Path) -> None:
    assert completed(tmp_path, SCHEMA) == {
        "kind": "pairs",
        "of": "ill",
        "categories": [["no"], ["yes", "worse"]],
        "columns": {
            "age": [20, 35, 50, 65, 80],
            "dose": [0, 1, 3, 4, 8],
            "ward": [["a"], ["b"], ["c", "d"], ["e"], ["f"], ["g", "h"]],
        },
    }


def test_the_event_of_a_survival_label_is_what_pairs_act_on(tmp_path: Path) -> None:
    question = completed(tmp_path, STUDY)
    assert (question["of"], question["categories"]) == ("died", [["no"], ["yes"]])
    number = completed(tmp_path, STUDY, of="Days")
    assert (number["of"], number["low"], number["high"]) == ("days", 0, 60)


def test_columns_and_words_of_a_question_go_before_the_schema(tmp_path: Path) -> None:
    own = {"of": "ill", "categories": [["no", "yes"], ["worse"]]}
    assert completed(tmp_path, SCHEMA, **own)["categories"] == own["categories"]
    kept = {"columns": {"age": [0, 1], "dose": [0, 1]}, "of": "ill", "low": 0, "high": 1}
    assert completed(tmp_path, "", **kept) == {"kind": "pairs", **kept}


def test_a_label_of_several_columns_needs_a_name(tmp_path: Path) -> None:
    several = SCHEMA.replace("label: ill", "label: {kind: several, columns: [ill, ward]}")
    with pytest.raises(Refusal, match=r"of=None: name one column of the label: ward, ill"):
        completed(tmp_path, several)


def test_without_a_schema_columns_are_required(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"columns=None: give each column its edges.*task\.schema"):
        with_columns({"ask": [{"kind": "pairs"}]}, schema_path({"folder": tmp_path}))


@pytest.fixture
def wards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the tables of three wards, in which high age and high dose are ill alone or healthy together."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wards").mkdir()
    (tmp_path / "wards" / "schema.yaml").write_text(SCHEMA.replace(", worse", ""))
    draw = np.random.default_rng(0)
    for ward in range(3):
        ages, doses, kinds = draw.integers(20, 80, 600), draw.uniform(0, 8, 600), draw.integers(0, 8, 600)
        ill = ((ages >= 50) ^ (doses >= 3)) ^ (draw.random(600) < 0.2)
        rows = zip(ages, doses, kinds, ill, strict=True)
        lines = [
            f"{age},{dose:.1f},{'abcdefgh'[kind]},{'yes' if yes else 'no'}" for age, dose, kind, yes in rows
        ]
        (tmp_path / "wards" / f"{ward}.csv").write_text("\n".join(["age,dose,ward,ill", *lines]) + "\n")
    return tmp_path


TABLE = ("task=csv", "task.folder=wards", "task.simulated=true")


@pytest.mark.parametrize("privacy", ["client_central", "client_distributed", "record", "record_distributed"])
def test_pairs_are_answered_by_the_command_in_every_mode(
    privacy: str, wards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loose = ("privacy.target_epsilon=1e7", "privacy.allow_large_delta=true", f"privacy={privacy}")
    command = [
        "ask",
        "pairs",
        "--name",
        "first",
        "--records",
        "600",
        "--noise-multiplier",
        "0.02",
        *TABLE,
        *loose,
    ]
    assert run([*command, "--json"]) == 0
    first, *_, key = json.loads(capsys.readouterr().out)["answers"][0]["figures"]
    assert first["name"] == "age x dose" and first["low"] > 0
    assert key["said"] == '"task.pairs=[[age,dose]]"'
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert key["said"] in shown and max(map(len, shown.splitlines())) <= 80


def test_the_python_face_takes_the_columns_from_the_schema(wards: Path) -> None:
    asked = {"name": "first", "records": 600, "ask": [{"kind": "pairs"}]}
    task = {"name": "csv", "folder": "wards", "simulated": True}
    *_, key = fv.ask(asked, task, epsilon=3.0, seed=1)["answers"][0]["figures"]
    assert key["said"] == '"task.pairs=[[age,dose]]"'
