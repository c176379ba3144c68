"""What the shipped configuration says, and what users may bring of their own."""

import inspect
import re
from pathlib import Path

import flwr.serverapp.strategy as flower
import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from fedveil import configs
from fedveil.base.refusal import Refusal
from fedveil.configs.privacy_settings import ClientCentral, NoPrivacy, Record, RecordAndClient
from fedveil.configs.settings import settings_from_overrides
from fedveil.configs.training_settings import STRATEGIES
from fedveil.strategies.registry import make_strategy

FOLDER = Path(str(configs.__file__)).parent


def test_the_pages_of_accuracy_show_the_tuned_settings() -> None:
    text = (FOLDER / "tuned.yaml").read_text()
    rows = text[text.index("mnist5k:") :]
    assert rows in (FOLDER.parent / "docs" / "evidence" / "accuracy.md").read_text()


def test_settings_are_frozen() -> None:
    settings = settings_from_overrides([])
    with pytest.raises(ValidationError, match="frozen"):
        settings.num_rounds = 1  # type: ignore[misc]


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


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"auto", "custom"}))
def test_a_strategy_has_the_keys_of_flowers_constructor(name: str) -> None:
    strategy = settings_from_overrides([f"strategy={name}"]).strategy
    made = make_strategy(name, strategy.parameters)
    theirs = (
        inspect.signature(type(made)).parameters.keys() - inspect.signature(flower.FedAvg).parameters.keys()
    )
    assert type(made).__name__.lower() == name and strategy.parameters.keys() == theirs
    assert {key: getattr(made, key) for key in theirs} == strategy.parameters


def test_flower_checks_no_value_of_a_strategy_so_that_the_models_do() -> None:
    """When Flower's constructors refuse values themselves, the ranges of the models may go."""
    assert [
        make_strategy("fedadam", {"eta": -1.0, "tau": 0.0}),
        make_strategy("fedavgm", {"server_momentum": 2.0}),
    ]
    for keys in (["strategy=fedadam", "strategy.tau=0"], ["strategy=fedavgm", "strategy.server_momentum=2"]):
        with pytest.raises(Refusal, match="must be"):
            settings_from_overrides(keys)


class Slower(flower.FedAvg):
    """Strategy of a user's own, whose constructor has an argument without a default and checks it."""

    def __init__(self, pace: float) -> None:
        if pace <= 0:
            raise ValueError("the pace is above 0")
        super().__init__()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pace": 1.0, "pase": 1.0}, "got an unexpected keyword argument 'pase': Slower takes pace"),
        ({}, "missing a required argument: 'pace': Slower takes pace"),
    ],
)
def test_an_argument_that_a_strategy_of_ones_own_lacks_is_refused(
    options: dict[str, float], said: str
) -> None:
    with pytest.raises(Refusal, match=re.escape(said)):
        make_strategy(f"{__name__}:Slower", options, (__name__,))


def test_a_strategy_of_ones_own_keeps_its_error() -> None:
    assert isinstance(make_strategy(f"{__name__}:Slower", {"pace": 1.0}, (__name__,)), Slower)
    with pytest.raises(ValueError, match="the pace is above 0"):
        make_strategy(f"{__name__}:Slower", {"pace": 0.0}, (__name__,))


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
