"""What the shipped configuration says, and what users may bring of their own."""

import json
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from fedveil import configs
from fedveil.base.refusal import Refusal
from fedveil.configs.compose import arguments, compose_jobs
from fedveil.configs.privacy_settings import ClientCentral, NoPrivacy, Record, RecordAndClient
from fedveil.configs.schema import SimulationSettings
from fedveil.configs.settings import settings_from_overrides, settings_of
from fedveil.configs.task_settings import PlainPartition, PoissonCohort
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
    "task/csv": ["task.folder=hospitals"],
}


def settings_of_command(*argv: str) -> SimulationSettings:
    (job,) = compose_jobs(arguments(argv))
    return settings_of(job)


def test_defaults_are_the_main_job() -> None:
    settings = settings_from_overrides([])
    assert settings.task.name == "mnist5k"
    assert settings.task.num_clients == 400
    assert settings.partition == PlainPartition(name="iid")
    assert settings.cohort == PoissonCohort(rate=0.25)
    assert (settings.num_rounds, settings.seed, settings.checkpoint_every) == (100, None, 1)
    assert (settings.engine.name, settings.engine.workers) == ("inprocess", 1)
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
    def shown(*overrides: str) -> object:
        (job,) = compose_jobs(arguments(overrides))
        return [OmegaConf.select(job.config, key) for key in keys]

    asked = [f"task={task}", f"privacy={mode}"] + (["task.folder=tables"] if task == "csv" else [])
    assert shown(*asked) == list(keys.values())
    untuned = shown(*asked, "~tuned")
    assert all(before != now for before, now in zip(untuned, keys.values(), strict=True))
    given = [f"{key}={json.dumps(value)}" for key, value in zip(keys, untuned, strict=True)]
    assert shown(*asked, *given) == untuned
    settings_from_overrides(asked)


def test_settings_of_ones_own_go_before_those_that_are_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.yaml").write_text("defaults: [config, _self_]\nnum_rounds: 9\n")
    monkeypatch.chdir(tmp_path)
    study = ("--config-path", ".", "--config-name", "study", "task=digits")
    assert settings_of_command(*study).num_rounds == 9
    assert settings_of_command(*study).model == "average"
    first, second = compose_jobs(arguments(["-m", "task=digits,heart", "privacy=record"]))
    assert (settings_of(first).training.batch_size, settings_of(second).training.batch_size) == (10, 100)


def test_the_pages_of_accuracy_show_the_tuned_settings() -> None:
    text = (FOLDER / "tuned.yaml").read_text()
    rows = text[text.index("mnist5k:") :]
    assert rows in (FOLDER.parent / "docs" / "evidence" / "accuracy.md").read_text()


def test_settings_are_frozen() -> None:
    settings = settings_from_overrides([])
    with pytest.raises(ValidationError, match="frozen"):
        settings.num_rounds = 1  # type: ignore[misc]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_every_yaml_composes_and_opens_with_the_command_that_runs_it(file: Path) -> None:
    option = str(file.relative_to(FOLDER).with_suffix(""))
    group, _, name = option.rpartition("/")
    extra = ["privacy=record"] if option == "secagg/masked" else OWN_CLASS.get(option, [])
    composed = settings_from_overrides([f"{group}={name}", *extra] if group else extra)
    if group and group not in ("privacy", "secagg", "audit"):
        assert getattr(composed, group).name == name

    lines = file.read_text().splitlines()
    first = (
        lines[1] if lines[0].startswith("# @package") else lines[0]
    )  # Hydra wants its own directive on top
    command = shlex.split(first.removeprefix("# "))
    assert command[:2] == ["fedveil", "simulate"]
    assert not group or f"{group}={name}" in command
    settings_from_overrides(command[2:])


def test_privacy_is_one_of_four_kinds() -> None:
    record = settings_from_overrides(["privacy=record", "privacy.max_grad_norm=0.5"]).privacy
    assert isinstance(record, Record)
    assert (record.max_grad_norm, record.target_delta) == (0.5, 1e-5)
    both = settings_from_overrides(
        ["privacy=record_and_client", "privacy.record.target_epsilon=8", "privacy.client.clipping_norm=2"]
    ).privacy
    assert isinstance(both, RecordAndClient)
    assert both.record.target_epsilon == 8.0
    assert both.client.clipping_norm == 2.0
    assert settings_from_overrides(["privacy=none"]).privacy == NoPrivacy()


@pytest.mark.parametrize(
    ("overrides", "target", "noise"),
    [
        (["privacy.target_epsilon=1"], 1.0, None),  # the noise is planned
        (["privacy.noise_multiplier=2", "privacy.target_epsilon=1"], 1.0, 2.0),  # stops when it is spent
        (["privacy.noise_multiplier=2", "privacy.target_epsilon=null"], None, 2.0),  # never stops for it
    ],
)
def test_budget_and_noise(overrides: list[str], target: float | None, noise: float | None) -> None:
    privacy = settings_from_overrides(overrides).privacy
    assert isinstance(privacy, ClientCentral)
    assert (privacy.target_epsilon, privacy.noise_multiplier) == (target, noise)


def test_whole_numbers_are_read_as_reals_where_reals_are_meant() -> None:
    settings = settings_from_overrides(["learning_rate=1", "cohort.rate=1"])
    assert isinstance(settings.training.learning_rate, float)
    assert isinstance(settings.cohort.rate, float)


def test_hospitals_are_the_clients_unless_somebody_says_otherwise() -> None:
    heart = settings_from_overrides(["task=heart"])
    assert (heart.partition.name, heart.cohort.name) == ("natural", "all")
    other = settings_from_overrides(["cohort=poisson", "task=heart"])
    assert (other.partition.name, other.cohort.name) == ("natural", "poisson")


def test_saved_source_resolves_no_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVEIL_TEST_SECRET", "/home/s3cret")
    settings = settings_from_overrides(["ledger.dir=${oc.env:FEDVEIL_TEST_SECRET}"])
    assert settings.ledger.dir == "/home/s3cret"
    assert "${oc.env:FEDVEIL_TEST_SECRET}" in settings.source
    assert "s3cret" not in settings.source
    assert "s3cret" not in str(OmegaConf.create(settings.source))


def test_a_saved_source_gives_the_same_settings(tmp_path: Path) -> None:
    first = settings_from_overrides(["strategy=fedadam", "num_rounds=7"])
    (tmp_path / "config.yaml").write_text(first.source)
    again = settings_from_overrides([f"resume={tmp_path}"])
    assert again == first.model_copy(update={"resume": str(tmp_path), "source": again.source})


def test_resume_refuses_other_overrides(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(settings_from_overrides([]).source)
    with pytest.raises(Refusal, match="drop num_rounds=3"):
        settings_from_overrides([f"resume={tmp_path}", "num_rounds=3"])


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
    jobs = compose_jobs(arguments(["-m", "privacy.target_epsilon=1,3", "seed=0,1"]))
    assert [job.overrides for job in jobs] == [
        ("privacy.target_epsilon=1", "seed=0"),
        ("privacy.target_epsilon=1", "seed=1"),
        ("privacy.target_epsilon=3", "seed=0"),
        ("privacy.target_epsilon=3", "seed=1"),
    ]
    assert [settings_of(job).seed for job in jobs] == [0, 1, 0, 1]


def test_custom_parameters_reach_the_users_strategy() -> None:
    strategy = settings_from_overrides(
        [
            "strategy=custom",
            "strategy.target=mine:Strategy",
            "allow_modules=[mine]",
            "strategy.parameters.eta=0.1",
        ]
    ).strategy
    assert strategy.target == "mine:Strategy"
    assert strategy.parameters == {"eta": 0.1}
