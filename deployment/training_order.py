"""From a federation to what its server asks of every client in a round."""

from __future__ import annotations

from ..configs.schema import (
    ClientCentral,
    ClientDistributed,
    NoPrivacy,
    PrivacySettings,
    Record,
    RecordAndClient,
)
from ..server.run.federation import Federation, Run
from ..strategies.cohorts import likely_participations
from ..strategies.training_order import ORDER_KEY, ClientClaim, Mode, RecordOrder, TrainingOrder

MODES: dict[type[PrivacySettings], Mode] = {
    NoPrivacy: Mode.NONE,
    Record: Mode.RECORD,
    RecordAndClient: Mode.RECORD_AND_CLIENT,
    ClientCentral: Mode.CLIENT_CENTRAL,
    ClientDistributed: Mode.CLIENT_DISTRIBUTED,
}


def order_of(run: Run) -> dict[str, str]:
    """Return what travels in the strategy's configuration: the same in every round of a process."""
    s = run.federation.settings
    order = TrainingOrder(
        run=run.name,
        privacy=MODES[type(s.privacy)],
        training=s.training,
        client=_claim(run),
        record=_record(run.federation),
    )
    return {ORDER_KEY: order.to_json()}


def _claim(run: Run) -> ClientClaim | None:
    if run.privacy is None:
        return None
    plan = run.privacy.plan
    assert plan.noise_multiplier is not None
    # What a round adds. Where clients come by turns, the plan's own figure is that of all of a client's rounds together.
    return ClientClaim(plan.noise_multiplier * plan.mechanism.sensitivity, plan.adjacency)


def _record(federation: Federation) -> RecordOrder | None:
    record = federation.record
    if record is None:
        return None
    assert record.target_epsilon is not None
    rounds = likely_participations(federation.cohort, federation.num_clients, federation.settings.num_rounds)
    return RecordOrder(
        record.target_epsilon,
        record.target_delta,
        record.max_grad_norm,
        record.adjacency,
        rounds,
        record.gradients,
    )
