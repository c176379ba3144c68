"""Tests of ``trackers``."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from shared.callbacks import Stops
from shared.runs import json_lines

import fedveil as fv
from fedveil.run.trackers import MetricsCsv

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")


OTHERS = pytest.mark.filterwarnings("ignore")  # of other people's code


TWO = {"num_rounds": 2, "quiet": True}


def test_csv_has_a_row_for_each_round_also_of_a_run_that_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fv.simulate("digits", folder=tmp_path, callbacks=["csv", Stops()], **TWO)
    fv.simulate(resume=tmp_path, quiet=True)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = json_lines(tmp_path / "metrics.jsonl")
    assert [int(row["round"]) for row in rows] == [1, 2]
    assert [float(row["accuracy"]) for row in rows] == [row["accuracy"] for row in wanted]
    assert [float(row["epsilon_client"]) for row in rows] == [row["epsilon_client"] for row in wanted]
    tracker, loss = MetricsCsv(), {"clients/loss": 0.5, "evaluation": {}}
    tracker.start(fv.RunStart("late", "digits", tmp_path, 3, {}, {}, ({"round": 1},)))
    for number, evaluated in ((2, loss), (3, {})):
        tracker.round(fv.RoundEnd(number, {}, {}, {"round": number, **evaluated}, {}))
    assert (tmp_path / "metrics.csv").read_text().split() == ["round,clients/loss", "1,", "2,0.5", "3,"]


@OTHERS
def test_tensorboard_reads_its_event_files_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fv.simulate("digits", folder=tmp_path, callbacks=["tensorboard"], **TWO)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("accuracy", "epsilon_client"):
        found = {each.step: each.value for each in events.Scalars(name)}
        assert found == pytest.approx({row["round"]: row[name] for row in run.history}, rel=1e-6)
    assert "configuration/text_summary" in events.Tags()["tensors"]


@OTHERS
def test_mlflow_keeps_parameters_metrics_and_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "hospitals")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fv.simulate("digits", folder=tmp_path / "run", callbacks=["mlflow", Stops()], **TWO)
    run = fv.simulate(resume=tmp_path / "run", quiet=True)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("hospitals").experiment_id
    (found,) = client.search_runs([experiment])
    assert (found.info.status, found.data.params["task.name"]) == ("FINISHED", "digits")
    history = client.get_metric_history(found.info.run_id, "accuracy")
    assert {each.step: each.value for each in history} == {
        row["round"]: row["accuracy"] for row in run.history
    }
    kept = {each.path for each in client.list_artifacts(found.info.run_id)}
    assert kept == {"result.json", "model.safetensors"}


@OTHERS
def test_wandb_keeps_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = fv.simulate("digits", folder=tmp_path, callbacks=["wandb"], **TWO)
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    items = [Record.FromString(data).history.item for data in records_of(path.read_bytes())]
    rows = [{(each.key or each.nested_key[0]): json.loads(each.value_json) for each in row} for row in items]
    assert [row["accuracy"] for row in rows if row] == [row["accuracy"] for row in run.history]


def records_of(log: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format, in which wandb keeps what it has not sent."""
    block, whole, at = 2**15, b"", 7
    while at + 7 <= len(log):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def test_infinite_and_missing_numbers_reach_no_tracker() -> None:
    from fedveil.run.trackers import numbers_of

    row = {
        "round": 3,
        "loss": math.nan,
        "epsilon_client": "infinity",
        "dropped": {"late": 2},
        "abandoned": True,
    }
    assert numbers_of(row) == {"round": 3.0, "dropped/late": 2.0, "abandoned": 1.0}
