"""fedveil simulate and plan: one job, sweeps and exit codes, with a simulator of the test's choice."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf
from shared.console import Console, completed

from fedveil.base.refusal import Refusal
from fedveil.configs.schema import SimulationSettings

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


def test_run_is_composed_once_like_hydra_itself_does(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[Any] = []
    load = ConfigLoaderImpl.load_configuration

    def counting(self: ConfigLoaderImpl, *words: Any, **more: Any) -> DictConfig:
        composed.append(load(self, *words, **more))
        return composed[-1]

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counting)
    assert console("simulate", "num_rounds=3", "hydra.run.dir=here", "hydra.output_subdir=.hydra")[0] == 0
    (settings, folder) = console.calls[0]
    assert (len(composed), settings.num_rounds, folder) == (1, 3, console.folder / "here")
    hydra = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra
    assert (hydra.runtime.output_dir, hydra.mode, hydra.job.config_name) == (str(folder), "RUN", "config")
    assert list(hydra.overrides.task) == ["num_rounds=3"]


def test_a_run_gets_its_settings_and_its_folder(console: Console) -> None:
    code, out, err = console("simulate", "num_rounds=3", 'hydra.run.dir="it\'s here"')
    assert (code, out, err) == (0, "", "")
    ((settings, folder),) = console.calls
    assert settings.num_rounds == 3
    assert folder == console.folder / "it's here"
    assert console.written() == ["it's here"]


def test_the_default_folder_is_dated(console: Console) -> None:
    console("simulate")
    ((_, folder),) = console.calls
    assert folder.relative_to(console.folder).parts[0] == "runs"
    assert folder.is_dir()


def test_json_is_the_last_line(console: Console) -> None:
    def chatty(settings: SimulationSettings, folder: Path) -> tuple[int, dict[str, Any]]:
        print("round 1")
        return 0, completed(0.9, "infinity")

    console.simulator(chatty)
    _, out, _ = console("simulate", "--json")
    assert json.loads(out.splitlines()[-1]) == completed(0.9, "infinity")


def test_a_diverged_loss_is_still_json(console: Console) -> None:
    console.simulator(
        lambda settings, folder: (0, {"status": "completed", "metrics": {"loss": float("nan")}})
    )
    code, out, _ = console("simulate", "--json")
    assert code == 0
    assert json.loads(out) == {"status": "completed", "metrics": {"loss": None}}


def test_a_sweep_ends_in_one_table(console: Console) -> None:
    def by_seed(settings: SimulationSettings, folder: Path) -> tuple[int, dict[str, Any]]:
        return 0, completed(0.5 + settings.seed / 10 if settings.seed else 0.5, 2.98765)

    console.simulator(by_seed)
    code, out, err = console("simulate", "-m", "seed=0,1", "hydra.sweep.dir=sweep")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "job     accuracy  epsilon",
        "seed=0  0.5       client 2.99",
        "seed=1  0.6       client 2.99",
        "",
        "mean over seeds, 95 % interval  runs  accuracy",
        "all                             2     0.55 ± 0.64",
    ]
    assert [folder for _, folder in console.calls] == [console.folder / "sweep" / job for job in "01"]


def test_a_sweep_prints_one_json_object_a_job(console: Console) -> None:
    _, out, _ = console("simulate", "--json", "-m", "seed=0,1", "hydra.sweep.dir=sweep")
    assert [json.loads(line) for line in out.splitlines()] == [completed(0.9, 2.98)] * 2


@pytest.mark.parametrize(
    ("codes", "worst"), [((0, 0, 0), 0), ((0, 3, 0), 3), ((3, 1, 0), 1), ((1, 3, 3), 1), ((0, 2, 3), 2)]
)
def test_a_sweep_goes_on_and_exits_with_the_worst(
    console: Console, codes: tuple[int, ...], worst: int
) -> None:
    statuses = {0: "completed", 3: "exhausted"}

    def end(settings: SimulationSettings, folder: Path) -> tuple[int, dict[str, Any]]:
        assert settings.seed is not None
        code = codes[settings.seed]
        if code == 1:
            raise RuntimeError("the disk is on fire")
        if code == 2:
            raise Refusal("cohort.size", 9, "too large")
        return code, {"status": statuses[code]}

    console.simulator(end)
    code, out, err = console("simulate", "-m", "seed=0,1,2", "hydra.sweep.dir=sweep")
    assert code == worst
    assert len(console.calls) == 3
    assert len(out.splitlines()) == 4
    assert ("fedveil: the run failed: RuntimeError: the disk is on fire" in err) == (1 in codes)
    assert ("cohort.size=9: too large" in err) == (2 in codes)


@pytest.mark.parametrize("argv", [(), ("-m", "num_rounds=1,2"), ("hydra.run.dir=old/new/run",)])
def test_refusal_by_data_leaves_nothing(commands: Any, argv: tuple[str, ...]) -> None:
    """The settings alone do not tell that the folder holds no table; Hydra has made its folders by then."""
    (commands.folder / "old").mkdir()
    code, command = commands.run("simulate", *argv, "task=csv", "task.folder=no", "task.label=x")
    assert code == 2 and "task.folder='no': does not exist" in command.err
    files = {command.out_file, command.err_file, commands.folder / "old"}
    assert {*commands.folder.rglob("*")} == files


def test_sweep_lists_its_refused_jobs_with_the_completed_one(console: Console) -> None:
    def end(settings: SimulationSettings, folder: Path) -> tuple[int, dict[str, Any]]:
        if settings.seed:
            raise Refusal("cohort.size", 9, "too large")
        return 0, completed(0.9, 2.98)

    console.simulator(end)
    assert console("simulate", "-m", "seed=0,1", "hydra.sweep.dir=sweep")[0] == 2
    results = {str(each.relative_to(console.folder)) for each in (console.folder / "sweep").rglob("job.json")}
    assert results == {"sweep/0/job.json", "sweep/1/job.json"}
    assert (console.folder / "sweep" / "sweep.csv").is_file()


@pytest.mark.parametrize("raised", [False, True])
def test_an_interrupted_job_ends_the_sweep(console: Console, raised: bool) -> None:
    def interrupted(settings: SimulationSettings, folder: Path) -> tuple[int, dict[str, Any]]:
        if raised:
            raise KeyboardInterrupt
        return 130, {"status": "interrupted"}

    console.simulator(interrupted)
    code, _, _ = console("simulate", "-m", "seed=0,1", "hydra.sweep.dir=sweep")
    assert code == 130
    assert len(console.calls) == 1


def test_one_bad_job_refuses_the_whole_sweep(console: Console) -> None:
    code, _, err = console("simulate", "-m", "seed=0,-1", "num_rounds=1,2")
    assert code == 2
    assert err == "seed=-1: must be from 0 to 4294967295\n"
    assert console.calls == []
    assert console.written() == []


def test_resume_runs_in_the_old_folder_under_the_old_settings(console: Console) -> None:
    def save(settings: SimulationSettings, folder: Path) -> tuple[int, dict[str, Any]]:
        (folder / "config.yaml").write_text(settings.source)
        return 130, {"status": "interrupted"}

    console.simulator(save)
    assert console("simulate", "num_rounds=7", "hydra.run.dir=old")[0] == 130
    assert console("simulate", "num_rounds=7", "hydra.run.dir=old")[0] == 2
    assert console("simulate", "resume=old")[0] == 130
    (_, first), (settings, second) = console.calls
    assert first == second == console.folder / "old"
    assert (settings.num_rounds, settings.resume) == (7, "old")
    assert console.written() == ["old", "old/config.yaml"]


def test_plan_makes_no_folder(console: Console) -> None:
    rounds: list[int] = []
    room = types.ModuleType("fedveil.cli.plan")

    def show_plan(settings: SimulationSettings, **_: object) -> int:
        rounds.append(settings.num_rounds)
        return 0

    room.__dict__["show_plan"] = show_plan
    console.monkeypatch.setitem(sys.modules, "fedveil.cli.plan", room)
    code, out, _ = console("plan", "-m", "num_rounds=1,2")
    assert (code, rounds) == (0, [1, 2])
    assert out.splitlines() == ["# num_rounds=1", "# num_rounds=2"]
    assert console.written() == []
