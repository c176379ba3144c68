"""Composition: the shipped files, tuned rows, a user's own folders and files, sweeps."""

import json
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedveil import configs
from fedveil.configs.compose import compose_jobs, parse_arguments
from fedveil.configs.privacy_settings import ClientCentral
from fedveil.configs.schema import SimulationSettings
from fedveil.configs.settings import settings_from_overrides, settings_of
from fedveil.configs.strict import Mistakes
from fedveil.configs.task_settings import PlainPartition, PoissonCohort
from fedveil.face import _overrides
from fedveil.privacy.budget import Adjacency

FOLDER = Path(str(configs.__file__)).parent


SERVERS = {
    FOLDER / "server.yaml",
    *(FOLDER / "link").glob("*.yaml"),
}  # deployment/test_settings.py reads these


FILES = sorted({*FOLDER.rglob("*.yaml")} - SERVERS)


OWN_CLASS = {
    "partition/flwr": [
        "task=csv",
        "task.folder=x",
        "partition.target=flwr_datasets.partitioner.IidPartitioner",
    ],
    "task/custom": ["task.target=mine:Task", "allow_modules=[mine]"],
    "personal/layers": ["personal.layers=[head.*]"],
    "task/csv": ["task.folder=hospitals"],
    "task/text": ["task.folder=letters", "task.base=model"],
    **{f"adapter/{name}": ["task=text", "task.folder=x", "task.base=y"] for name in ("ffa", "lora", "rxr")},
}


def settings_of_command(*argv: str) -> SimulationSettings:
    (job,) = compose_jobs(parse_arguments(argv))
    return settings_of(job)


def test_defaults_are_the_main_job() -> None:
    settings = settings_from_overrides([])
    assert settings.task.name == "mnist5k"
    assert settings.task.num_clients == 400
    assert settings.partition == PlainPartition(name="iid")
    assert settings.cohort == PoissonCohort(rate=0.25)
    assert (settings.num_rounds, settings.seed, settings.checkpoint_every) == (100, None, 1)
    assert (settings.engine.name, settings.engine.workers) == ("inprocess", None)
    assert isinstance(settings.privacy, ClientCentral)
    assert settings.privacy.target_epsilon == 3.0
    assert settings.privacy.target_delta == 1e-4
    assert settings.privacy.noise_multiplier is None
    assert settings.privacy.adjacency is Adjacency.ZERO_OUT
    assert settings.privacy.metrics_share is None
    assert set(settings.faults.model_dump().values()) == {0.0}


TUNED = [
    (task, mode, keys)
    for task, modes in OmegaConf.load(FOLDER / "tuned.yaml").items()
    for mode, keys in modes.items()
]


@pytest.mark.parametrize(("task", "mode", "keys"), TUNED, ids=[f"{task} {mode}" for task, mode, _ in TUNED])
def test_a_row_of_tuned_settings_holds_for_its_task_and_mode_alone(
    task: str, mode: str, keys: dict[str, object]
) -> None:
    def values_of(*overrides: str) -> object:
        (job,) = compose_jobs(parse_arguments(overrides))
        return [OmegaConf.select(job.config, key) for key in keys]

    choices = [f"task={task}", f"privacy={mode}"] + (["task.folder=files"] if task in ("csv", "text") else [])
    assert values_of(*choices) == list(keys.values())
    untuned = values_of(*choices, "~tuned")
    assert all(before != now for before, now in zip(untuned, keys.values(), strict=True))
    overrides = [f"{key}={json.dumps(value)}" for key, value in zip(keys, untuned, strict=True)]
    assert values_of(*choices, *overrides) == untuned
    settings_from_overrides(choices)


def test_settings_of_ones_own_go_before_those_that_are_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.yaml").write_text("defaults: [config, _self_]\nnum_rounds: 9\n")
    monkeypatch.chdir(tmp_path)
    study = ("--config-path", ".", "--config-name", "study", "task=digits")
    assert settings_of_command(*study).num_rounds == 9
    assert settings_of_command(*study).model == "average"
    first, second = compose_jobs(parse_arguments(["-m", "task=digits,heart", "privacy=record"]))
    assert (settings_of(first).training.batch_size, settings_of(second).training.batch_size) == (10, 100)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_every_yaml_composes_and_opens_with_the_command_that_runs_it(file: Path) -> None:
    option = str(file.relative_to(FOLDER).with_suffix(""))
    group, _, name = option.rpartition("/")
    extra = ["privacy=record"] if option == "secagg/masked" else OWN_CLASS.get(option, [])
    composed = settings_from_overrides([f"{group}={name}", *extra] if group else extra)
    if group and group not in ("privacy", "secagg", "audit"):
        assert getattr(composed.task if group == "adapter" else composed, group).name == name

    lines = file.read_text().splitlines()
    first = (
        lines[1] if lines[0].startswith("# @package") else lines[0]
    )  # Hydra wants its own directive on top
    command = shlex.split(first.removeprefix("# "))
    assert command[:2] == ["fedveil", "simulate"]
    assert not group or f"{group}={name}" in command
    settings_from_overrides(command[2:])


def test_a_users_directory_adds_options(tmp_path: Path) -> None:
    (tmp_path / "privacy").mkdir()
    (tmp_path / "privacy" / "strict.yaml").write_text(
        "defaults: [client_central, _self_]\ntarget_epsilon: 0.5\n"
    )
    privacy = settings_of_command("--config-dir", str(tmp_path), "privacy=strict").privacy
    assert isinstance(privacy, ClientCentral)
    assert (privacy.target_epsilon, privacy.target_delta) == (0.5, 1e-4)


def test_a_users_own_tree_comes_first_and_may_be_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "conf"
    (own / "cohort").mkdir(parents=True)
    (own / "cohort" / "poisson.yaml").write_text("name: poisson\nrate: 0.5\n")
    (own / "study.yaml").write_text("defaults: [config, _self_]\nnum_rounds: 9\n")
    monkeypatch.chdir(tmp_path)
    settings = settings_of_command("--config-path", "conf", "--config-name", "study")
    assert (settings.num_rounds, settings.cohort.rate) == (9, 0.5)


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b""], ids=["bom", "plain"])
@pytest.mark.parametrize("newline", [b"\r\n", b"\n"], ids=["crlf", "lf"])
def test_byte_order_marks_and_windows_line_ends_are_accepted(
    tmp_path: Path, prefix: bytes, newline: bytes
) -> None:
    (tmp_path / "cohort").mkdir()
    text = prefix + newline.join([b"name: poisson", b"rate: 0.5", b""])
    (tmp_path / "cohort" / "mine.yaml").write_bytes(text)
    assert settings_of_command("--config-dir", str(tmp_path), "cohort=mine").cohort.rate == 0.5


def test_a_sweep_is_composed_in_hydras_order() -> None:
    jobs = compose_jobs(parse_arguments(["-m", "privacy.target_epsilon=1,3", "seed=0,1"]))
    assert [job.overrides for job in jobs] == [
        ("privacy.target_epsilon=1", "seed=0"),
        ("privacy.target_epsilon=1", "seed=1"),
        ("privacy.target_epsilon=3", "seed=0"),
        ("privacy.target_epsilon=3", "seed=1"),
    ]
    assert [settings_of(job).seed for job in jobs] == [0, 1, 0, 1]


def test_the_adapter_is_chosen_within_the_task() -> None:
    texts = ("task=text", "task.folder=letters", "task.base=model")
    for argv in (
        ("adapter=lora", "adapter.rank=8"),
        ("adapter@task.adapter=lora", "task.adapter.rank=8"),
        ("task.adapter=lora", "adapter.rank=8"),
    ):
        adapter = settings_of_command(*texts, *argv).task.options["adapter"]
        assert (adapter["name"], adapter["rank"], adapter["layers"]) == ("lora", 8, 1)
    keys = {"name": "text", "folder": "letters", "base": "model", "adapter": {"name": "rxr", "rank": 3}}
    overrides = list(_overrides("task", keys))
    assert settings_of_command(*overrides).task.options["adapter"]["name"] == "rxr"
    with pytest.raises(Mistakes, match="override='adapter': is a group of another task; add task=text"):
        settings_of_command("adapter=lora")
