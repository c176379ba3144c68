"""The privacy group of a composed configuration, and the aggregation that goes with it, read strictly."""

from dataclasses import replace
from typing import TypeVar

from ..privacy.budget import Adjacency
from ..privacy.secagg.suite import SUITES
from ..privacy.secagg.transcript import Profile
from .schema import (
    ClientCentral,
    ClientDistributed,
    NoPrivacy,
    PrivacySettings,
    Record,
    RecordAndClient,
    SecaggSettings,
)
from .strict import Section

MAX_BANDS = 128  # rows of noise that a server keeps in memory
MOST_METRICS_SHARE = 0.9  # beside a clipping bit, which takes at most a tenth
FIXED_OR_ADAPTIVE = ("fixed", "adaptive")
PRIVACIES = ("client_central", "client_distributed", "none", "record", "record_and_client")
GRADIENTS = ("auto", "hooks", "ghost", "book_keeping")
Client = TypeVar("Client", bound=ClientCentral)


def read_privacy(section: Section) -> PrivacySettings:
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
    settings = replace(
        _client(ClientCentral, section),
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
    settings = _client(ClientDistributed, section)
    if settings.adjacency is Adjacency.ADD_OR_REMOVE_ONE:
        section.refuse("adjacency", "the server sees how many clients there are; use zero-out or replace-one")
    section.done()
    return settings


def _client(kind: type[Client], section: Section) -> Client:
    target_epsilon, noise_multiplier = _noise(section)
    return kind(
        target_epsilon=target_epsilon,
        target_delta=section.real("target_delta", above=0, below=1),
        noise_multiplier=noise_multiplier,
        adjacency=_adjacency(section),
        allow_large_delta=section.flag("allow_large_delta"),
        clipping_norm=section.real("clipping_norm", above=0),
        metrics_share=section.optional_real("metrics_share", at_least=0, below=1),
    )


def read_secagg(section: Section, privacy: PrivacySettings) -> SecaggSettings | None:
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
        suite=section.whole("suite", at_least=min(SUITES), at_most=max(SUITES)),
    )
    if settings.suite not in SUITES:
        section.refuse("suite", f"choose from {', '.join(map(str, SUITES))}")
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
    if settings.clipping == "adaptive" and (settings.metrics_share or 0) >= MOST_METRICS_SHARE:
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
