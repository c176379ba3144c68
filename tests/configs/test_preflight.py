"""Each bad configuration is refused in one sentence that names the field, before anything is written."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedveil.base.refusal import Refusal
from fedveil.configs.preflight import preflight
from fedveil.configs.privacy_settings import Record
from fedveil.configs.settings import settings_from_overrides
from fedveil.configs.strict import Mistakes
from fedveil.privacy import budget
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.plan import Plan
from fedveil.run.build import check_cohort, check_delta, check_seed
from fedveil.strategies.cohorts import All
from fedveil.tasks.protocol import check_trainable

# case, override, what the sentence must hold beside the field
BAD_VALUES = [
    ("C1", "privacy.target_epsilon=0", "above 0"),
    ("C1", "privacy.target_epsilon=-1", "above 0"),
    ("C2", "privacy.target_epsilon=inf", "finite"),
    ("C2", "privacy.target_epsilon=nan", "finite"),
    ("C2", "privacy.target_epsilon=1e309", "finite"),
    ("C2", "privacy.target_epsilon=" + "9" * 400, "finite"),
    ("C2", "privacy.target_epsilon=.inf", "text"),
    ("C3", 'privacy.target_epsilon="8"', "must be a number, not text"),
    ("C3", "privacy.target_epsilon=true", "must be a number, not a switch"),
    ("C4", "privacy.target_delta=0", "above 0 and below 1"),
    ("C4", "privacy.target_delta=1", "above 0 and below 1"),
    ("C4", "privacy.target_delta=-1e-5", "above 0 and below 1"),
    ("C4", "privacy.target_delta=null", "must be a number, not null"),
    ("C6", "privacy.noise_multiplier=0", "privacy=none"),
    ("C6", "privacy.noise_multiplier=-1", "above 0"),
    ("C7", "privacy.target_epsilon=null", "give a budget or a noise_multiplier"),
    ("C8", "privacy.clipping_norm=0", "above 0"),
    ("C8", "privacy.clipping_norm=inf", "finite"),
    ("C8", "privacy.clipping_norm=nan", "finite"),
    ("C9", "cohort.rate=0", "above 0 and at most 1"),
    ("C9", "cohort.rate=1.01", "above 0 and at most 1"),
    ("C11", "num_rounds=0", "from 1 to 100000"),
    ("C11", "num_rounds=-3", "from 1 to 100000"),
    ("C11", "num_rounds=1000000000", "from 1 to 100000"),
    ("C11", "num_rounds=1.5", "whole number"),
    ("C12", "privacy.epsilonn=3", "did you mean 'privacy.target_epsilon'?"),
    ("C12", "cohort.ratee=0.1", "did you mean 'cohort.rate'?"),
    ("C12", "num_round=3", "did you mean 'num_rounds'?"),
    ("C12", "strategy=fedavgg", "did you mean 'fedavg'?"),
    ("C12", "privcy=record", "did you mean 'privacy'?"),
    ("C12", "+privacy.epsilonn=3", "did you mean 'target_epsilon'?"),
    ("C19", "learning_rate=10e-5x", "must be a number, not text"),
    ("C24", "seed=-1", "from 0 to 4294967295"),
    ("C24", "seed=99999999999999999999", "from 0 to 4294967295"),
    ("noise", "privacy.noise=brown", "independent"),
    ("noise", "privacy.bands=4", "belongs to privacy.noise=correlated"),
    ("adaptive", "privacy.clipping=adaptiv", "fixed, adaptive"),
    ("adaptive", "privacy.clipping_quantile=1", "above 0 and below 1"),
    ("adaptive", "privacy.clipping_learning_rate=0", "above 0"),
    ("range", "privacy.metrics_share=1", "at least 0 and below 1"),
    ("range", "privacy.adjacency=zero", "zero-out"),
    ("range", "faults.dropout=1.5", "at most 1"),
    ("range", "engine.workers=0", "from 1"),
    ("range", "engine.deadline=0", "above 0"),
    ("range", "local_epochs=0", "from 1"),
    ("range", "allow_modules=[a-b]", "module names"),
    ("range", "ledger.dir=3", "text or null"),
    ("sweep", "seed=0,1", "add -m"),
]


@pytest.mark.parametrize(("case", "override", "remedy"), BAD_VALUES)
def test_bad_value_is_refused_by_name(case: str, override: str, remedy: str) -> None:
    with pytest.raises(Refusal) as caught:
        settings_from_overrides([override])
    (sentence,) = str(caught.value).splitlines()
    assert sentence.startswith(override.removeprefix("+").partition("=")[0] + "=")
    assert remedy in sentence


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(Mistakes) as caught:
        settings_from_overrides(["privacy.epsilonn=3", "num_rounds=0", "strategy=fedavgg", "cohort.rate=2"])
    fields = {mistake.field for mistake in caught.value.each}
    assert fields == {"privacy.epsilonn", "num_rounds", "strategy", "cohort.rate"}


def test_c5_delta_above_one_over_the_population(capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_from_overrides(["privacy.target_delta=0.01"])
    check_delta(settings, 100)
    with pytest.raises(Refusal, match="allow_large_delta=true"):
        check_delta(settings, 101)
    asked_for = settings_from_overrides(["privacy.target_delta=0.01", "privacy.allow_large_delta=true"])
    assert capsys.readouterr().err == ""
    check_delta(asked_for, 101)
    assert "101 clients" in capsys.readouterr().err
    both = settings_from_overrides(["privacy=record_and_client", "privacy.client.target_delta=0.01"])
    with pytest.raises(Refusal, match=r"privacy\.client\.target_delta"):
        check_delta(both, 101)
    record = settings_from_overrides(["privacy=record", "privacy.target_delta=0.2"])
    check_delta(record, 400)
    assert capsys.readouterr().err == ""
    assert isinstance(record.privacy, Record)
    with pytest.raises(Refusal, match="10 records"):
        budget.check_delta("privacy", record.privacy.target_delta, 10, "records", False)


def test_c7_each_unit_needs_a_budget_or_noise() -> None:
    with pytest.raises(Refusal, match=r"privacy\.record\.target_epsilon"):
        settings_from_overrides(["privacy=record_and_client", "privacy.record.target_epsilon=null"])


def test_c10_cohort_larger_than_the_population() -> None:
    settings = settings_from_overrides(["cohort=fixed", "cohort.size=11"])
    check_cohort(settings, 11)
    with pytest.raises(Refusal, match=r"cohort\.size=11: there are 10 clients"):
        check_cohort(settings, 10)


BY_TURNS = ("cohort=min_separation", "cohort.size=4", "num_rounds=10", "privacy.allow_large_delta=true")


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (("privacy.noise=correlated",), "use cohort=cyclic_poisson or min_separation"),
        (("cohort=cyclic_poisson",), "gains nothing by turns"),
        (("cohort=cyclic_poisson", "privacy=record"), "protect clients as well"),
        (("cohort=cyclic_poisson", "privacy.noise=correlated", "privacy.clipping=adaptive"), "one release"),
        ((*BY_TURNS, "cohort.separation=4"), "give at most 3"),
        ((*BY_TURNS, "cohort.max_participations=3"), "need at least 4"),
        (("cohort=min_separation", "cohort.size=4", "privacy=none"), "protect clients as well"),
        (("cohort=min_separation", "cohort.size=4", "privacy=record"), "protect clients as well"),
        (("cohort=first", "cohort.size=4", "privacy=none"), "protect clients as well"),
        (("cohort=first", "cohort.size=4", "privacy=record"), "protect clients as well"),
        (("cohort=first", "cohort.size=4", "cohort.separation=4"), "give at most 3"),
        (("cohort=first", "cohort.size=4", "privacy=record_and_client"), "train more often"),
        ((*BY_TURNS, "privacy.clipping=adaptive"), "one release"),
        ((*BY_TURNS, "privacy.noise_schedule=adaptive"), "one release"),
        ((*BY_TURNS, "cohort.size=13"), "take at most that many"),
    ],
)
def test_cohort_without_the_separation_of_its_noise_is_refused(
    overrides: tuple[str, ...], remedy: str
) -> None:
    check_cohort(settings_from_overrides([*BY_TURNS, "privacy.noise=correlated"]), 12)
    with pytest.raises(Refusal, match=remedy):
        check_cohort(settings_from_overrides(list(overrides)), 12)


def test_c14_every_missing_value_is_listed() -> None:
    with pytest.raises(Mistakes) as caught:
        preflight(["task=custom", "strategy=custom"], writes=True)
    assert [mistake.field for mistake in caught.value.each] == ["strategy.target", "task.target"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["+task._target_=os.system"], "task._target_"),
        (["+strategy.nested={_target_:os.system}"], "strategy.nested._target_"),
        (["hydra.launcher._target_=os.system"], "hydra.launcher._target_"),
        (["+hydra.callbacks.x._target_=os.system"], "hydra.callbacks.x._target_"),
        (["task=custom", "task.target=os:system"], "task.target"),
        (["task=custom", "task.target=os:system", "allow_modules=[os.path]"], "task.target"),
        (["task=custom", "task.target=os.system", "allow_modules=[os]"], "task.target"),
        (["strategy=custom", "strategy.target=my.mod:X", "allow_modules=[my]"], "strategy.target"),
    ],
)
def test_c17_only_listed_modules_are_named(overrides: list[str], field: str) -> None:
    with pytest.raises(Refusal) as caught:
        settings_from_overrides(overrides)
    assert any(line.startswith(f"{field}=") for line in str(caught.value).splitlines())


def test_c18_a_refusal_repeats_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVEIL_TEST_SECRET", "s3cret")
    with pytest.raises(Refusal) as caught:
        settings_from_overrides(["learning_rate=${oc.env:FEDVEIL_TEST_SECRET}"])
    assert "${oc.env:FEDVEIL_TEST_SECRET}" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_an_unset_variable_is_named() -> None:
    with pytest.raises(Refusal, match="FEDVEIL_NOT_SET"):
        settings_from_overrides(["ledger.dir=${oc.env:FEDVEIL_NOT_SET}"])


@pytest.mark.parametrize("override", ["~privacy", "~privacy.name", "privacy.name=null"])
def test_c22_unit_of_privacy_is_required(override: str) -> None:
    with pytest.raises(Refusal) as caught:
        settings_from_overrides([override])
    assert "client_central, client_distributed, none, record, record_and_client" in str(caught.value)


@pytest.mark.parametrize("frozen", [False, True])
def test_c23_batch_normalisation(frozen: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sequential(nn.BatchNorm2d(8)))
    for parameter in model[1].parameters():
        parameter.requires_grad_(not frozen)
    with pytest.raises(Refusal, match=r"1\.0: BatchNorm2d.*GroupNorm\(\w+, 8\)"):
        check_trainable(model)
    check_trainable(nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8)))
    assert torch.is_grad_enabled()


def test_c24_a_seed_on_real_data() -> None:
    seeded = settings_from_overrides(["seed=0"])
    check_seed(seeded, simulated=True)
    with pytest.raises(Refusal, match="seed=0"):
        check_seed(seeded, simulated=False)
    check_seed(seeded.model_copy(update={"seed": None}), simulated=False)


def test_c25_a_budget_below_the_first_round() -> None:
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), clipping_norm=1.0, num_rounds=1)
    with pytest.raises(Refusal):
        plan.calibrate(Budget(Unit.CLIENT, target_epsilon=1e-12, target_delta=1e-12))


@pytest.mark.parametrize(
    ("folder", "remedy"),
    [
        ("runs/../../x", "must not climb"),
        ("{tmp}/file/x", "is a file"),
        ("{tmp}/old", "already holds a run"),
        ("${oc.env:FEDVEIL_NOT_SET}", "FEDVEIL_NOT_SET"),
    ],
)
def test_run_folder_is_looked_at_before_the_run(tmp_path: Path, folder: str, remedy: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").touch()
    path = folder.replace("{tmp}", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refusal, match=remedy) as caught:
        preflight([f"hydra.run.dir={path}"], writes=True)
    assert caught.value.field == "hydra.run.dir"
    assert sorted(tmp_path.rglob("*")) == before
    assert preflight(["hydra.run.dir=" + path], writes=False).jobs


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["--experimental-rerun", "x.pickle"], "--experimental-rerun"),
        (["--config-dir", "/nowhere"], "--config-dir"),
        (["--config-path", "/nowhere"], "--config-path"),
        (["--config-name", "nothing"], "config"),
        (["num_rounds=[1"], "override"),
        (["resume=/nowhere"], "resume"),
        (["-m", "resume=/nowhere,/elsewhere"], "resume"),
    ],
)
def test_bad_flags_are_refused(argv: list[str], field: str) -> None:
    with pytest.raises(Refusal) as caught:
        preflight(argv, writes=True)
    assert caught.value.field == field
    assert "Traceback" not in str(caught.value)
