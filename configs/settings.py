"""From a composed configuration to frozen settings, or one sentence for each mistake in it."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..privacy.budget import Adjacency
from ..privacy.refusal import Refusal
from ..privacy.secagg.transcript import Profile
from .checks import check_cohort, check_delta, check_seed
from .reader import Mistakes, Section
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
MAX_BATCH = 1_000_000
MAX_EPOCHS = 10_000
MAX_BANDS = 128  # rows of noise that a server keeps in memory

TASKS = ("mnist5k", "digits", "heart", "fashion_mnist", "custom")
MOST_METRICS_SHARE = 0.9  # beside a clipping bit, which takes at most a tenth
FIXED_OR_ADAPTIVE = ("fixed", "adaptive")
PRIVACIES = ("client_central", "client_distributed", "none", "record", "record_and_client")
GRADIENTS = ("auto", "hooks", "ghost", "book_keeping")


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
    root, source = _root(cfg)
    allowed = root.names("allow_modules")
    ledger = root.section("ledger")
    privacy = _privacy(root.section("privacy", PRIVACIES))
    settings = SimulationSettings(
        task=_task(root.section("task"), allowed),
        partition=_partition(root.section("partition")),
        cohort=_cohort(root.section("cohort")),
        strategy=_strategy(root.section("strategy"), allowed),
        engine=_engine(root.section("engine")),
        privacy=privacy,
        secagg=_secagg(root.section("secagg"), privacy),
        faults=_faults(root.section("faults")),
        num_rounds=root.whole("num_rounds", at_least=1, at_most=MAX_ROUNDS),
        seed=root.optional_whole("seed", at_least=0, at_most=MAX_SEED),
        local_epochs=root.whole("local_epochs", at_least=1, at_most=MAX_EPOCHS),
        batch_size=root.whole("batch_size", at_least=1, at_most=MAX_BATCH),
        learning_rate=root.real("learning_rate", above=0),
        checkpoint_every=root.whole("checkpoint_every", at_least=1, at_most=MAX_ROUNDS),
        resume=root.optional_text("resume"),
        ledger_dir=ledger.optional_text("dir"),
        allow_modules=allowed,
        source=source,
    )
    ledger.done()
    root.done()
    if root.mistakes:
        raise Mistakes(root.mistakes)
    return settings


def _root(cfg: DictConfig) -> tuple[Section, str]:
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
    )
    # What suits the task; the keys of the same name take these values unless they are given others.
    for key in ("learning_rate", "dp_sgd_learning_rate", "clipping_norm"):
        section.real(key, above=0)
    section.whole("local_epochs", at_least=1, at_most=MAX_EPOCHS)
    section.done()
    return settings


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
    sized, separated = name in ("fixed", "min_separation"), name == "min_separation"
    rounds: Range = {"at_least": 1, "at_most": MAX_ROUNDS}
    settings = CohortSettings(
        name=name,
        rate=section.real("rate", above=0, at_most=1) if name == "poisson" else None,
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


def _privacy(section: Section) -> PrivacySettings:
    match section.option(PRIVACIES):
        case "client_central":
            return _client_central(section)
        case "client_distributed":
            return _client_distributed(section)
        case "record":
            return _record(section)
        case "record_and_client":
            both = RecordAndClient(
                record=_record(section.section("record")), client=_client_central(section.section("client"))
            )
            if both.client.noise_schedule == "adaptive":
                remedy = (
                    "goes by the clients' loss, which stays at home beside record-level privacy; use fixed"
                )
                section.section("client").refuse("noise_schedule", remedy)
            section.done()
            return both
        case "none":
            section.done()
            return NoPrivacy()
        case _:
            return NoPrivacy()


def _client_central(section: Section) -> ClientCentral:
    target_epsilon, noise_multiplier = _noise(section)
    settings = ClientCentral(
        target_epsilon=target_epsilon,
        target_delta=section.real("target_delta", above=0, below=1),
        noise_multiplier=noise_multiplier,
        adjacency=_adjacency(section),
        allow_large_delta=section.flag("allow_large_delta"),
        clipping_norm=section.real("clipping_norm", above=0),
        metrics_share=section.real("metrics_share", at_least=0, below=1),
        clipping=section.word("clipping", FIXED_OR_ADAPTIVE),
        clipping_quantile=section.real("clipping_quantile", above=0, below=1),
        clipping_learning_rate=section.real("clipping_learning_rate", above=0),
        noise_schedule=section.word("noise_schedule", FIXED_OR_ADAPTIVE),
        noise=section.word("noise", ("independent", "correlated")),
        bands=section.optional_whole("bands", at_least=1, at_most=MAX_BANDS),
    )
    _check_adaptive(section, settings)
    if settings.bands is not None and settings.noise != "correlated":
        section.refuse("bands", "belongs to privacy.noise=correlated; leave it null")
    section.done()
    return settings


def _client_distributed(section: Section) -> ClientDistributed:
    target_epsilon, noise_multiplier = _noise(section)
    settings = ClientDistributed(
        target_epsilon=target_epsilon,
        target_delta=section.real("target_delta", above=0, below=1),
        noise_multiplier=noise_multiplier,
        adjacency=_adjacency(section),
        allow_large_delta=section.flag("allow_large_delta"),
        clipping_norm=section.real("clipping_norm", above=0),
        metrics_share=section.real("metrics_share", at_least=0, below=1),
        clipping="fixed",
        clipping_quantile=0.5,
        clipping_learning_rate=0.2,
        noise_schedule="fixed",
        noise="independent",
        bands=None,
    )
    if settings.adjacency is Adjacency.ADD_OR_REMOVE_ONE:
        section.refuse("adjacency", "the server sees how many clients there are; use zero-out or replace-one")
    section.done()
    return settings


def _secagg(section: Section, privacy: PrivacySettings) -> SecaggSettings | None:
    name, distributed = section.option(("auto", "masked", "none")), isinstance(privacy, ClientDistributed)
    if name == "none":
        if distributed:
            section.refuse(
                "name", "a single vector has but one share of the noise; mask it, or use client_central"
            )
        section.done()
        return None
    settings = SecaggSettings(
        profile=section.word("profile", [str(each) for each in Profile]),
        bits=section.optional_whole("bits", at_least=16, at_most=32),
        dropout=section.real("dropout", at_least=0, below=1),
        collusion=section.real("collusion", at_least=0, below=1),
        clipping_norm=section.real("clipping_norm", above=0),
    )
    if settings.bits not in (None, 16, 32):
        section.refuse("bits", "must be 16, 32 or null")
    if name == "masked" and not distributed and isinstance(privacy, ClientCentral | RecordAndClient):
        section.refuse(
            "name",
            "a server that adds the noise sees the exact sum and must be trusted; privacy=client_distributed "
            "hides that, too",
        )
    section.done()
    return settings if distributed or name == "masked" else None


def _check_adaptive(section: Section, settings: ClientCentral) -> None:
    if settings.clipping == "adaptive" and settings.metrics_share >= MOST_METRICS_SHARE:
        section.refuse(
            "metrics_share", f"must be below {MOST_METRICS_SHARE:g} beside privacy.clipping=adaptive"
        )
    if settings.noise_schedule != "adaptive":
        return
    if settings.target_epsilon is None:
        section.refuse("target_epsilon", "is what privacy.noise_schedule=adaptive promises; give one")
    if settings.noise_multiplier is not None:
        section.refuse("noise_multiplier", "leave it null: privacy.noise_schedule=adaptive chooses the noise")
    if settings.metrics_share == 0:
        section.refuse(
            "metrics_share", "give some: privacy.noise_schedule=adaptive goes by the clients' loss"
        )


def _record(section: Section) -> Record:
    target_epsilon, noise_multiplier = _noise(section)
    settings = Record(
        target_epsilon=target_epsilon,
        target_delta=section.real("target_delta", above=0, below=1),
        noise_multiplier=noise_multiplier,
        adjacency=_adjacency(section),
        allow_large_delta=section.flag("allow_large_delta"),
        max_grad_norm=section.real("max_grad_norm", above=0),
        gradients=section.word("gradients", GRADIENTS),
    )
    section.done()
    return settings


def _noise(section: Section) -> tuple[float | None, float | None]:
    target_epsilon = section.optional_real("target_epsilon", above=0)
    noise_multiplier = section.optional_real(
        "noise_multiplier", above=0, hint="; without noise it is privacy=none"
    )
    if target_epsilon is None and noise_multiplier is None:
        section.refuse("target_epsilon", "give a budget or a noise_multiplier, or say privacy=none")
    return target_epsilon, noise_multiplier


def _adjacency(section: Section) -> Adjacency:
    return Adjacency(section.word("adjacency", [str(each) for each in Adjacency]) or Adjacency.ZERO_OUT)
