"""The Python face: what it returns, what it takes in the place of names, and what it leaves as it was."""

import errno
import gc
import io
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, Krum
from shared.tasks import Points
from torch import Tensor, nn

import fedveil as fv
from fedveil.__main__ import main
from fedveil.configs.settings import settings_from_overrides
from fedveil.face import FinishedRun
from fedveil.modes.mode import COUNT_BOUND_BATCHES, LOSS_BOUND
from fedveil.tasks import load_task
from fedveil.tasks.classification import softmax_regression

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


class Shops(Points):
    """30 shops with 20 customers each: a user's task, as an object."""

    num_clients = 30
    held_out_client = 10_000

    def model(self) -> nn.Module:
        return softmax_regression(self.width, 2)


class Normalised(Shops):
    """With running statistics of its inputs, which stay away from their start."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4), super().model())

    def client_data(self, client: int) -> fv.Examples:
        data = super().client_data(client)
        return fv.Examples(data.inputs / 10 + 3, data.targets)


@pytest.mark.parametrize("privacy", ["none", "client_central"])
def test_statistics_of_batch_normalisation_stay_statistics(privacy: str) -> None:
    """A momentum carries variances below zero, and so does noise."""
    run = fv.simulate(Normalised(), strategy="fedavgm", privacy=privacy, num_rounds=12, seed=0, quiet=True)
    assert all(row["loss"] is not None for row in run.history)
    assert float(run.model[0].running_var.min()) > 0
    if privacy == "none":
        torch.testing.assert_close(run.model[0].running_mean, torch.full((4,), 3.0), atol=0.3, rtol=0)


class Counting(Shops):
    """With an array of no dimension beside the weights, as a batch normalisation has one."""

    def model(self) -> nn.Module:
        net = super().model()
        net.register_buffer("seen", torch.tensor(7))
        return net


class Halved(FedAvg):
    """A strategy of one's own: it halves what FedAvg says, and counts."""

    calls = 0

    def aggregate_train(self, server_round: int, replies: Iterable):  # type: ignore[no-untyped-def]
        self.calls += 1
        return super().aggregate_train(server_round, replies)


class Interrupted(FedAdam):
    """FedAdam, and a Ctrl-C in round 2."""

    def aggregate_train(self, server_round: int, replies: Iterable):  # type: ignore[no-untyped-def]
        if server_round == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().aggregate_train(server_round, replies)


def quick(**keys: object) -> fv.FinishedRun:
    keys = {"num_rounds": 2, "quiet": True, **keys}
    return fv.simulate(keys.pop("task", Shops()), **keys)  # type: ignore[arg-type]


def weights(run: fv.FinishedRun) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


NO_NOISE = {"privacy": "none", "cohort": fv.All()}


# --- what comes back --------------------------------------------------------------------------------------------


def test_shipped_task_by_name_is_that_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fv.simulate("digits", num_rounds=2, seed=3, privacy="client_central", quiet=True)
    monkeypatch.chdir(tmp_path)
    argv = ["simulate", "task=digits", "num_rounds=2", "seed=3", "hydra.run.dir=there"]
    monkeypatch.setattr(sys, "argv", ["fedveil", *argv])
    assert main() == 0
    there = fv.load(tmp_path / "there")
    assert torch.equal(weights(run), weights(there)) and run.history == there.history
    assert run.status == "completed" and run.metrics["accuracy"] > 0.1
    assert [row["round"] for row in run.history] == [1, 2]
    assert run.history[-1]["epsilon_client"] == pytest.approx(run.epsilon, rel=0.01)
    assert {row["adversary"]: row["epsilon"] for row in run.privacy}["server"] == math.inf
    assert run.ledger == run.folder / "ledger" and run.ledger.exists()
    assert not run.model.training


def test_the_plot_is_the_picture_of_the_folder(tmp_path: Path) -> None:
    run = quick()
    picture = run.plot()
    picture.save(tmp_path / "again.svg")
    title = f": {run.status}</text>"
    drawn, shown = ((run.folder / "curve.svg").read_text(), (tmp_path / "again.svg").read_text())
    assert title in shown and drawn.partition("<g ")[2] == shown.partition("<g ")[2]
    (alone,) = re.findall(r"held-out \w+</text>", quick(**NO_NOISE).plot().svg)
    assert alone == "held-out accuracy</text>"


def test_noised_training_figures_are_marked_at_their_bounds() -> None:
    much = fv.ClientCentral(target_epsilon=None, noise_multiplier=1000.0)
    run = quick(privacy=much, num_rounds=6, cohort=fv.All(), batch_size=10, accept_vacuous=True)
    assert "train/train_loss" in run.result["metrics"] and "accuracy" in run.metrics
    assert not any(name.startswith("train/") for name in run.metrics)
    bounds = {"train/train_loss": (0.0, LOSS_BOUND), "train/num-examples": (0.0, COUNT_BOUND_BATCHES * 10.0)}
    cut = [name for row in run.history for name in row.get("at_bound", ())]
    assert cut == [name for row in run.history for name, ends in bounds.items() if row[name] in ends]
    assert cut  # noise is 75 times as wide as their range
    assert not any("at_bound" in row for row in quick(**NO_NOISE).history)


def test_epsilon_is_a_number_also_without_a_promise() -> None:
    run = quick(**NO_NOISE)
    assert run.epsilon == math.inf and run.history[0]["epsilon_client"] == math.inf and run.ledger is None


def test_both_units_are_printed_and_the_larger_is_the_runs() -> None:
    run = quick(privacy="record_and_client", num_rounds=1, cohort="all")
    by_unit = {row["unit"]: row["epsilon"] for row in run.privacy if row["adversary"] == "model"}
    assert set(by_unit) == {"client", "record"} and run.epsilon == max(by_unit.values())


def test_without_a_folder_results_live_as_long_as_the_object() -> None:
    run = quick()
    folder = run.folder
    run = fv.load(run.folder)
    gc.collect()
    assert (folder / "result.json").exists()
    del run
    gc.collect()
    assert not folder.exists()


# --- values in the place of names -------------------------------------------------------------------------------


def test_flowers_strategy_as_an_object_is_the_one_by_name() -> None:
    by_name, by_object = quick(strategy="fedavg", **NO_NOISE), quick(strategy=FedAvg(), **NO_NOISE)
    assert torch.equal(weights(by_name), weights(by_object))


def test_a_strategy_object_begins_every_run_afresh() -> None:
    strategy = FedAdam(eta=0.05)
    first, second = quick(strategy=strategy), quick(strategy=strategy)
    named = quick(strategy={"name": "fedadam", "eta": 0.05})
    assert torch.equal(weights(first), weights(second)) and torch.equal(weights(first), weights(named))
    own = Halved()
    assert quick(strategy=own).status == "completed" and own.calls == 0


def test_class_or_half_a_task_is_refused_by_its_kind() -> None:
    class Half:
        def client_data(self, client: int) -> None:
            pass

    for task, said in (
        (Half, r"'Half': is a class; give an object of it, as Half\(\)"),
        (Half(), "'Half': it lacks held_out, loss"),
        (nn.Linear(2, 2), "'Linear': it lacks client_data, held_out, loss, metrics, model"),
    ):
        with pytest.raises(fv.Refusal, match=f"task={said}"):
            fv.simulate(task)  # pyright: ignore[reportArgumentType]
    for key in ("cohort", "privacy"):
        with pytest.raises(fv.Refusal, match=f"{key}=<class .*Poisson.*: give a name, a number"):
            quick(**{key: fv.Poisson})


def test_strategy_of_single_clients_is_refused_with_its_reason() -> None:
    with pytest.raises(fv.Refusal, match=r"Krum.*single clients"):
        quick(strategy=Krum())


@pytest.mark.parametrize(
    "keys",
    [
        {"cohort": fv.Poisson(0.5)},
        {"cohort": fv.Fixed(10)},
        {"cohort": fv.MinSeparation(size=10, separation=3, max_participations=1)},
        {"cohort": fv.First(size=5, separation=2, max_participations=2), "speed": {"sigma": 1.0}},
        {"cohort": {"name": "poisson", "rate": np.float64(0.5), "over_selection": None}},
        {"privacy": {"name": "client_central", "target_epsilon": 2}, "local_epochs": np.int64(2)},
        {"engine": {"workers": 2}, "faults": {"dropout": 0.2}},
        {"task": {"name": "digits", "num_clients": 20}, "partition": {"name": "dirichlet", "alpha": 0.5}},
        {"engine": {"workers": 2}, "privacy": fv.Record(target_epsilon=5.0, adjacency=fv.Adjacency.ZERO_OUT)},
        {"privacy": fv.RecordAndClient(client=fv.ClientCentral(target_epsilon=2.0, target_delta=1e-3))},
    ],
    ids=str,
)
def test_every_way_to_say_it(keys: dict[str, object]) -> None:
    assert quick(**keys).status in ("completed", "exhausted")


def test_values_override_the_configuration_only_where_set(tmp_path: Path) -> None:
    quick(task="digits", privacy=fv.ClientCentral(target_epsilon=2.5), folder=tmp_path / "a")
    quick(
        task="digits", privacy=fv.ClientCentral(target_epsilon=2.5, clipping_norm=0.75), folder=tmp_path / "b"
    )
    shipped = settings_from_overrides(["task=digits"]).privacy
    for folder, norm in (("a", shipped.clipping_norm), ("b", 0.75)):
        rows = fv.load(tmp_path / folder).history
        assert [row["clipping_norm"] for row in rows] == [norm, norm]
        assert fv.load(tmp_path / folder).privacy[1]["target_epsilon"] == 2.5
    with pytest.raises(fv.Refusal, match=r"clipping_norm=-1"):
        fv.ClientCentral(clipping_norm=-1.0)


def test_all_mistakes_are_reported_at_once_before_writing(tmp_path: Path) -> None:
    with pytest.raises(fv.Refusal) as refused:
        quick(
            folder=tmp_path / "x",
            num_round=3,
            lr=0.1,
            strategy="krum",
            batch_size="8",
            privacy={"name": "client_central", "epsilon": 1},
        )
    what = "did you mean 'privacy.target_epsilon'", "did you mean 'learning_rate'", "must see single clients"
    for said in ("num_round", "did you mean 'num_rounds'", "batch_size='8'", *what):
        assert said in str(refused.value)
    assert not (tmp_path / "x").exists()
    with pytest.raises(fv.Refusal, match="batch_size=<object"):
        quick(batch_size=object())


def test_a_plan_trains_nothing() -> None:
    found = fv.plan(Shops(), privacy="record_and_client", cohort=fv.Poisson(0.5), num_rounds=10)
    assert [each.unit for each in found] == ["client", "record"]
    assert found[0].affordable_rounds >= 10 and found[0].epsilon[-1][0] == 10
    assert found[0].noise_multiplier > 0.5 and any("server is trusted" in said for said in found[0].warnings)
    assert fv.plan("digits", privacy="none") == []


# --- folders ----------------------------------------------------------------------------------------------------


def test_folder_with_a_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    quick(folder=tmp_path / "shops")
    with pytest.raises(fv.Refusal, match="a resumed run uses its own folder"):
        quick(folder=tmp_path / "other", resume=tmp_path / "shops")
    with pytest.raises(fv.Refusal, match=r"holds a run: fedveil.load\(folder\) reads it, resume="):
        quick(folder=tmp_path / "shops")
    with pytest.raises(fv.Refusal, match="holds no run"):
        fv.load(tmp_path)


def test_a_run_of_objects_goes_on_with_the_objects_and_not_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"task": Counting(), "num_rounds": 4}
    whole = quick(strategy=FedAdam(eta=0.05), folder=tmp_path / "whole", **both)
    stopped = quick(strategy=Interrupted(eta=0.05), folder=tmp_path / "half", **both)
    assert stopped.status == "interrupted" and len(stopped.history) == 2
    with pytest.raises(fv.Refusal, match=r"given an object; resume it by fedveil.simulate\(task="):
        fv.simulate(resume=tmp_path / "half", quiet=True)
    with pytest.raises(fv.Refusal, match=r"fedveil.simulate\(strategy="):
        fv.simulate(Counting(), resume=tmp_path / "half", quiet=True)
    monkeypatch.setattr(sys, "argv", ["fedveil", "simulate", f"resume={tmp_path / 'half'}"])
    assert main() == 2 and "resume it by fedveil" in capsys.readouterr().err
    again = fv.simulate(Counting(), strategy=FedAdam(eta=0.05), resume=tmp_path / "half", quiet=True)
    assert again.status == "completed" and torch.equal(weights(again), weights(whole))
    assert torch.equal(torch.tensor(7), again.model.state_dict()["seen"])


def test_the_model_of_an_own_class_needs_the_class(tmp_path: Path) -> None:
    run = quick(folder=tmp_path / "run")
    with pytest.raises(fv.Refusal, match="add --allow-module object"):
        _ = fv.load(tmp_path / "run").model
    again = fv.load(tmp_path / "run", task=Shops())
    assert torch.equal(weights(again), weights(run))
    with pytest.raises(fv.Refusal, match="is of another task"):
        _ = FinishedRun(run.folder, lambda: load_task("digits", {})).model
    assert len(again.predict(np.zeros((3, 4)))["class"]) == 3
    assert len(again.predict(np.eye(3, 4, dtype=np.float64))["class"]) == 3
    np.savez(tmp_path / "two.npz", np.zeros((3, 4)))
    for wrong, why in (
        (np.zeros(4), "must be a list of rows"),
        (
            np.zeros((3, 5)),
            r"shape \(3, 5\), float32.*does not suit the model: a row is shape \(4,\), float32",
        ),
        (np.zeros((3, 4), int), r"shape \(3, 4\), int64.*a row is shape \(4,\), float32"),
        (np.array([[0.0] * 4, [1e39] * 4]), "row 1 holds a number that is not finite in float32"),
        (tmp_path / "two.npz", "give an array of numbers"),
    ):
        with pytest.raises(fv.Refusal, match=why):
            again.predict(wrong)


@pytest.mark.parametrize("privacy", ["client_central", "record"])
def test_a_run_is_read_where_it_lies_now(
    privacy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "it's\\"  # Hydra's grammar doubles a backslash before a quote
    run = quick(privacy=privacy, num_rounds=1, folder=name)
    monkeypatch.chdir("/")
    assert run.ledger is not None and run.ledger.exists() and run.model is not None
    assert quick(resume=tmp_path / name, num_rounds=None).history == run.history
    (tmp_path / name).rename(tmp_path / "moved")
    ledger = fv.load(tmp_path / "moved").ledger
    assert ledger is not None and ledger.exists() and ledger.parent == tmp_path / "moved"


# --- the caller's process ---------------------------------------------------------------------------------------


def test_the_callers_process_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "get_freeze_count", vars(gc.get_freeze_count)["__wrapped__"])
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    torch.set_num_threads(2)
    os_state = os.getcwd(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(sys.path)
    gc.unfreeze()  # what tests before this one left
    level, frozen = logging.getLogger("flwr").level, gc.get_freeze_count()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    quick(engine={"workers": 2})
    quick(privacy="record")
    assert torch.get_num_threads() == 2
    assert (
        os.getcwd(),
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        sys.path,
    ) == os_state
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert logging.getLogger("flwr").level == level and gc.get_freeze_count() == frozen
    torch.set_num_threads(1)


def test_it_runs_in_any_thread() -> None:
    found: list[fv.FinishedRun] = []
    thread = threading.Thread(target=lambda: found.append(quick(privacy="record")))
    thread.start()
    thread.join()
    assert found[0].status == "completed" and all(row["replies"] for row in found[0].history)


def test_an_object_cannot_go_to_processes_that_import_by_name() -> None:
    with pytest.raises(fv.Refusal, match=r"engine='ray': its processes import a task by name"):
        quick(engine="ray")


class Gone(io.StringIO):
    """Output whose reader, such as `head`, has gone."""

    def flush(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_run_outlives_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        run = quick(quiet=False)
    assert run.status == "completed" and len(run.history) == 2


def test_progress_is_printed_and_can_be_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    quick()
    assert capsys.readouterr().out == ""
    quick(quiet=False)
    out = capsys.readouterr().out
    assert "Shops (simulation): 30 clients, fedavg" in out and "round 2/2" in out and "completed" in out


def test_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedveil.base.extras.find_spec", lambda name: None if name in ("flwr", "torch") else name
    )
    with pytest.raises(
        fv.Refusal, match=r"fedveil.simulate needs flwr, torch: pip install 'fedveil\[simulation\]'"
    ):
        fv.simulate("digits")
    monkeypatch.delitem(vars(fv), "protect", raising=False)
    with pytest.raises(fv.Refusal, match=r"fedveil.protect needs .*: pip install 'fedveil\[client\]'"):
        _ = fv.protect
    with pytest.raises(AttributeError):
        _ = fv.no_such_name  # type: ignore[attr-defined]


# --- notebooks --------------------------------------------------------------------------------------------------

CELLS = (
    "import fedveil as fv\nimport torch\nfrom torch import nn\nfrom flwr.serverapp.strategy import FedAvg",
    """class Shops:
    simulated, num_clients = True, 30
    def model(self):
        net = nn.Linear(4, 2)
        for p in net.parameters():
            nn.init.zeros_(p)
        return net
    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)
    def metrics(self, outputs, targets):
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}
    def client_data(self, client):
        inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(client))
        return fv.Examples(inputs, (inputs.sum(1) > 0).long())
    def held_out(self):
        return self.client_data(1000)""",
    """class Mine(FedAvg):
    def aggregate_train(self, server_round, replies):
        return super().aggregate_train(server_round, replies)""",
    "run = fv.simulate(Shops(), strategy=Mine(), num_rounds=2, engine={'workers': 2})",
    "run = fv.simulate(Shops(), strategy=Mine(), num_rounds=2, privacy='record', engine={'workers': 2})",
    "print(run.status, len(run.history), type(run.model).__name__, type(run.plot()).__name__)",
)
RUNNER = """
import json, sys
for cell in json.load(open(sys.argv[1]))["cells"]:
    exec(compile("".join(cell["source"]), "cell", "exec"), globals())
"""


def test_classes_of_a_notebook_work_in_forked_workers_too(tmp_path: Path) -> None:
    cells = [{"cell_type": "code", "source": [cell]} for cell in CELLS]
    (tmp_path / "shops.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    command = [sys.executable, "-c", RUNNER, "shops.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "completed 2 Linear Picture"
    assert "round 2/2" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["shops.ipynb"]


class Terminated:
    """A callback that is asked to end in its first round, as by a service manager."""

    def start(self, run: fv.RunStart) -> None:
        del run

    def round(self, done: fv.RoundEnd) -> None:
        if done.round == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self, ending: fv.RunEnd) -> None:
        del ending


@pytest.mark.parametrize("handled", [False, True])
def test_sigterm_ends_a_loop_of_runs_after_the_current_one(tmp_path: Path, handled: bool) -> None:
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGTERM, (lambda *_: os._exit(7)) if handled else signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for number in range(2):
                keys = {"num_rounds": 3, "quiet": True, "callbacks": [Terminated()], "engine": {"workers": 1}}
                fv.simulate(Shops(), folder=tmp_path / str(number), privacy="none", **keys)
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (7 if handled else -signal.SIGTERM)
    result = json.loads((tmp_path / "0" / "result.json").read_text())
    assert (result["status"], result["rounds_completed"]) == ("interrupted", 1)
    assert not (tmp_path / "1").exists()
