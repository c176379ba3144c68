"""Callbacks of a run: what they are told and can reach, what their errors do, and the trackers beside their libraries."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared.runs import json_lines

import fedveil as fv
from fedveil.__main__ import run as command
from fedveil.audit.line import AuditLine
from fedveil.base import extras
from fedveil.privacy.audit.alarms import Alarm
from fedveil.privacy.audit.run_audit import Measured
from fedveil.privacy.audit.summary import Raised
from fedveil.run.average import early_of
from fedveil.run.trackers import MetricsCsv

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

OTHERS = pytest.mark.filterwarnings("ignore")  # of other people's code
TWO = {"num_rounds": 2, "quiet": True}
PLAIN = (str, bytes, int, float, bool, type(None), type(Path()))
OF_RELEASES = (fv.RunStart, fv.RoundEnd, fv.RunEnd, AuditLine, Measured, Raised, Alarm)


class Seen:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start(self, run: fv.RunStart) -> None:
        self.told.append(run)

    def round(self, done: fv.RoundEnd) -> None:
        self.told.append(done)

    def end(self, ending: fv.RunEnd) -> None:
        self.told.append(ending)


class Breaks(Seen):
    """Raises in every round."""

    def round(self, done: fv.RoundEnd) -> None:
        raise ValueError(f"round {done.round}")


class Stops(Seen):
    """Interrupts the run at once in its first round."""

    def round(self, done: fv.RoundEnd) -> None:
        raise KeyboardInterrupt


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json_lines(folder / "metrics.jsonl")


def test_callback_gets_start_rounds_and_end(tmp_path: Path) -> None:
    seen = Seen()
    run = fv.simulate("digits", folder=tmp_path / "run", callbacks=[seen], **TWO)
    start, first, second, end = seen.told
    assert (start.name, start.num_rounds, start.budgets, start.rows) == (
        "run",
        2,
        {"client": 3.0, "record": None},
        (),
    )
    assert start.config["task"]["name"] == "digits" and start.config["learning_rate"] == 8.0
    assert [json.loads(json.dumps(dict(each.row), default=dict)) for each in (first, second)] == rows_of(
        run.folder
    )
    assert first.epsilon["client"] < second.epsilon["client"] == run.history[-1]["epsilon_client"]
    assert second.metrics.items() <= run.metrics.items()
    assert (end.status, end.result["seed"]) == ("completed", 0)
    assert all((end.model[name] == value.numpy()).all() for name, value in run.model.state_dict().items())
    assert any((first.model[name] != second.model[name]).any() for name in second.model)


def test_average_is_of_the_last_models_and_longer_under_more_noise() -> None:
    lengths: list[int] = []
    for noise in (3.0, 9.0):
        seen = Seen()
        privacy = fv.ClientCentral(noise_multiplier=noise, target_epsilon=None)
        run = fv.simulate(
            "digits", privacy=privacy, num_rounds=20, callbacks=[seen], quiet=True, model="average"
        )
        _, *rounds, end = seen.told
        lengths.append(end.result["models_averaged"])
        for name, value in run.model.state_dict().items():
            last = np.stack([done.model[name] for done in rounds[-lengths[-1] :]])
            assert np.allclose(value.numpy(), last.mean(0, dtype=np.float64), atol=1e-6)
            assert not np.allclose(value.numpy(), last[-1], atol=1e-3)
        assert run.metrics["accuracy"] != rounds[-1].metrics["accuracy"]
    assert 1 < lengths[0] < lengths[1] == 10


def test_without_noise_there_is_no_average_to_take() -> None:
    seen = Seen()
    run = fv.simulate("digits", privacy="none", callbacks=[seen], model="average", **TWO)
    assert seen.told[-1].result["models_averaged"] == 1
    assert seen.told[-2].metrics.items() <= run.metrics.items()


@pytest.mark.parametrize("privacy", ["client_central", "record", "none"])
def test_callback_reaches_nothing_beyond_released_values(privacy: str) -> None:
    seen = Seen()
    fv.simulate(
        "digits",
        privacy=privacy,
        callbacks=[seen],
        audit="full" if privacy == "client_central" else "light",
        **TWO,
    )
    for value in seen.told:
        assert {type(each) for each in reachable(value)} <= {*PLAIN, *OF_RELEASES}
        with pytest.raises((AttributeError, TypeError)):
            value.round = 9
    _, done, *_, end = seen.told
    with pytest.raises(TypeError):
        done.row["round"] = 9
    with pytest.raises(TypeError):
        end.result["privacy"][0]["epsilon"] = 0.0
    with pytest.raises(ValueError, match="read-only"):
        next(iter(done.model.values()))[...] = 0


def reachable(value: object) -> Iterator[object]:
    """Yield every object that a value leads to, except arrays of the model and the containers of what they hold."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from (*reachable(key), *reachable(each))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from reachable(each)
    elif isinstance(value, np.ndarray):
        assert value.dtype == np.float32 and not value.flags.writeable
    elif isinstance(value, str):
        yield str(value)  # words of an enumeration are text
    else:
        yield value
        if is_dataclass(value):
            assert set(getattr(value, "__dict__", {})) <= {each.name for each in fields(value)}
            for each in fields(value):
                yield from reachable(getattr(value, each.name))


def test_raising_callback_is_reported_once_and_ends_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    breaks, after = Breaks(), Seen()
    run = fv.simulate("digits", callbacks=[breaks, after], **TWO)
    said = capsys.readouterr().err.splitlines()
    assert (run.status, len(after.told), len(breaks.told)) == ("completed", 4, 2)
    where = f"test_callbacks.py:{line_of('raise Value')}"
    assert said == [f"warning: callback Breaks: ValueError: round 1 ({where}); the run goes on"]


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_slow_callbacks_come_after_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fv.simulate("digits", folder=tmp_path, callbacks=[Stops()], **TWO)
    seen = Seen()
    resumed = fv.simulate(resume=tmp_path, quiet=True, callbacks=[seen])
    assert resumed.status == "completed" and [row["round"] for row in rows_of(tmp_path)] == [1, 2]
    assert [row["round"] for row in seen.told[0].rows] == [1] and seen.told[1].round == 2


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        (Seen, "must be an object with the functions start, round and end"),
        (object(), "must be an object with the functions start, round and end"),
        ("tensorbord", "must hold csv, mlflow, tensorboard, wandb, or classes as 'module:Class'"),
        ("watchers:Seen", "add allow_modules=[watchers]"),
    ],
)
def test_invalid_callback_is_refused_before_anything_is_written(
    callback: Any, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(fv.Refusal, match="callbacks") as refused:
        fv.simulate("digits", folder=tmp_path / "run", callbacks=[callback], **TWO)
    assert sentence in str(refused.value) and not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(fv.Refusal, match=r"callbacks=\[wandb\] needs wandb: pip install 'fedveil\[wandb\]'"):
        fv.simulate("digits", callbacks=["wandb"], **TWO)


def test_a_class_of_ones_own_is_named_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "watchers.py").write_text(
        "class Says:\n"
        "    def start(self, run): self.path = run.folder / 'said.txt'\n"
        "    def round(self, done): pass\n"
        "    def end(self, ending): self.path.write_text(ending.status)\n"
        "class Nothing:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    common = ["simulate", "task=digits", "num_rounds=1", "allow_modules=[watchers]", "--json"]
    run = f"hydra.run.dir={tmp_path / 'run'}"
    assert command([*common, "callbacks=[watchers:Says]", run]) == 0
    assert (tmp_path / "run" / "said.txt").read_text() == "completed"
    assert command([*common, "callbacks=[watchers:Nothing]", f"{run}2"]) == 2
    assert not (tmp_path / "run2" / "config.yaml").exists()


SECRET = """
import numpy as np
from torch import nn

class Shops:
    simulated, num_clients = True, 20
    def __init__(self, password, width=3): assert (password, width) == ("hidden-word", 4)
    def model(self): return nn.Linear(4, 2)
    def loss(self, outputs, targets): return nn.functional.cross_entropy(outputs, targets)
    def metrics(self, outputs, targets): return {"size": float(len(outputs))}
    def client_data(self, client): return np.ones((9, 4), np.float32), np.arange(9) % 2
    def held_out(self): return self.client_data(0)

class Says:
    def start(self, run): (run.folder / "said.txt").write_text(str(run.config))
    def round(self, done): pass
    def end(self, ending): pass
"""


def test_a_secret_of_the_environment_is_in_no_file_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shops.py").write_text(SECRET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PASSWORD", "hidden-word")
    monkeypatch.setenv("WIDTH", "4")
    run = tmp_path / "run"
    own = ["task=custom", "task.target=shops:Shops", "task.args.password=${oc.env:PASSWORD}"]
    own += [
        "task.args.width='${oc.decode:${oc.env:WIDTH}}'",
        "allow_modules=[shops]",
        "callbacks=[shops:Says]",
    ]
    few = ["num_rounds=1", "privacy=record_distributed", "privacy.target_delta=1e-3", f"hydra.run.dir={run}"]
    assert command(["simulate", *own, *few, "--quiet"]) == 0
    assert command(["report", str(run)]) == 0
    assert [
        path.name for path in run.rglob("*") if path.is_file() and b"hidden-word" in path.read_bytes()
    ] == []
    told = {each["key"]: each["value"] for each in json.loads((run / "report.json").read_text())["config"]}
    assert told["task.args.password"] == "${oc.env:PASSWORD}" and told["learning_rate"] == "0.25"
    np.save(tmp_path / "asked.npy", np.ones((2, 4), np.float32))
    predict = ["predict", str(run), str(tmp_path / "asked.npy"), "--allow-module", "shops"]
    assert command(predict) == 0  # the task is made with the words themselves
    monkeypatch.delenv("PASSWORD")
    assert command(predict) == 2


# --- trackers -----------------------------------------------------------------------------------------------------


def test_csv_has_a_row_for_each_round_also_of_a_run_that_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fv.simulate("digits", folder=tmp_path, callbacks=["csv", Stops()], **TWO)
    fv.simulate(resume=tmp_path, quiet=True)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = rows_of(tmp_path)
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


@pytest.mark.parametrize(
    ("last", "mean", "early"), [(1.0, 1.2, True), (1.0, 1.05, False), (1.0, 0.7, False), (None, 1.0, False)]
)
def test_mean_of_unconverged_models_is_reported_as_worse(
    last: float | None, mean: float, early: bool
) -> None:
    said = early_of({"loss": last}, {"loss": mean}, 7)
    assert (said is not None) is early
    assert early_of({"loss": last}, {}, 1) is None
    assert not early or "the last 7 models" in str(said)
