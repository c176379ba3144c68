"""An owner's policy, and the terms that it accepts and refuses by name."""

from dataclasses import fields, replace

import pytest

from fedveil.base.refusal import Refusal
from fedveil.privacy.secagg.graph import smallest_shape
from fedveil.privacy.secagg.policy import Policy, check
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.suite import SUITES
from fedveil.privacy.secagg.transcript import (
    PROTOCOL_VERSION,
    AttemptTerms,
    Profile,
    setup_context,
)

POLICY = Policy(
    authority=b"a" * 32,
    minimum_roster_version=5,
    minimum_cohort=30,
    collusion=0.1,
    dropout=0.2,
    maximum_clipping_norm=1.0,
    minimum_noise_multiplier=0.8,
)


TERMS = AttemptTerms(
    protocol_version=PROTOCOL_VERSION,
    suite=1,
    run=2**64 - 1,
    round=4,
    attempt=0,
    roster_version=7,
    roster_hash=b"h" * 32,
    cohort_size=40,
    threshold=22,
    neighbours=39,
    bits=16,
    step=2**-10,
    clipping_norm=1.0,
    noise_multiplier=0.8,
    minimum_survivors=32,
    profile=Profile.MALICIOUS,
    task_hash=b"t" * 32,
)


CHANGES = {
    "protocol_version": 5,
    "suite": 4,
    "run": 1,
    "round": 5,
    "attempt": 1,
    "roster_version": 6,
    "roster_hash": b"r" * 32,
    "cohort_size": 41,
    "threshold": 23,
    "neighbours": 38,
    "bits": 32,
    "step": 2**-11,
    "clipping_norm": 0.5,
    "noise_multiplier": 0.9,
    "minimum_survivors": 33,
    "profile": Profile.SEMI_HONEST,
    "task_hash": b"u" * 32,
}


def test_the_setup_context_is_over_every_term() -> None:
    assert CHANGES.keys() == {field.name for field in fields(AttemptTerms)}
    contexts = {setup_context(replace(TERMS, **{name: value})) for name, value in CHANGES.items()}
    assert len(contexts | {setup_context(TERMS)}) == len(CHANGES) + 1


def test_terms_at_the_floors_are_accepted() -> None:
    check(POLICY, TERMS)
    check(replace(POLICY, profile=Profile.SEMI_HONEST), TERMS)
    check(replace(POLICY, minimum_cohort=2), replace(TERMS, minimum_survivors=6))
    check(POLICY, replace(TERMS, bits=32, suite=4, noise_multiplier=1.5, clipping_norm=0.1, threshold=30))


def test_sum_of_one_honest_client_is_refused_by_any_policy() -> None:
    # Of 40, four may collude: of five survivors, one may be honest.
    with pytest.raises(Refused, match="minimum_survivors"):
        check(replace(POLICY, minimum_cohort=2), replace(TERMS, minimum_survivors=5))


@pytest.mark.parametrize("clients", [30, 60, 200])
def test_computed_parameters_pass_and_a_lower_threshold_does_not(clients: int) -> None:
    shape = smallest_shape(clients, POLICY.dropout, POLICY.collusion, Profile.MALICIOUS)
    terms = replace(
        TERMS,
        cohort_size=clients,
        minimum_survivors=30,
        neighbours=shape.neighbours,
        threshold=shape.threshold,
    )
    check(POLICY, terms)
    with pytest.raises(Refused, match="threshold"):
        check(POLICY, replace(terms, threshold=shape.threshold - 1))


@pytest.mark.parametrize(("neighbours", "threshold"), [(39, 0), (39, 40), (38, 21)])
def test_a_shape_that_shares_nothing_or_too_little_is_refused(neighbours: int, threshold: int) -> None:
    with pytest.raises(Refused, match=r"neighbours|threshold"):
        check(POLICY, replace(TERMS, neighbours=neighbours, threshold=threshold))


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_version_three_is_spoken_where_it_promised_as_much(suite: int) -> None:
    policy = replace(POLICY, authority=POLICY.authority + bytes(32))
    check(policy, replace(TERMS, suite=suite))
    old = replace(TERMS, protocol_version=3, suite=suite)
    if suite in (1, 4):
        check(policy, old)
    else:
        with pytest.raises(
            Refused, match=rf"protocol_version=3 with suite={suite} is .* another release; install one"
        ):
            check(policy, old)


NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol_version", 0),
        ("protocol_version", 1),
        ("protocol_version", 2),
        ("protocol_version", 5),
        ("suite", 5),
        ("profile", Profile.SEMI_HONEST),
        ("roster_version", 4),
        ("bits", 8),
        ("step", 0.0),
        ("step", NAN),
        ("step", float("inf")),
        ("clipping_norm", 1.01),
        ("clipping_norm", 0.0),
        ("clipping_norm", NAN),
        ("noise_multiplier", 0.79),
        ("noise_multiplier", NAN),
        ("noise_multiplier", float("inf")),
        ("cohort_size", 10**6 + 1),
        ("minimum_survivors", 29),
        ("minimum_survivors", 41),
        ("threshold", 1),
        ("threshold", 21),
        ("neighbours", 40),
        ("neighbours", 37),
        ("neighbours", 2),
    ],
)
def test_terms_below_a_floor_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(Refused) as caught:
        check(POLICY, replace(TERMS, **{field: value}))
    assert caught.value.reason is Reason.POLICY
    assert caught.value.detail.split("=")[0] in (
        field,
        *("neighbours",) * (value == 40 or field == "threshold"),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("authority", b"short"),
        ("minimum_cohort", 1),
        ("collusion", 1.0),
        ("collusion", NAN),
        ("dropout", -0.1),
        ("maximum_clipping_norm", 0.0),
        ("minimum_noise_multiplier", -1.0),
        ("minimum_noise_multiplier", NAN),
        ("suites", (1, 5)),
    ],
)
def test_a_policy_that_protects_nothing_is_refused(field: str, value: object) -> None:
    with pytest.raises(Refusal) as caught:
        replace(POLICY, **{field: value})
    assert caught.value.field == field
