"""From a composed configuration to frozen settings, or one sentence for each mistake in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..privacy.refusal import Refusal
from .audit_settings import read_audit
from .checks import check_cohort, check_delta, check_seed
from .local_training import RULES, TOLD, LocalTraining
from .privacy_settings import PRIVACIES, read_privacy, read_secagg
from .schema import (
    ClientCentral,
    ClientDistributed,
    CohortSettings,
    EngineSettings,
    FaultSettings,
    NoPrivacy,
    Parameter,
    PartitionSettings,
    PrivacySettings,
    Record,
    RecordAndClient,
    SecaggSettings,
    SimulationSettings,
    StrategySettings,
    TaskSettings,
)
from .strict import Mistakes, Section

__all__ = [
    "ClientCentral",
    "ClientDistributed",
    "CohortSettings",
    "EngineSettings",
    "FaultSettings",
    "Mistakes",
    "NoPrivacy",
    "PartitionSettings",
    "PrivacySettings",
    "Record",
    "RecordAndClient",
    "SecaggSettings",
    "SimulationSettings",
    "StrategySettings",
    "TaskSettings",
    "check_cohort",
    "check_delta",
    "check_seed",
    "from_config",
    "settings_from_overrides",
]

# Accountants compose round by round in floating point; beyond this their own error is no longer negligible.
MAX_ROUNDS = 100_000
MAX_CLIENTS = 10_000_000
MAX_SEED = 2**32 - 1  # what both NumPy and torch accept
MAX_WORKERS = 1_024
MAX_EPOCHS = 10_000

TASKS = ("mnist5k", "digits", "heart", "fashion_mnist", "shakespeare", "sentences", "custom")
MAX_SECRETS = 50  # of each kind; more would be a good part of what clients hold


class Bounds(TypedDict, total=False):
    """The range of one number, as ``Section.real`` takes it."""

    above: float
    at_least: float
    below: float
    at_most: float


class Range(TypedDict):
    """The range of a whole number, as ``Section.whole`` takes it."""

    at_least: int
    at_most: int


POSITIVE: Bounds = {"above": 0}
DECAY: Bounds = {"at_least": 0, "below": 1}
STRATEGIES: Mapping[str, Mapping[str, Bounds]] = {
    "fedavg": {},
    "fedavgm": {"server_learning_rate": POSITIVE, "server_momentum": DECAY},
    "fedadam": {"eta": POSITIVE, "eta_l": POSITIVE, "beta_1": DECAY, "beta_2": DECAY, "tau": POSITIVE},
    "fedyogi": {"eta": POSITIVE, "eta_l": POSITIVE, "beta_1": DECAY, "beta_2": DECAY, "tau": POSITIVE},
    "fedadagrad": {"eta": POSITIVE, "eta_l": POSITIVE, "tau": POSITIVE},
    "fedprox": {"proximal_mu": {"at_least": 0}},
}


def settings_from_overrides(overrides: Sequence[str]) -> SimulationSettings:
    """The settings of ``fedveil simulate`` followed by these Hydra overrides.

    Raises:
        Refusal: one sentence for each mistake.
    """
    from .compose import compose_overrides, settings_of

    return settings_of(compose_overrides(overrides))


def from_config(cfg: DictConfig) -> SimulationSettings:
    """Read a composed configuration (without Hydra's own node) by type, unit and range.

    Raises:
        Mistakes: a Refusal that holds one sentence for each mistake.
    """
    root, source = read_root(cfg)
    shared = read_federation(root, source)
    settings = replace(
        shared,
        partition=_partition(root.section("partition")),
        engine=_engine(root.section("engine")),
        faults=_faults(root.section("faults")),
        seed=root.optional_whole("seed", at_least=0, at_most=MAX_SEED),
        resume=root.optional_text("resume"),
    )
    finish(root)
    return settings


def finish(root: Section) -> None:
    """Refuse what nobody has read, and every mistake that was noted."""
    root.done()
    if root.mistakes:
        raise Mistakes(root.mistakes)


def read_federation(root: Section, source: str) -> SimulationSettings:
    """Read what a simulation and a server have in common; nothing is simulated in it."""
    allowed = root.names("allow_modules")
    ledger = root.section("ledger")
    privacy = read_privacy(root.section("privacy", PRIVACIES))
    cohort = _cohort(root.section("cohort"))
    settings = SimulationSettings(
        task=_task(root.section("task"), allowed),
        partition=PartitionSettings("natural"),
        cohort=cohort,
        strategy=_strategy(root.section("strategy"), allowed),
        engine=EngineSettings("inprocess", math.inf),
        privacy=privacy,
        secagg=read_secagg(root.section("secagg"), privacy),
        faults=FaultSettings(0.0, 0.0, 0.0, 0.0),
        audit=read_audit(root.section("audit"), privacy, cohort.by_turns),
        num_rounds=root.whole("num_rounds", at_least=1, at_most=MAX_ROUNDS),
        seed=None,
        training=_local_training(root),
        checkpoint_every=root.whole("checkpoint_every", at_least=1, at_most=MAX_ROUNDS),
        resume=None,
        ledger_dir=ledger.optional_text("dir"),
        allow_modules=allowed,
        source=source,
    )
    ledger.done()
    return settings


def _local_training(root: Section) -> LocalTraining:
    values: dict[str, Any] = {}
    for name in TOLD:
        kind, bounds, _ = RULES[name]
        if kind is int:
            values[name] = root.whole(name, at_least=int(bounds.ge or 0), at_most=int(bounds.le or 0))
        else:
            values[name] = root.real(name, above=-math.inf if bounds.gt is None else bounds.gt)
    return LocalTraining() if root.mistakes else LocalTraining(**values)


def read_root(cfg: DictConfig) -> tuple[Section, str]:
    """The whole configuration as a section, and its source. Mistakes when a value is missing or cannot be resolved."""
    shown = OmegaConf.to_container(cfg, resolve=False)
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise Mistakes([Refusal(key, "???", "must be given a value") for key in missing])
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error.msg).splitlines()[0]
        raise Mistakes([Refusal(str(error.full_key), "${...}", f"cannot be resolved: {reason}")]) from None
    if not isinstance(values, dict) or not isinstance(shown, dict):
        raise Mistakes([Refusal("config", "a list", "must be a group of keys")])
    mistakes = [
        Refusal(
            path, "...", "classes are not named here; use a registered name, or name=custom with 'target'"
        )
        for path in _targets(values, "")
    ]
    return Section(_named(values), _named(shown), "", mistakes), OmegaConf.to_yaml(cfg, resolve=False)


def _named(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}


def _targets(node: object, path: str) -> list[str]:
    """Where Hydra's ``_target_`` stands: nothing here instantiates by it, and nobody should believe so."""
    if isinstance(node, list):
        return [found for index, value in enumerate(node) for found in _targets(value, f"{path}[{index}]")]
    if not isinstance(node, dict):
        return []
    found: list[str] = []
    for key, value in node.items():
        here = f"{path}.{key}" if path else str(key)
        found += [here] if key == "_target_" else _targets(value, here)
    return found


def _task(section: Section, allowed: Sequence[str]) -> TaskSettings:
    name = section.option(TASKS)
    settings = TaskSettings(
        name=name,
        target=section.target("target", allowed) if name == "custom" else None,
        num_clients=section.optional_whole("num_clients", at_least=1, at_most=MAX_CLIENTS),
        options=_task_options(name, section),
    )
    # What suits the task; the keys of the same name take these values unless they are given others.
    for key in ("learning_rate", "dp_sgd_learning_rate", "clipping_norm"):
        section.real(key, above=0)
    section.whole("local_epochs", at_least=1, at_most=MAX_EPOCHS)
    section.done()
    return settings


def _task_options(name: str, section: Section) -> dict[str, Parameter]:
    if name == "shakespeare":
        return {"secrets": section.whole("secrets", at_least=0, at_most=MAX_SECRETS)}
    if name == "sentences":
        folder = section.optional_text("folder")
        return {} if folder is None else {"folder": folder}
    return {}


def _partition(section: Section) -> PartitionSettings:
    name = section.option(("natural", "iid", "dirichlet", "shards"))
    settings = PartitionSettings(
        name=name,
        alpha=section.real("alpha", above=0) if name == "dirichlet" else None,
    )
    section.done()
    return settings


def _cohort(section: Section) -> CohortSettings:
    name = section.option(("poisson", "fixed", "min_separation", "all"))
    # An option of a user's own may lack it.
    invites = name in ("poisson", "fixed") and section.given("over_selection")
    sized, separated = name in ("fixed", "min_separation"), name == "min_separation"
    rounds: Range = {"at_least": 1, "at_most": MAX_ROUNDS}
    settings = CohortSettings(
        name=name,
        rate=section.real("rate", above=0, at_most=1) if name == "poisson" else None,
        over_selection=section.optional_real("over_selection", at_least=1) if invites else None,
        size=section.whole("size", at_least=1, at_most=MAX_CLIENTS) if sized else None,
        separation=section.optional_whole("separation", **rounds) if separated else None,
        max_participations=section.optional_whole("max_participations", **rounds) if separated else None,
    )
    section.done()
    return settings


def _strategy(section: Section, allowed: Sequence[str]) -> StrategySettings:
    name = section.option((*STRATEGIES, "custom"))
    parameters: dict[str, Parameter] = {}
    target = None
    if name == "custom":
        target = section.target("target", allowed)
        parameters = section.parameters("parameters")
    for key, bounds in STRATEGIES.get(name, {}).items():
        parameters[key] = section.real(key, **bounds)
    section.done()
    return StrategySettings(name=name, target=target, parameters=parameters)


def _engine(section: Section) -> EngineSettings:
    name = section.option(("inprocess", "ray"))
    deadline = section.real("deadline", above=0)
    if name == "ray":
        settings = EngineSettings(
            name=name,
            deadline=deadline,
            address=section.optional_text("address"),
            num_cpus=section.optional_real("num_cpus", above=0),
        )
    else:
        workers = section.whole("workers", at_least=1, at_most=MAX_WORKERS)
        settings = EngineSettings(name=name, deadline=deadline, workers=workers)
    section.done()
    return settings


def _faults(section: Section) -> FaultSettings:
    settings = FaultSettings(
        dropout=section.real("dropout", at_least=0, at_most=1),
        failure=section.real("failure", at_least=0, at_most=1),
        straggler=section.real("straggler", at_least=0, at_most=1),
        corrupt=section.real("corrupt", at_least=0, at_most=1),
    )
    section.done()
    return settings
