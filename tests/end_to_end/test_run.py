"""`fedveil simulate` from the command line to the run folder, on simulated and on real data."""

import json
import math
import os
import pty
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.numpy import load_file
from shared.runs import json_lines, reservations, run_quietly

import fedveil.run.run  # noqa: F401 (before any fork, so that children need not import it)
from fedveil.base.refusal import Refusal
from fedveil.cli.plan import show_plan
from fedveil.cli.simulate import plan as plan_of
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.run import progress
from fedveil.run.run import RunResult

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

ROUNDS = 3
COMMON = ("task=digits", "task.num_clients=10", f"num_rounds={ROUNDS}", "cohort.rate=0.5", "batch_size=100")
PRIVATE = ("privacy.noise_multiplier=1", "privacy.target_epsilon=null")

RESULT_KEYS = {
    "status",
    "blamed",
    "reason",
    "rounds_completed",
    "rounds_abandoned",
    "rounds_untrue",
    "suspected",
    "models_averaged",
    "task",
    "population",
    "cohort",
    "strategy",
    "partition",
    "data",
    "rng",
    "privacy",
    "metrics",
    "dropped",
    "seed",
    "noise_multiplier",
    "ledger",
    "ledger_head",
    "secagg",
    "rosters",
    "records",
    "audit",
    "folder",
    "versions",
    "seconds",
    "cpu_seconds",
    "joules",
    "bytes",
    "message_bytes",
    "budget_runs",
    "evaluations",
    "tuning",
    "confusion",
    "early",
    "learning_rate",
    "record_by_sums",
    "rise",
}
PRIVACY_KEYS = {
    "groups",
    "unit",
    "adversary",
    "adjacency",
    "epsilon",
    "delta",
    "target_epsilon",
    "accountant",
    "sampling",
    "curve",
}


def given(*overrides: str) -> list[str]:
    """Return the overrides of a small run with these ones; another cohort takes the rate away."""
    others = any(each.startswith("cohort=") for each in overrides)
    return [*(each for each in COMMON if not (others and each.startswith("cohort"))), *overrides]


def run(folder: Path, *overrides: str) -> RunResult:
    return run_quietly(given(*overrides), folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json_lines(folder / "metrics.jsonl")


def told_of(folder: Path) -> list[dict[str, Any]]:
    """Return what a trusted server's operator reads of each round."""
    lines = json_lines(folder / "operator.jsonl")
    return [line for line in lines if "round" in line]


def reserved(ledger: Path | str) -> list[dict[str, Any]]:
    return reservations(ledger)


# --- the command ---------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_leaves_a_run_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedveil", "simulate", "--json", *COMMON, "hydra.run.dir=out"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    shown = json.loads(ended.stdout.splitlines()[-1])
    out = tmp_path / "out"
    written = json.loads((out / "result.json").read_text())
    assert shown == written
    assert set(written) == RESULT_KEYS
    assert written["status"] == "completed"
    assert written["rounds_completed"] == ROUNDS
    assert (written["data"], written["rng"], written["seed"]) == ("simulation", "seeded", 0)
    assert written["metrics"]["accuracy"] >= 0
    assert {key for key, value in written.items() if value is None} >= {
        "seconds",
        "cpu_seconds",
        "dropped",
        "records",
    }
    assert [row["round"] for row in told_of(out)] == [1, 2, 3] and (
        out / "operator.jsonl"
    ).stat().st_mode & 0o077 == 0
    assert {"python", "fedveil", "flwr", "torch", "opacus", "dp-accounting"} <= set(written["versions"])
    assert [set(row) for row in written["privacy"]] == [PRIVACY_KEYS] * 3
    epsilons = {row["adversary"]: row["epsilon"] for row in written["privacy"]}
    assert epsilons["server"] == "infinity"
    assert 2.9 < epsilons["model"] == epsilons["clients"] <= 3
    server, _, model = (row["curve"] for row in written["privacy"])
    assert server is None and dict(model["epsilon"])[1e-4] == pytest.approx(epsilons["model"])
    files = {path.name for path in out.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "model.safetensors",
        "ledger",
        "curve.svg",
        "result.json",
    } <= files
    assert not any(name.startswith(".") or name.endswith("-wal") for name in files)
    assert [row["round"] for row in rows_of(out)] == [1, 2, 3]
    assert rows_of(out)[-1]["epsilon_client"] == pytest.approx(epsilons["model"], rel=0.01)
    assert OmegaConf.load(out / "config.yaml").task.num_clients == 10
    assert {name: array.shape for name, array in load_file(out / "model.safetensors").items()} == {
        "weight": (10, 64),
        "bias": (10,),
    }
    assert (out / "curve.svg").read_bytes().startswith(b"<svg ")
    proof = verify(out / "ledger")
    assert proof.ok and proof.epsilon == pytest.approx(epsilons["model"])


def test_plain_lines_where_there_is_no_terminal(commands: Any) -> None:
    code, command = commands.run("simulate", *COMMON, *PRIVATE, "hydra.run.dir=out", "accept_vacuous=true")
    lines = command.out.splitlines()
    assert (code, command.err) == (0, "")
    assert lines[0] == "digits (simulation): 10 clients, fedavg, privacy=client_central"
    assert [line.split()[1] for line in lines[1:-1] if line.startswith("round ")] == ["1/3", "2/3", "3/3"]
    assert "accuracy" in lines[1] and "client epsilon" in lines[1]
    assert lines[-1] == f"completed: 3 rounds; results: {commands.folder}/out"
    assert "\x1b" not in command.out


def test_a_live_table_in_a_terminal(commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        for number in (1, 2):
            os.dup2(theirs, number)

    command = commands.start(
        "simulate",
        *COMMON,
        "privacy.target_epsilon=2",
        "hydra.run.dir=out",
        first=take_terminal,
    )
    os.close(theirs)
    seen = read_to_the_end(ours)
    assert command.wait() == 0
    assert "\x1b[" in seen
    assert "━" in seen
    for words in ("accuracy", "epsilon (client)", "of 2 spent", "left", "3/3", "completed: 3 rounds"):
        assert words in seen, words


def read_to_the_end(terminal: int) -> str:
    parts: list[bytes] = []
    try:
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(terminal)
    return b"".join(parts).decode(errors="replace")


# --- how it ends ---------------------------------------------------------------------------------------------------


def test_a_spent_budget_ends_the_run_in_order(commands: Any) -> None:
    budget = ("privacy.noise_multiplier=1", "privacy.target_epsilon=8")
    argv = ("simulate", "--json", *COMMON, "num_rounds=50", *budget, "hydra.run.dir=out")
    code, command = commands.run(*argv)
    assert code == 3
    result = json.loads(command.out.splitlines()[-1])
    done = result["rounds_completed"]
    assert result["status"] == "exhausted"
    assert 0 < done < 50
    assert result["reason"].startswith("the client budget is spent")
    out = commands.folder / "out"
    assert (out / "model.safetensors").exists()
    assert len(rows_of(out)) == len(reserved(out / "ledger")) == done
    assert result["privacy"][2]["epsilon"] <= 8
    # What was spent stays spent.
    code, command = commands.run("simulate", "--json", f"resume={out}")
    assert code == 3
    assert json.loads(command.out.splitlines()[-1])["rounds_completed"] == done


def test_a_refusal_is_one_sentence_and_leaves_nothing(commands: Any) -> None:
    code, command = commands.run("simulate", *COMMON, "privacy.target_epsilon=-1", "hydra.run.dir=out")
    assert code == 2
    assert command.out == ""
    (sentence,) = command.err.splitlines()
    assert sentence.startswith("privacy.target_epsilon=-1")
    assert not (commands.folder / "out").exists()


@pytest.mark.parametrize("privacy", ["client_central", "record"])
def test_budget_for_less_than_one_round_is_refused_before_training(commands: Any, privacy: str) -> None:
    small = (f"privacy={privacy}", "privacy.noise_multiplier=0.5", "privacy.target_epsilon=0.1")
    code, command = commands.run("simulate", *COMMON, *small, "hydra.run.dir=out")
    assert code == 2
    (sentence,) = command.err.splitlines()
    assert sentence.startswith("noise_multiplier=0.5: not even one round fits")
    assert not (commands.folder / "out" / "config.yaml").exists()


def test_a_run_that_nobody_answers_fails(commands: Any) -> None:
    argv = given("privacy=none", "cohort=all", "faults.failure=1", "hydra.run.dir=out")
    code, command = commands.run("simulate", *argv)
    assert code == 1
    assert command.err.splitlines() == [
        f"failed: no client ever replied (failed); results: {commands.folder}/out"
    ]


def test_ctrl_c_before_the_first_round(commands: Any) -> None:
    def interrupt() -> None:
        from fedveil.run import opening

        # A suite that a shell runs in the background has inherited that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def stop(*args: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        opening.write_start = stop

    code, command = commands.run("simulate", *COMMON, *PRIVATE, "hydra.run.dir=out", first=interrupt)
    assert code == 130
    assert "Traceback" not in command.err


# --- every option once ---------------------------------------------------------------------------------------------

RECORD = ("privacy=record", "privacy.noise_multiplier=1", "privacy.target_epsilon=null")
BOTH = (
    "privacy=record_and_client",
    "privacy.client.noise_multiplier=1",
    "privacy.client.target_epsilon=null",
    "privacy.record.noise_multiplier=1",
    "privacy.record.target_epsilon=null",
)


@pytest.mark.parametrize(
    ("overrides", "finite"),
    [
        (PRIVATE, {("client", "clients"), ("client", "model")}),
        (RECORD, {("record", "server"), ("record", "clients"), ("record", "model")}),
        (
            BOTH,
            {
                ("client", "clients"),
                ("client", "model"),
                ("record", "server"),
                ("record", "clients"),
                ("record", "model"),
            },
        ),
        (("privacy=none",), set()),
    ],
    ids=["client_central", "record", "record_and_client", "none"],
)
def test_every_privacy_names_its_adversaries(
    tmp_path: Path, overrides: tuple[str, ...], finite: set[tuple[str, str]]
) -> None:
    result = run(tmp_path, *overrides).result
    assert result["status"] == "completed"
    rows = result["privacy"]
    assert {(r["unit"], r["adversary"]) for r in rows if r["epsilon"] != "infinity"} == finite
    assert all(0 < r["epsilon"] < 100 for r in rows if r["epsilon"] != "infinity")
    for row in rows:
        assert (row["curve"] is None) == (row["epsilon"] == "infinity")
        if row["curve"] is not None:
            assert dict(row["curve"]["epsilon"])[row["delta"]] == pytest.approx(row["epsilon"], rel=0.002)
    lines = rows_of(tmp_path)
    units = {unit for unit, _ in finite}
    assert (lines[-1]["epsilon_record"] is not None) == ("record" in units)
    assert (lines[-1]["epsilon_client"] == "infinity") == (not units)
    if "record" in units:
        (record,) = {r["epsilon"] for r in rows if (r["unit"], r["adversary"]) == ("record", "server")}
        assert lines[-1]["epsilon_record"] == pytest.approx(record, rel=0.01)


def test_client_refused_by_its_ledger_shows_no_more_than_the_target(tmp_path: Path) -> None:
    target = ("privacy=record", "privacy.noise_multiplier=1", "privacy.target_epsilon=8", "cohort=all")
    result = run(tmp_path, *target, "num_rounds=6").result
    shown = [row["epsilon_record"] for row in rows_of(tmp_path)]
    assert result["dropped"]["budget spent"] > 0
    assert max(shown) <= 8
    assert shown[-1] == pytest.approx(result["privacy"][0]["epsilon"], rel=0.01)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox"])
def test_every_strategy_trains(tmp_path: Path, strategy: str) -> None:
    outcome = run(tmp_path, f"strategy={strategy}", "privacy=none", "cohort=all", "num_rounds=5")
    assert outcome.exit_code == 0
    losses = [row["loss"] for row in rows_of(tmp_path)]
    assert min(losses) < 2.3
    assert all(np.isfinite(array).all() for array in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.parametrize("cohort", ["cohort=poisson", "cohort=fixed", "cohort=all"])
def test_every_cohort_draws_as_the_ledger_says(tmp_path: Path, cohort: str) -> None:
    more = ("cohort.size=4",) if cohort == "cohort=fixed" else ()
    result = run(tmp_path, *PRIVATE, cohort, *more, "num_rounds=6").result
    invited = [row["invited"] for row in told_of(tmp_path)]
    assert {row["invited"] for row in rows_of(tmp_path)} == {
        {"all": 10, "fixed": 4, "poisson": 2.5}[cohort.partition("=")[2]]
    }
    kinds = {
        json.dumps(payload["events"]["model"]).count("Poisson") for payload in reserved(tmp_path / "ledger")
    }
    assert {row["sampling"] for row in result["privacy"][1:]} == {cohort.partition("=")[2]}
    if cohort == "cohort=poisson":
        assert len(set(invited)) > 1 and kinds == {1}
    else:
        assert set(invited) == {4 if cohort == "cohort=fixed" else 10} and kinds == {0}


@pytest.mark.parametrize(
    "overrides",
    [
        ("partition=iid",),
        ("partition=dirichlet", "partition.alpha=0.5"),
        ("partition=shards",),
        ("task=heart", "partition=natural", "cohort=all", "batch_size=100"),
    ],
)
def test_every_partition_trains(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    if "task=heart" in overrides:
        chosen = [f"num_rounds={ROUNDS}", "privacy=none", *overrides]
    else:
        chosen = given("privacy=none", *overrides)
    outcome = run_quietly(chosen, tmp_path)
    assert outcome.exit_code == 0
    assert outcome.result["dropped"] == {}
    assert outcome.result["metrics"]["accuracy"] > 0.1


def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path: Path) -> None:
    models = [
        run(tmp_path / name, *PRIVATE, f"seed={seed}")
        and (tmp_path / name / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert models[0] == models[1] != models[2]


def test_an_empty_cohort_is_charged_and_releases_noise(tmp_path: Path) -> None:
    outcome = run(tmp_path, *PRIVATE, "cohort.rate=1e-6")
    assert outcome.exit_code == 0
    assert [row["invited"] for row in told_of(tmp_path)] == [0] * ROUNDS
    assert len(reserved(tmp_path / "ledger")) == ROUNDS
    assert np.abs(load_file(tmp_path / "model.safetensors")["weight"]).max() > 0


def test_diverging_model_leaves_readable_json(tmp_path: Path) -> None:
    run(tmp_path, "privacy=none", "cohort=all", "learning_rate=1e30", "local_epochs=3")
    for text in [
        (tmp_path / "result.json").read_text(),
        *(tmp_path / "metrics.jsonl").read_text().splitlines(),
    ]:
        json.loads(text, parse_constant=pytest.fail)


# --- real data -----------------------------------------------------------------------------------------------------

HOSPITALS = '''
"""A task on real data, as a user writes it."""

import torch
from fedveil.tasks import Examples
from torch import nn

CLIENTS, EACH, FEATURES = 40, 12, 4


class Hospitals:
    simulated = False

    def __init__(self):
        generator = torch.Generator().manual_seed(11)
        self.inputs = torch.randn(CLIENTS, EACH, FEATURES, generator=generator)
        self.targets = (self.inputs.sum(-1) > 0).long()

    @property
    def num_clients(self):
        return CLIENTS

    def model(self):
        layer = nn.Linear(FEATURES, 2)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": (outputs.argmax(-1) == targets).float().mean().item()}

    def client_data(self, client):
        return Examples(self.inputs[client], self.targets[client])

    def held_out(self):
        return Examples(self.inputs.flatten(0, 1), self.targets.flatten())
'''


@pytest.fixture
def hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a small run on real data whose ledgers lie in tmp_path/ledgers."""
    (tmp_path / "my_hospitals.py").write_text(HOSPITALS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_hospitals", raising=False)
    return [
        "task=custom",
        "task.target=my_hospitals:Hospitals",
        "allow_modules=[my_hospitals]",
        "task.data_id=hospitals",
        f"ledger.dir={tmp_path / 'ledgers'}",
        f"num_rounds={ROUNDS}",
        "cohort.rate=0.5",
        "privacy.target_delta=1e-3",
    ]


def really(folder: Path, overrides: list[str]) -> RunResult:
    return run_quietly(overrides, folder)


def test_noise_on_real_data_takes_no_seed(tmp_path: Path, hospitals: list[str]) -> None:
    with pytest.raises(Refusal, match="seed=1: on real data"):
        really(tmp_path / "run", [*hospitals, "seed=1"])
    assert not (tmp_path / "ledgers").exists() and not (tmp_path / "run").exists()


def test_second_real_run_plans_on_the_rest_and_a_third_is_refused(
    tmp_path: Path, hospitals: list[str]
) -> None:
    first = really(tmp_path / "1", [*hospitals, "privacy.target_epsilon=2"]).result
    assert (first["data"], first["rng"], first["seed"]) == ("real", "system", None)
    assert first["status"] == "completed"
    assert first["ledger"].startswith(str(tmp_path / "ledgers" / "population-"))
    with pytest.raises(Refusal, match="target_epsilon"):
        really(tmp_path / "spent", [*hospitals, "privacy.target_epsilon=2"])
    assert not (tmp_path / "spent").exists()
    second = really(tmp_path / "2", [*hospitals, "privacy.target_epsilon=3"]).result
    assert second["status"] == "completed"
    assert second["ledger"] == first["ledger"]
    assert second["noise_multiplier"] != first["noise_multiplier"]
    assert first["privacy"][2]["epsilon"] <= 2 < second["privacy"][2]["epsilon"] <= 3
    assert rows_of(tmp_path / "2")[0]["epsilon_client"] > first["privacy"][2]["epsilon"]
    assert [payload["rng"] for payload in reserved(first["ledger"])] == ["system"] * 2 * ROUNDS
    assert verify(first["ledger"]).ok


@pytest.mark.parametrize(
    ("declared", "attribute", "shown"),
    [
        ([], None, False),
        (["task.held_out=public"], None, True),
        ([], True, True),
        (["task.held_out=private"], True, False),
    ],
)
def test_real_data_allow_only_public_held_out_data(
    tmp_path: Path,
    hospitals: list[str],
    capsys: pytest.CaptureFixture[str],
    declared: list[str],
    attribute: bool | None,
    shown: bool,
) -> None:
    import my_hospitals

    if attribute is not None:
        my_hospitals.Hospitals.held_out_public = attribute
    result = really(tmp_path / "run", [*hospitals, *declared]).result
    assert result["status"] == "completed"
    everything = json.dumps(result["metrics"]) + (tmp_path / "run" / "metrics.jsonl").read_text()
    assert ('"accuracy"' in everything) == ('"loss"' in everything) == shown
    assert ("task.held_out: the held-out data count as private" in capsys.readouterr().err) != shown


def test_real_data_need_no_held_out_data(
    tmp_path: Path, hospitals: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import my_hospitals

    from fedveil.tasks import Examples

    every = my_hospitals.Hospitals.held_out
    my_hospitals.Hospitals.held_out = lambda task: Examples(every(task).inputs[:0], every(task).targets[:0])
    result = really(tmp_path / "run", hospitals).result
    assert result["status"] == "completed" and "accuracy" not in result["metrics"]
    assert "no public data are held out" in capsys.readouterr().err


def test_metrics_of_ones_own_are_tried_before_a_round_is_spent(tmp_path: Path, hospitals: list[str]) -> None:
    import my_hospitals

    task: Any = my_hospitals.Hospitals
    task.metrics = lambda self, outputs, targets: {"accuracy": (targets >= 0).float().mean()}
    result = really(tmp_path / "run", [*hospitals, "task.held_out=public"]).result
    assert result["metrics"]["accuracy"] == 1.0  # a tensor is a number
    task.metrics = lambda self, outputs, targets: {"accuracy": 1 / 0}
    with pytest.raises(Refusal, match=r"task.metrics='ZeroDivisionError: .* fails on"):
        really(tmp_path / "other", [*hospitals, "task.held_out=public"])
    assert not (tmp_path / "other").exists()


def test_a_simulation_may_call_its_held_out_data_private(tmp_path: Path) -> None:
    private = run(tmp_path / "1", "task.held_out=private").result["metrics"]
    assert "accuracy" not in private and "accuracy" in run(tmp_path / "2").result["metrics"]


def test_two_runs_on_real_data_share_no_noise(tmp_path: Path, hospitals: list[str]) -> None:
    own = [*hospitals, "privacy.noise_multiplier=1", "privacy.target_epsilon=null", "cohort=all"]
    own.remove("cohort.rate=0.5")
    models = []
    for name in ("1", "2"):
        really(tmp_path / name, own)
        models.append(load_file(tmp_path / name / "model.safetensors")["weight"])
    assert not np.array_equal(*models)


def test_resumed_real_run_is_charged_anew_and_repeats_no_noise(commands: Any, hospitals: list[str]) -> None:
    from fedveil.server.accounts import Protected

    run_folder = commands.folder / "run"

    def kill_after_the_noise_of_round_2() -> None:
        true = Protected.noised

        def deadly(self: Any, total: Any, number: int, spec: Any) -> Any:
            before = total.copy()
            noised = true(self, total, number, spec)
            if number == 2:
                np.save(commands.folder / "released.npy", noised - before)
                os.kill(os.getpid(), signal.SIGKILL)
            return noised

        Protected.noised = deadly  # type: ignore[method-assign]

    argv = ("simulate", *hospitals, "privacy.target_epsilon=2", f"hydra.run.dir={run_folder}")
    code, command = commands.run(*argv, first=kill_after_the_noise_of_round_2)
    assert code == -signal.SIGKILL, command.err
    (ledger,) = (commands.folder / "ledgers").glob("population-*.ledger")
    assert len(reserved(ledger)) == 2

    noises: list[Any] = []
    true = Protected.noised

    def watching(self: Any, total: Any, number: int, spec: Any) -> Any:
        before = total.copy()
        noised = true(self, total, number, spec)
        noises.append(noised - before)
        return noised

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Protected, "noised", watching)
        result = really(run_folder, [f"resume={run_folder}"]).result
    assert result["status"] == "completed"
    assert len(reserved(ledger)) == 1 + 1 + 2, "round 2 is charged twice, since it left twice"
    assert len({entry.key for entry in read_entries(ledger) if entry.kind == "reserve"}) == 4
    released = np.load(commands.folder / "released.npy")
    assert len(noises) == 2 and not any(np.array_equal(noise, released) for noise in noises)
    assert result["privacy"][2]["epsilon"] <= 2


def test_a_ledger_with_adaptive_noise_goes_by_its_filter_for_good(
    tmp_path: Path, hospitals: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adaptive run that is cut short goes on with its clip; a later run that is fixed is under the filter too."""
    adaptive = [*hospitals, "privacy.clipping=adaptive", "privacy.noise_schedule=adaptive"]
    first = tmp_path / "1"
    with monkeypatch.context() as patch:
        patch.setattr("fedveil.server.rounds._ending", None)  # fails after its last round
        patch.setattr("fedveil.run.progress.save", _only_before(ROUNDS, progress.save))
        with pytest.raises(TypeError):
            really(first, adaptive)
    clips = [row["clipping_norm"] for row in rows_of(first)]
    assert really(first, [f"resume={first}"]).result["status"] == "completed"
    again = rows_of(first)
    assert [row["clipping_norm"] for row in again] == clips
    assert len({row["noise_multiplier"] for row in again}) > 1, "the rounds left were planned anew"
    result = json.loads((first / "result.json").read_text())
    order = reserved(result["ledger"])[0]["filter_order"]
    assert result["privacy"][2]["accountant"].startswith(f"RDP filter at order {order:g}, ")
    assert result["privacy"][2]["epsilon"] == 3.0, "a filter promises its budget"
    shown = result["privacy"][2]
    assert dict(shown["curve"]["epsilon"])[shown["delta"]] == pytest.approx(3.0)
    second = really(tmp_path / "2", [*hospitals, "privacy.target_epsilon=5"]).result
    assert second["privacy"][2]["accountant"] == result["privacy"][2]["accountant"]
    assert [entry.get("filter_order") for entry in reserved(second["ledger"])[-ROUNDS:]] == [None] * ROUNDS
    assert verify(second["ledger"]).filter_order == order and verify(second["ledger"]).ok


def _only_before(number: int, save: Any) -> Any:
    return lambda run, state, remembered: save(run, state, remembered) if state.round < number else None


ADAPTIVE = ("privacy.allow_large_delta=true", "privacy.clipping=adaptive")


def test_moving_clip_is_printed_and_its_accountant_is_pld(tmp_path: Path) -> None:
    result = run(tmp_path / "run", *ADAPTIVE).result
    rows = rows_of(tmp_path / "run")
    norms = [row["clipping_norm"] for row in rows]
    fractions = [row["train/unclipped"] for row in rows]
    assert (
        norms[1:]
        == [
            norm * math.exp(-0.2 * (fraction - 0.5)) for norm, fraction in zip(norms, fractions, strict=True)
        ][:-1]
    )
    assert result["privacy"][2]["accountant"].startswith("min(PLD")
    assert "clipping_norm" not in result["metrics"] and "accuracy" in result["metrics"]


def test_both_units_and_a_moving_clip(tmp_path: Path) -> None:
    both = ("privacy=record_and_client", "privacy.client.clipping=adaptive")
    large = ("privacy.client.allow_large_delta=true", "privacy.record.allow_large_delta=true")
    assert run(tmp_path / "run", *both, *large).exit_code == 0
    assert len({row["clipping_norm"] for row in rows_of(tmp_path / "run")}) == ROUNDS


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (("privacy.target_epsilon=null", "privacy.noise_multiplier=1"), "give one"),
        (("privacy.noise_multiplier=1",), "leave it null"),
        (("privacy.metrics_share=0",), "the clients' loss"),
        (("privacy.adjacency=replace-one",), "does not cover"),
    ],
)
def test_noise_that_cannot_be_chosen_adaptively_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], remedy: str
) -> None:
    with pytest.raises(Refusal, match=remedy):
        run(tmp_path / "run", ADAPTIVE[0], "privacy.noise_schedule=adaptive", *overrides)
    assert not (tmp_path / "run").exists()


def test_the_plan_says_how_it_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    for schedule, words in (("fixed", "noise with it: min(PLD"), ("adaptive", "RDP filter at order")):
        overrides = [*given(*ADAPTIVE), f"privacy.noise_schedule={schedule}"]
        assert show_plan(settings_from_overrides(overrides)) == 0
        assert words in capsys.readouterr().out


def test_a_plan_draws_and_lists_its_whole_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_from_overrides(given("privacy=client_central", "cohort=all"))
    assert show_plan(settings, as_json=True, plot=tmp_path / "curve.png") == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["curve"]["mu"] == pytest.approx(ROUNDS**0.5 / plan["noise_multiplier"], rel=1e-6)
    assert dict(plan["curve"]["epsilon"])[1e-4] == pytest.approx(plan["epsilon"][-1][1], rel=1e-4)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Refusal, match="cannot be written"):
        show_plan(settings, plot=tmp_path / "missing" / "curve.png")
    with pytest.raises(Refusal, match="gives no guarantee"):
        show_plan(settings_from_overrides(given("privacy=none")), plot=tmp_path / "curve.png")
    with pytest.raises(Refusal, match="one picture"):
        plan_of(["-m", "num_rounds=1,2"], plot=tmp_path / "curve.png")


def test_correlated_noise_on_real_data_resumes_without_repeated_rows(
    commands: Any, hospitals: list[str]
) -> None:
    from fedveil.server.accounts import Protected

    run_folder, key = commands.folder / "run", commands.folder / "run" / "noise.key"
    own = [each for each in hospitals if not each.startswith("cohort.")]
    own += ["cohort=min_separation", "cohort.size=10", "privacy.noise=correlated", "privacy.target_epsilon=2"]

    def kill_after_the_noise_of_round_2() -> None:
        true = Protected.noised

        def deadly(self: Any, total: Any, row: int, spec: Any) -> Any:
            noised = true(self, total, row, spec)
            if row == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return noised

        Protected.noised = deadly  # type: ignore[method-assign]

    argv = ("simulate", *own, f"hydra.run.dir={run_folder}")
    code, command = commands.run(*argv, first=kill_after_the_noise_of_round_2)
    assert code == -signal.SIGKILL, command.err
    assert key.stat().st_mode & 0o777 == 0o600
    kept = key.read_bytes()
    key.unlink()
    with pytest.raises(Refusal, match="cannot be continued without it"):
        really(run_folder, [f"resume={run_folder}"])
    key.write_bytes(kept)
    key.chmod(0o600)
    outcome = really(run_folder, [f"resume={run_folder}"])
    assert (outcome.exit_code, outcome.result["rounds_completed"]) == (0, ROUNDS - 1)
    assert "rounds that were lost when the run was stopped" in outcome.result["reason"]
    assert not key.exists()
    cohorts = [payload["cohort"] for payload in reserved(outcome.result["ledger"])]
    assert len(cohorts) == ROUNDS
    assert len({client for cohort in cohorts for client in cohort}) == 10 * ROUNDS
    (spent,) = [row for row in outcome.result["privacy"] if row["adversary"] == "model"]
    assert 1.9 < spent["epsilon"] <= 2
    assert spent["sampling"] == "no sampling assumption; at most 1 participations, separation 4"
    assert verify(outcome.result["ledger"]).ok


def test_draw_of_clients_counts_for_a_record_as_it_shows(tmp_path: Path) -> None:
    target = ("privacy=record", "privacy.noise_multiplier=1", "privacy.target_epsilon=null")
    poisson = run(tmp_path / "a", *target, "num_rounds=12", "cohort.rate=0.2", "engine.workers=1").result
    rows = {row["adversary"]: row for row in poisson["privacy"]}
    taken = poisson["records"]["epsilon"]
    assert max(taken) == rows["server"]["epsilon"] > rows["model"]["epsilon"] == rows["clients"]["epsilon"]
    assert "taken part" in rows["server"]["sampling"] and "for all to see" in rows["model"]["sampling"]
    # A secret draw, which this is not, would leave far less than the rounds that are to be expected.
    assert rows["model"]["epsilon"] > sorted(taken)[len(taken) // 2]
    everybody = run(tmp_path / "b", *target, "cohort=all", "num_rounds=1").result
    assert len({row["epsilon"] for row in everybody["privacy"]}) == 1


def test_records_of_real_data_are_charged_on_each_clients_ledger(
    tmp_path: Path, hospitals: list[str]
) -> None:
    own = [each for each in hospitals if not each.startswith(("privacy", "num_rounds", "cohort"))]
    own += ["privacy=record", "privacy.noise_multiplier=1", "cohort=all", "num_rounds=1", "batch_size=4"]
    first = really(tmp_path / "1", [*own, "privacy.target_epsilon=null"]).result
    spent = first["privacy"][0]["epsilon"]
    assert len(list((tmp_path / "ledgers").glob("*.ledger"))) == 40
    with pytest.raises(Refusal, match="not even one round fits the rest"):
        really(tmp_path / "2", [*own, f"privacy.target_epsilon={spent * 1.05}"])
    again = really(tmp_path / "3", [*own, f"privacy.target_epsilon={spent * 2}"]).result
    assert rows_of(tmp_path / "3")[0]["epsilon_record"] == pytest.approx(
        again["privacy"][0]["epsilon"], rel=0.01
    )
    assert again["privacy"][0]["epsilon"] > spent


def test_the_populations_ledger_is_no_clients_ledger(tmp_path: Path, hospitals: list[str]) -> None:
    own = [each for each in hospitals if not each.startswith(("privacy", "num_rounds"))]
    own += [*BOTH, "num_rounds=1", "batch_size=100", "privacy.client.target_delta=1e-3"]
    result = really(tmp_path / "run", [*own, "privacy.client.noise_multiplier=0.3"]).result
    by_unit = {row["unit"]: row["epsilon"] for row in result["privacy"] if row["adversary"] == "model"}
    assert by_unit["record"] < by_unit["client"]


def test_impossible_ledger_folder_is_refused_before_training(commands: Any, hospitals: list[str]) -> None:
    (commands.folder / "file").write_text("")
    for privacy in ("privacy=client_central", "privacy=record"):
        own = [each for each in hospitals if not each.startswith(("ledger.dir", "privacy"))] + [privacy]
        for folder, why in (
            (f"{commands.folder}/file/ledgers", "cannot be made"),
            ("ledgers", "give an absolute folder"),
        ):
            code, command = commands.run("simulate", *own, f"ledger.dir={folder}", "hydra.run.dir=out")
            assert code == 2
            *_, sentence = command.err.splitlines()
            assert sentence.startswith(f"ledger.dir='{folder}': {why}")
    assert not (commands.folder / "ledgers").exists() and not (commands.folder / "out").exists()


def test_a_ledger_that_was_edited_is_refused(tmp_path: Path, hospitals: list[str]) -> None:
    ledger = Path(really(tmp_path / "1", [*hospitals, "privacy.target_epsilon=2"]).result["ledger"])
    with closing(sqlite3.connect(ledger)) as database:
        database.executescript("DROP TRIGGER no_DELETE; DELETE FROM entries WHERE seq > 3;")
    with pytest.raises(Refusal, match="ledger"):
        really(tmp_path / "2", [*hospitals, "privacy.target_epsilon=3"])
