"""Intervals of a run on tables: its steps against the twin, its result, and `fedveil predict --interval`."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from shared.runs import run_quietly

import fedveil as fv
from fedveil.__main__ import run as fedveil
from fedveil.base.refusal import Refusal
from fedveil.benchmarks.intervals import descended
from fedveil.run.released import task_of
from fedveil.tables.descent import Descent
from fedveil.tables.intervals import interval_columns, law_of_number
from fedveil.tables.run_steps import NoInterval, require_replies
from fedveil.tasks.tables import tables_of

COLUMNS = "columns:\n  age: {low: 20, high: 90}\n  sex: {categories: [m, f]}\n"
LABELS = {"ill": "  ill: {categories: [no, yes]}\n", "cost": "  cost: {low: 0, high: 150}\n"}
KEYS = ["privacy=record_distributed", "task.simulated=true", "num_rounds=40", "seed=1"]


def write_sites(folder: Path, label: str) -> list[str]:
    """Write two sites' tables, public rows and a schema, and return the keys of a run on them."""
    stream = np.random.default_rng(0)

    def lines(count: int) -> str:
        age, sex, error = (
            stream.uniform(20, 90, count),
            stream.integers(0, 2, count),
            stream.normal(0, 8, count),
        )
        ill = stream.random(count) < 1 / (1 + np.exp(-(age - 55) / 20 - sex))
        rows = zip(age, sex, ill, 50 + 0.5 * age + 10 * sex + error, strict=True)
        cells = [f"{a:.4f},{'mf'[s]},{['no', 'yes'][int(i)]},{c:.4f}" for a, s, i, c in rows]
        return "\n".join(["age,sex,ill,cost", *cells, ""])

    (folder / "sites").mkdir()
    for name, count in (("sites/a.csv", 300), ("sites/b.csv", 200), ("public.csv", 150)):
        (folder / name).write_text(lines(count))
    (folder / "schema.yaml").write_text(f"label: {label}\n{COLUMNS}{LABELS[label]}")
    (folder / "new.csv").write_text("age,sex\n30,f\n80,m\n")
    return [
        "task=csv",
        "task.model=linear",
        f"task.folder={folder / 'sites'}",
        f"task.schema={folder / 'schema.yaml'}",
        f"task.held_out_file={folder / 'public.csv'}",
        *KEYS,
    ]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("label", ["ill", "cost"])
def test_the_twin_takes_the_steps_of_a_run(tmp_path: Path, label: str) -> None:
    keys = [
        *write_sites(tmp_path, label),
        "privacy.sample_rate=1",
        "privacy.noise_multiplier=0.05",
        "model=last",
    ]
    run = run_quietly([*keys, "privacy.target_epsilon=null"], tmp_path / "run")
    from safetensors.numpy import load_file

    from fedveil.tasks.tables import load

    task = load(
        str(tmp_path / "sites"),
        schema=str(tmp_path / "schema.yaml"),
        simulated=True,
        held_out_file=str(tmp_path / "public.csv"),
    )
    inputs = np.vstack([task.client_data(each).inputs.numpy() for each in (0, 1)])
    inputs = np.hstack([inputs, np.ones((500, 1))])
    targets = np.concatenate([task.client_data(each).targets.numpy() for each in (0, 1)])
    rate = run.result["learning_rate"]
    steps = Descent(rate, 0.75, 40, 1, clip=0.5, noise=0.0, share=1.0, records=500)
    arrays = load_file(tmp_path / "run" / "model.safetensors")
    model = np.hstack([arrays["weight"], arrays["bias"][:, None]])
    twin = descended(steps, inputs, targets, 2 * (label == "ill"), np.random.default_rng(0))
    assert np.abs(model - twin).max() < 2e-3 and np.abs(twin).max() > 0.1


def test_noise_of_the_steps_is_that_of_a_run(tmp_path: Path) -> None:
    keys = write_sites(tmp_path, "cost")
    words = ", ".join(f"w{number}" for number in range(390))
    schema = tmp_path / "schema.yaml"
    schema.write_text(schema.read_text().replace("[m, f]", f"[m, f, {words}]"))
    run_quietly([*keys, "num_rounds=1", "model=last"], tmp_path / "run")
    from safetensors.numpy import load_file

    weight = load_file(tmp_path / "run" / "model.safetensors")["weight"][0, 3:]  # of words that no row has
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    expected = 0.1 * 500
    noise = result["learning_rate"] * result["noise_multiplier"] * result["max_grad_norm"] / expected
    assert weight.std() == pytest.approx(noise, rel=0.2)  # 390 draws: five standard errors


@pytest.mark.parametrize(("label", "slope"), [("ill", 0.05), ("cost", 0.5)])
def test_a_run_gives_coefficients_and_predictions_with_intervals(
    tmp_path: Path, label: str, slope: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    result = run_quietly([*write_sites(tmp_path, label), "privacy.target_epsilon=8"], run).result
    by_name = {(row["column"], row["of"]): row for row in result["intervals"]["coefficients"]}
    age, sex = by_name["age", ""], by_name["sex", "f"]
    assert age["low"] < slope < age["high"] and age["high"] - age["low"] < slope
    assert sex["low"] < {"ill": 1.0, "cost": 10.0}[label] < sex["high"]
    capsys.readouterr()
    assert fedveil(["predict", str(run), str(tmp_path / "new.csv"), "--interval", "0.95"]) == 0
    first, second = rows(capsys.readouterr().out)
    for row in (first, second):
        assert float(row["low"]) < float(row["estimate"]) < float(row["high"])
    if label == "cost":
        assert float(first["low"]) < 75 < float(first["high"])
        assert float(first["new_high"]) - float(first["new_low"]) > 25  # 8 in each of 3.92 deviations
    assert "intervals.safetensors" in (run / "manifest.json").read_text()


def test_estimates_undo_the_weights_of_classes(tmp_path: Path) -> None:
    keys = write_sites(tmp_path, "ill")
    schema = tmp_path / "schema.yaml"
    schema.write_text(schema.read_text().replace("[no, yes]", "[no, yes], weights: {no: 1, yes: 4}"))
    result = run_quietly([*keys, "privacy.target_epsilon=8", "num_rounds=100"], tmp_path / "run").result
    age = next(row for row in result["intervals"]["coefficients"] if row["column"] == "age")
    assert age["low"] < 0.05 < age["high"]
    task = tables_of(task_of(tmp_path / "run"))
    columns = interval_columns(tmp_path / "run", task, tmp_path / "new.csv", 0.95)
    scores = [(30 - 55) / 20 + 1, (80 - 55) / 20]
    chances, said = (
        1 / (1 + np.exp(-np.array(scores))),
        fv.load(tmp_path / "run").predict(tmp_path / "new.csv"),
    )
    true = np.where(said["ill"] == "yes", chances, 1 - chances)
    assert np.all((columns["low"] < true) & (true < columns["high"]))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("weight: {visits: {low: 0, high: 2, missing: 1}}", "the weights of public rows are unknown"),
        ("group_weights: {sex: {m: {no: 1, yes: 1}, f: {no: 1, yes: 2}}}", "weights by group"),
    ],
    ids=["rows", "groups"],
)
def test_other_weights_leave_no_intervals(tmp_path: Path, key: str, words: str) -> None:
    keys = write_sites(tmp_path, "ill")
    for path in (tmp_path / "sites").glob("*.csv"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([f"{lines[0]},visits", *(f"{line},1" for line in lines[1:]), ""]))
    schema = tmp_path / "schema.yaml"
    schema.write_text(f"{key}\n{schema.read_text()}")
    assert words in run_quietly([*keys, "num_rounds=1"], tmp_path / "run").result["intervals"]["reason"]


def test_a_run_without_intervals_says_why(tmp_path: Path) -> None:
    keys = [each for each in write_sites(tmp_path, "ill") if not each.startswith("privacy=")]
    result = run_quietly([*keys, "num_rounds=1"], tmp_path / "run").result
    assert result["intervals"]["reason"].startswith("each client takes steps of its own")
    with pytest.raises(Refusal, match="the run has no intervals: each client takes steps of its own"):
        interval_columns(tmp_path / "run", None, tmp_path / "new.csv", 0.9)


def test_rounds_without_a_client_leave_no_intervals(tmp_path: Path) -> None:
    rows = [{"round": 1, "invited": 3, "replies": 3}, {"round": 2, "invited": 3, "replies": 2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(NoInterval, match="a client was missing in round 2"):
        require_replies(tmp_path)


def test_too_few_public_rows_of_a_number_name_the_remedy() -> None:
    inputs = np.hstack([np.eye(20), np.ones((20, 1))])
    with pytest.raises(NoInterval, match=r"has 20 rows.*at least 60; or use task\.model=linear"):
        law_of_number(inputs, np.arange(20.0))
