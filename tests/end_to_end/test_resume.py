"""Runs that are killed, interrupted or run out of disk go on from their checkpoint as if nothing had happened."""

import json
import os
import pickle
import runpy
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared.runs import json_lines, run_quietly

from fedveil.base.refusal import Refusal
from fedveil.privacy.ledger.ledger import Ledger, read_entries, verify
from fedveil.privacy.ledger.store import ledgers_in
from fedveil.run import progress
from fedveil.run import result as results
from fedveil.run import run as run_of_rounds
from fedveil.run import run as running
from fedveil.run.run import RunResult
from fedveil.server import checkpoint
from fedveil.server.accounts import Protected, Unprotected
from fedveil.server.checkpoint import DAMAGED, NAME, PREVIOUS, read

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

until = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "patience.py"))["until"]
ROUNDS = 4
COMMON = ("task=digits", "task.num_clients=20", f"num_rounds={ROUNDS}", "batch_size=40")
NOISY = ("privacy.noise_multiplier=1", "privacy.target_epsilon=null", "privacy.allow_large_delta=true")
SLOW = ("faults.straggler=1", "engine.deadline=50")  # a round that nobody waits for
MODES: dict[str, tuple[str, ...]] = {
    "fedavg": NOISY,
    "fedadam": (*NOISY, "strategy=fedadam"),
    "planned": ("privacy.allow_large_delta=true",),
    "record": (
        *("privacy=record", "privacy.noise_multiplier=1", "privacy.target_epsilon=null"),
        "task.num_clients=8",
    ),
    "differences": (*NOISY, "strategy=fedadam", "compress.down=4"),
    "no privacy": ("privacy=none", "strategy=fedavgm", "strategy.server_momentum=0.5"),
    "adaptive": (
        "privacy.allow_large_delta=true",
        "privacy.clipping=adaptive",
        "privacy.noise_schedule=adaptive",
    ),
    "workers": (*NOISY, "engine.workers=2"),
    "audited": (*NOISY, "audit=full", "audit.canaries=80", "audit.looks=4", "audit.on_alarm=note"),
    "averaged": ("privacy.allow_large_delta=true", "model=average"),
    # Two arms have a round each, and then all clients two.
    "tuned": (
        *NOISY,
        "num_rounds=3",
        "tune=learning_rate",
        "tune.values=[0.02,0.5]",
        "tune.rounds=1",
        "compress.down=4",
    ),
    "correlated": (*NOISY, "cohort=min_separation", "cohort.size=8", "privacy.noise=correlated"),
}


def started(mode: str) -> tuple[str, ...]:
    draw = () if mode == "correlated" else ("cohort.rate=0.4",)
    return (*COMMON, *draw, *MODES[mode])


def begin(folder: Path, mode: str = "fedavg", *more: str) -> RunResult:
    return run_quietly([*started(mode), *more], folder)


def resume(folder: Path) -> RunResult:
    return run_quietly([f"resume={folder}"], folder)


class Calm:
    """Runs that nothing happens to, one of each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self("fedavg")  # imports what the children then need not import

    def __call__(self, mode: str) -> tuple[bytes, str]:
        """Return the model and the lines of a run of this kind."""
        run = self.folder / mode.replace(" ", "-")
        if not run.exists():
            assert begin(run, mode).exit_code == 0
        return (run / "model.safetensors").read_bytes(), (run / "metrics.jsonl").read_text()


@pytest.fixture(scope="module", autouse=True)
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    return Calm(tmp_path_factory.mktemp("undisturbed"))


def reserved(ledger: Path) -> int:
    return sum(entry.kind == "reserve" for entry in read_entries(ledger))


def ledger_of(run: Path) -> Path:
    """Return the population's ledger, or one client's."""
    return run / "ledger" if (run / "ledger").exists() else ledgers_in(run / "client_ledgers")[0]


# --- killed ------------------------------------------------------------------------------------------------------


def dying(owner: Any, name: str, count: int, after: bool = False) -> Callable[[], None]:
    """Return what makes this process kill itself at the `count`-th call of `owner.name`, before or after it."""

    def arrange() -> None:
        calls, true = 0, getattr(owner, name)

        def deadly(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = true(*args, **options)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, deadly)

    return arrange


def each_of(*moments: Callable[[], None]) -> Callable[[], None]:
    """Return what arranges all of these, of which a run meets one."""

    def arrange() -> None:
        for moment in moments:
            moment()

    return arrange


# os.replace: 1 run.json, 2 config.yaml, 3 the first checkpoint, 4 to 9 two for each later one, 10 and 11 the last
# again, 12 the audit's terms, 13 the model, 14 the result. os.fsync: the ledger's folder, then two for each file that is replaced.
MOMENTS = {
    **{f"before rename {n}": dying(os, "replace", n) for n in range(3, 15)},
    **{f"before flush {n}": dying(os, "fsync", n) for n in (5, 6, 7, 8, 10, 12)},
    "before the first reservation": dying(Ledger, "reserve", 1),
    "before a reservation": dying(Ledger, "reserve", 3),
    "after a reservation": dying(Ledger, "reserve", 3, after=True),
    "in the middle of a round": dying(Protected, "noised", 2),
    "after the noise": each_of(*(dying(each, "noised", 2, after=True) for each in (Protected, Unprotected))),
    "before a commit": dying(Ledger, "commit", 2),
    "after a commit": dying(Ledger, "commit", 4, after=True),
}
EARLY = {
    *("before rename 3", "before rename 5", "before rename 8", "before flush 6", "before rename 12"),
    *("after a reservation", "in the middle of a round", "before a commit"),
}
FEW = ("before rename 7", "before rename 6", "after the noise")
QUICK = {*((FEW[0], mode) for mode in MODES), ("after the noise", "no privacy")}


def slow(name: str, quick: bool) -> Any:
    return pytest.param(name, marks=[] if quick else pytest.mark.campaign)


def kill_and_resume(commands: Any, calm: Calm, mode: str, moment: Callable[[], None]) -> None:
    run = commands.folder / "run"
    code, command = commands.run("simulate", *started(mode), f"hydra.run.dir={run}", first=moment)
    assert code == -signal.SIGKILL, command.err
    checkpoint = read(run)
    done = 0 if checkpoint is None else checkpoint.state.round
    if (run / "ledger").exists():
        assert reserved(run / "ledger") >= done
    assert resume(run).exit_code == 0
    model, lines = calm(mode)
    assert (run / "model.safetensors").read_bytes() == model
    assert (run / "metrics.jsonl").read_text() == lines
    for name in ("audit.npy", "audit.json"):
        assert (run / name).read_bytes() == (calm.folder / mode.replace(" ", "-") / name).read_bytes()
    if mode == "no privacy":
        return
    if (run / "ledger").exists():
        assert reserved(run / "ledger") == ROUNDS
    assert verify(ledger_of(run)).ok


@pytest.mark.parametrize("moment", [slow(name, name in EARLY) for name in MOMENTS])
def test_a_killed_run_goes_on_bit_for_bit(commands: Any, calm: Calm, moment: str) -> None:
    kill_and_resume(commands, calm, "fedavg", MOMENTS[moment])


@pytest.mark.parametrize(
    ("moment", "mode"),
    [
        pytest.param(name, mode, marks=[] if (name, mode) in QUICK else pytest.mark.campaign)
        for name in FEW
        for mode in MODES
        if mode != "fedavg"
    ],
)
def test_a_killed_run_of_every_kind_goes_on_bit_for_bit(
    commands: Any, calm: Calm, mode: str, moment: str
) -> None:
    kill_and_resume(commands, calm, mode, MOMENTS[moment])


def test_killed_again_and_again_it_still_arrives(commands: Any, calm: Calm) -> None:
    run = commands.folder / "run"
    argv = ["simulate", *started("fedavg"), f"hydra.run.dir={run}"]
    code = 1
    for _ in range(ROUNDS + 1):
        code, command = commands.run(*argv, first=dying(Protected, "noised", 2, after=True))
        if code == 0:
            break
        assert code == -signal.SIGKILL, command.err
        argv = ["simulate", f"resume={run}"]
    assert code == 0
    assert (run / "model.safetensors").read_bytes() == calm("fedavg")[0]
    assert reserved(run / "ledger") == ROUNDS


def test_killed_from_outside_between_two_lines(commands: Any, calm: Calm) -> None:
    run = commands.folder / "run"
    command = commands.start("simulate", *started("workers"), f"hydra.run.dir={run}")
    until(lambda: (run / "metrics.jsonl").exists() and "\n" in (run / "metrics.jsonl").read_text())
    command.signal(signal.SIGKILL)
    command.wait()
    code, command = commands.run("simulate", f"resume={run}")
    assert code == 0, command.err
    assert (run / "model.safetensors").read_bytes() == calm("workers")[0]


def test_half_a_line_of_metrics_is_cut(tmp_path: Path, calm: Calm) -> None:
    begin(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"round": "x"}\n{"round": 5, "accu')
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == calm("fedavg")[1]


# --- interrupted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_checkpoint_and_exits_130(commands: Any, calm: Calm, number: int) -> None:
    run = commands.folder / "run"

    def interrupt_in_round_2() -> None:
        true = Protected.noised

        def interrupting(self: Any, total: Any, number_of_round: int, spec: Any) -> Any:
            if number_of_round == 2:
                os.kill(os.getpid(), number)
            return true(self, total, number_of_round, spec)

        Protected.noised = interrupting  # type: ignore[method-assign]

    argv = ("simulate", "--json", *started("fedavg"), f"hydra.run.dir={run}")
    code, command = commands.run(*argv, first=interrupt_in_round_2)
    assert code == 130
    result = json.loads(command.out.splitlines()[-1])
    assert (result["status"], result["rounds_completed"]) == ("interrupted", 2)
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    assert "Traceback" not in command.err and "the run ends after this round; Ctrl-C again" in command.err
    code, command = commands.run("simulate", f"resume={run}")
    assert code == 0
    assert (run / "model.safetensors").read_bytes() == calm("fedavg")[0]


def test_a_second_ctrl_c_exits_at_once_and_leaves_a_valid_ledger(commands: Any) -> None:
    run = commands.folder / "run"
    command = commands.start("simulate", *started("fedavg"), *SLOW, f"hydra.run.dir={run}")
    until(lambda: (run / "ledger").exists() and readable(run / "ledger") == 1)
    command.signal(signal.SIGINT)
    until(lambda: "Ctrl-C again" in command.err)
    command.signal(signal.SIGINT)
    assert command.wait() == 130
    assert "Traceback" not in command.err
    found = verify(run / "ledger")
    assert found.ok, found.problem
    assert reserved(run / "ledger") == 1


def readable(ledger: Path) -> int:
    try:
        return reserved(ledger)
    except Refusal:  # being made
        return 0


# --- checkpoints that are not to be believed ---------------------------------------------------------------------


class Payload:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run of which two rounds are done, with its two checkpoints, and whose other rounds are not."""
    begin(tmp_path / "run")
    (tmp_path / "run" / NAME).unlink()
    os.replace(tmp_path / "run" / PREVIOUS, tmp_path / "run" / NAME)
    shutil.copy(tmp_path / "run" / NAME, tmp_path / "run" / PREVIOUS)
    return tmp_path / "run"


def spoil(path: Path, how: str) -> None:
    good = path.read_bytes()
    if how == "pickle":
        path.write_bytes(pickle.dumps(Payload(path.parent / "executed")))
    elif how == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "giant header":
        path.write_bytes(struct.pack("<Q", 2**60) + good[8:])
    else:
        rewrite(path, how)


def rewrite(path: Path, how: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    name = next(name for name in arrays if name.startswith("model/"))
    if how == "not finite":
        arrays[name].flat[0] = np.nan
    elif how == "other format":
        metadata["format"] = "pt"
    elif how == "no round":
        metadata["state"] = json.dumps({**json.loads(metadata["state"]), "round": "2"})
    elif how == "other shapes":
        arrays[name] = np.zeros((3, 3), np.float32)
    elif how == "other types":
        arrays[name] = arrays[name].astype(np.float64)
    save_file(arrays, path, metadata)


DAMAGES = ("pickle", "truncated", "empty", "giant header", "not finite", "other format", "no round")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(stopped: Path, calm: Calm, how: str) -> None:
    spoil(stopped / NAME, how)
    assert resume(stopped).exit_code == 0
    assert not (stopped / "executed").exists()
    assert (stopped / DAMAGED).exists()
    assert (stopped / "model.safetensors").read_bytes() == calm("fedavg")[0]


@pytest.mark.parametrize("how", DAMAGES)
def test_two_damaged_checkpoints_are_refused(stopped: Path, how: str) -> None:
    spoil(stopped / NAME, how)
    spoil(stopped / PREVIOUS, how)
    before = reserved(stopped / "ledger")
    with pytest.raises(Refusal, match="no checkpoint can be read"):
        resume(stopped)
    assert not (stopped / "executed").exists()
    assert reserved(stopped / "ledger") == before


@pytest.mark.parametrize("how", ["other shapes", "other types"])
def test_a_checkpoint_of_another_model_is_refused(stopped: Path, how: str) -> None:
    spoil(stopped / NAME, how)
    with pytest.raises(Refusal, match="another model"):
        resume(stopped)


def test_checkpoint_older_than_the_ledger_repeats_the_reservations(stopped: Path, calm: Calm) -> None:
    assert reserved(stopped / "ledger") == ROUNDS
    assert resume(stopped).exit_code == 0
    assert reserved(stopped / "ledger") == ROUNDS
    assert (stopped / "model.safetensors").read_bytes() == calm("fedavg")[0]


def test_a_checkpoint_newer_than_the_ledger_is_refused(tmp_path: Path) -> None:
    begin(tmp_path / "old", "fedavg", "num_rounds=1")
    begin(tmp_path / "run")
    shutil.copy(tmp_path / "old" / "ledger", tmp_path / "run" / "ledger")
    with pytest.raises(Refusal, match="does not hold the known entry"):
        resume(tmp_path / "run")


def test_a_missing_ledger_is_not_replaced_by_a_fresh_one(stopped: Path, commands: Any) -> None:
    (stopped / "ledger").unlink()
    code, command = commands.run("simulate", f"resume={stopped}")
    assert code == 2
    assert len(command.err.splitlines()) == 1
    assert "missing, though entry" in command.err
    assert not (stopped / "ledger").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"run": 1', '{"noise": 1}', '{"run": "x", "noise": "much"}', "[" * 100_000]
)
def test_a_damaged_run_file_is_refused(stopped: Path, text: str) -> None:
    (stopped / "run.json").write_text(text)
    with pytest.raises(Refusal, match="resume="):
        resume(stopped)


def test_damaged_result_is_refused_because_of_possible_alarms(stopped: Path) -> None:
    (stopped / "result.json").write_text('{"status": ')
    with pytest.raises(Refusal, match="restore it"):
        resume(stopped)


# --- disks and folders -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("fullest", ["nothing left", "a little left"])
def test_a_full_disk_stops_the_run_which_goes_on_once_there_is_room(
    commands: Any, small_disk: Path, calm: Calm, fullest: str
) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"

    def fill_in_round_3() -> None:
        true = Protected.noised

        def filling(self: Any, total: Any, number: int, spec: Any) -> Any:
            if number == 3:
                fill(ballast, 0 if fullest == "nothing left" else 6000)
            return true(self, total, number, spec)

        Protected.noised = filling  # type: ignore[method-assign]

    argv = ("simulate", *started("fedavg"), f"hydra.run.dir={run}")
    code, command = commands.run(*argv, first=fill_in_round_3)
    assert code == 1
    assert "Traceback" not in command.err
    *_, sentence = command.err.splitlines()
    assert "stopped after round" in sentence and "resume" in sentence
    ballast.unlink()
    code, command = commands.run("simulate", f"resume={run}")
    assert code == 0, command.err
    assert (run / "model.safetensors").read_bytes() == calm("fedavg")[0]
    assert verify(run / "ledger").ok


def fill(path: Path, leave: int) -> None:
    """Fill the disk up to `leave` bytes."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
        file.truncate(max(0, file.tell() - leave))


def test_impossible_folder_is_refused_before_training(commands: Any) -> None:
    (commands.folder / "file").write_text("")
    for folder in ("file/run", "/proc/fedveil"):
        code, command = commands.run("simulate", *started("fedavg"), f"hydra.run.dir={folder}")
        assert code == 2
        assert len(command.err.splitlines()) == 1 and "hydra.run.dir" in command.err


def test_a_folder_in_which_a_run_lives_is_refused(stopped: Path) -> None:
    with pytest.raises(Refusal, match="holds a run; choose"):
        begin(stopped)


@pytest.mark.parametrize(
    ("mode", "named"), [("fedavg", "ledger='{run}/ledger'"), ("record", "hydra.run.dir='{run}'")]
)
def test_two_processes_on_one_run_the_second_names_the_first(commands: Any, mode: str, named: str) -> None:
    run = commands.folder / "run"
    command = commands.start("simulate", *started(mode), *SLOW, f"hydra.run.dir={run}")
    until(lambda: (run / "config.yaml").exists())
    code, second = commands.run("simulate", f"resume={run}")
    command.signal(signal.SIGKILL)
    command.wait()
    assert code == 2
    assert second.err.splitlines() == [
        f"{named.format(run=run)}: in use by process {command.process}; wait for it to end, or stop it"
    ]


# --- in the last rounds of a budget ------------------------------------------------------------------------------

WARDS = """
import torch
from torch import nn

from fedveil import Examples


class Wards:
    simulated, data_id, held_out_public = False, "wards", True

    def __init__(self, num_clients):
        self.num_clients = num_clients

    def model(self):
        return nn.Linear(4, 2)

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client):
        inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(client))
        return Examples(inputs, (inputs.sum(1) > 0).long())

    def held_out(self):
        return self.client_data(1000)
"""
BY_CLIENTS = ("task.num_clients=40", "privacy=client_central", "privacy.allow_large_delta=true")
TUNED = ("tune=learning_rate", "tune.values=[0.02,0.5]", "tune.rounds=1")
# Each with its default target of epsilon 3 alone, which the planned rounds spend.
WHOLE_BUDGETS: dict[str, tuple[str, ...]] = {
    "record": ("privacy=record", "cohort=all"),
    "evaluated": (*BY_CLIENTS, "cohort=all", "evaluate.clients=final"),
    "none": ("privacy=none",),
    "together": ("privacy=record_distributed", "cohort=all"),
    "central": (*BY_CLIENTS, "cohort=all"),
    "distributed": (*BY_CLIENTS, "privacy=client_distributed", "cohort=all"),
    "both": (
        "task.num_clients=40",
        "privacy=record_and_client",
        "privacy.client.allow_large_delta=true",
        "cohort=all",
    ),
    "records evaluated": ("privacy=record_distributed", "cohort=all", "evaluate.clients=final"),
    "tuned by clients": (*BY_CLIENTS, *TUNED, "cohort=all", "tune.score=clients", "tune.resolution=1000"),
    "adaptive": (*BY_CLIENTS, "cohort=all", "privacy.noise_schedule=adaptive", "privacy.clipping=adaptive"),
    "turns": (*BY_CLIENTS, "cohort=min_separation", "cohort.size=2", "privacy.noise=correlated"),
}
SLOWER = {"tuned by clients": 1}  # rounds of the second arm
LAST_MOMENTS: dict[str, tuple[Callable[[int], Callable[[], None]], int]] = {
    "before the last line": (lambda rounds: dying(running, "record_round", rounds), 1),
    "before the result": (lambda _: dying(running, "finish", 1), 0),
    "before the last line but one": (lambda rounds: dying(running, "record_round", rounds - 1), 0),
    "before the last checkpoint": (lambda rounds: dying(progress, "save", rounds), 1),
    "within the last checkpoint": (lambda rounds: dying(checkpoint, "write_aside", rounds, after=True), 1),
    "after the last checkpoint": (lambda rounds: dying(progress, "save", rounds, after=True), 0),
    "between model and result": (lambda _: dying(results, "replace_file", 2), 0),
    "before the close": (lambda _: dying(results, "close", 1), 0),
    "at no moment": (lambda _: lambda: None, 0),
}
AT_ONCE = (
    ("record", "before the last line"),
    ("record", "before the result"),
    ("evaluated", "before the last line"),
)


def killed_and_finished(commands: Any, mode: str, arrange: Callable[[], None]) -> dict[str, Any]:
    """Let a run on real data die as arranged, and return the result with which `resume=` then ends it."""
    (commands.folder / "wards.py").write_text(WARDS)
    argv = [
        "task=custom",
        "task.target=wards:Wards",
        "allow_modules=[wards]",
        "task.num_clients=6",
    ]
    argv += [
        f"num_rounds={ROUNDS}",
        "accept_vacuous=true",
        *WHOLE_BUDGETS[mode],
        "audit=off",
        "hydra.run.dir=run",
    ]
    ledgers = commands.folder / "ledgers"
    code, command = commands.run("simulate", *argv, f"ledger.dir={ledgers}", first=arrange)
    assert code in (0, -signal.SIGKILL), command.err
    code, command = commands.run("simulate", "resume=run")
    run = commands.folder / "run"
    result = json.loads((run / "result.json").read_text())
    assert (code, result["status"]) == (0, "completed"), command.err
    rows = json_lines(run / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(1, result["rounds_completed"] + 1))
    assert result["evaluations"] == [row["evaluation"] for row in rows if "evaluation" in row]
    assert {"model.safetensors", "manifest.json"} <= {path.name for path in run.iterdir()}
    if mode != "none":
        found = [verify(path) for path in ledgers.rglob("*.ledger")]
        shown = [row["epsilon"] for row in result["privacy"] if row["adversary"] == "model"]
        spent = max(each.epsilon for each in found)
        assert all(each.ok for each in found) and spent <= max(shown) <= 3
        # A filter promises its target; of many sizes of clients one bound is shown that is a little above each ledger.
        assert mode == "adaptive" or max(shown) - spent < 1e-5
    return result


@pytest.mark.parametrize(
    ("mode", "moment"),
    [
        pytest.param(mode, moment, marks=[] if (mode, moment) in AT_ONCE else pytest.mark.campaign)
        for mode in WHOLE_BUDGETS
        for moment in LAST_MOMENTS
    ],
)
def test_real_run_killed_near_its_end_is_finished_within_its_budget(
    commands: Any, mode: str, moment: str
) -> None:
    arrange, lost = LAST_MOMENTS[moment]
    steps = ROUNDS + SLOWER.get(mode, 0)
    lost = 0 if mode == "none" else 1 if (mode, moment) == ("turns", "before the last line but one") else lost
    result = killed_and_finished(commands, mode, arrange(steps))
    assert result["rounds_completed"] == steps - lost
    if "evaluated" in mode:  # before the line of its round it was charged, and what was said is lost
        assert ("reason" in result["evaluations"][0]) == (lost > 0)


def test_evaluation_after_a_kill_has_its_planned_budget(commands: Any) -> None:
    result = killed_and_finished(commands, "evaluated", dying(run_of_rounds._Rounds, "_answer_after", ROUNDS))
    (evaluation,) = result["evaluations"]
    assert result["rounds_completed"] == evaluation["round"] == ROUNDS - 1
    assert evaluation["answers"]
