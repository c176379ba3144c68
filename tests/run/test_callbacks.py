"""Callbacks of a run: what they are told and can reach, what their errors do, and the trackers beside their libraries."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared.callbacks import Log, Stops
from shared.runs import json_lines

import fedveil as fv
from fedveil.__main__ import run as command
from fedveil.audit.line import AuditLine
from fedveil.base import extras
from fedveil.privacy.audit.alarms import Alarm
from fedveil.privacy.audit.run_audit import Measured
from fedveil.privacy.audit.summary import Raised

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

TWO = {"num_rounds": 2, "quiet": True}
PLAIN = (str, bytes, int, float, bool, type(None), type(Path()))
OF_RELEASES = (fv.RunStart, fv.RoundEnd, fv.RunEnd, AuditLine, Measured, Raised, Alarm)


class Breaks(Log):
    """Raises in every round."""

    def round(self, end: fv.RoundEnd) -> None:
        raise ValueError(f"round {end.round}")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json_lines(folder / "metrics.jsonl")


def test_callback_gets_start_rounds_and_end(tmp_path: Path) -> None:
    log = Log()
    run = fv.simulate("digits", folder=tmp_path / "run", callbacks=[log], **TWO)
    start, first, second, end = log.values
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


@pytest.mark.parametrize("privacy", ["client_central", "record", "none"])
def test_callback_reaches_nothing_beyond_released_values(privacy: str) -> None:
    log = Log()
    fv.simulate(
        "digits",
        privacy=privacy,
        callbacks=[log],
        audit="full" if privacy == "client_central" else "light",
        **TWO,
    )
    for value in log.values:
        assert {type(each) for each in reachable(value)} <= {*PLAIN, *OF_RELEASES}
        with pytest.raises((AttributeError, TypeError)):
            value.round = 9
    _, done, *_, end = log.values
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
    breaks, after = Breaks(), Log()
    run = fv.simulate("digits", callbacks=[breaks, after], **TWO)
    said = capsys.readouterr().err.splitlines()
    assert (run.status, len(after.values), len(breaks.values)) == ("completed", 4, 2)
    where = f"test_callbacks.py:{line_of('raise Value')}"
    assert said == [f"warning: callback Breaks: ValueError: round 1 ({where}); the run goes on"]


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_slow_callbacks_come_after_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fv.simulate("digits", folder=tmp_path, callbacks=[Stops()], **TWO)
    log = Log()
    resumed = fv.simulate(resume=tmp_path, quiet=True, callbacks=[log])
    assert resumed.status == "completed" and [row["round"] for row in rows_of(tmp_path)] == [1, 2]
    assert [row["round"] for row in log.values[0].rows] == [1] and log.values[1].round == 2


@pytest.mark.parametrize(
    ("callback", "sentence"),
    [
        (Log, "must be an object with the functions start, round and end"),
        (object(), "must be an object with the functions start, round and end"),
        ("tensorbord", "must hold csv, mlflow, tensorboard, wandb, or classes as 'module:Class'"),
        ("watchers:Log", "add allow_modules=[watchers]"),
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
