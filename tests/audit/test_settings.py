"""The audit group: what goes with what, and one sentence for what does not."""

import pytest

from fedveil.audit.settings import FullAudit, LightAudit, NoAudit, audit_of
from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides


def test_light_is_the_default_and_off_is_nothing() -> None:
    light = audit_of(settings_from_overrides([]))
    assert isinstance(light, LightAudit) and light.on_alarm == "stop"
    assert isinstance(settings_from_overrides(["audit=off"]).audit_group, NoAudit)
    full = audit_of(settings_from_overrides(["audit=full", "audit.canaries=7", "audit.looks=3"]))
    assert isinstance(full, FullAudit) and (full.canaries, full.looks) == (7, 3)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["audit.on_alarm=drop_client"],
            "must be one of stop, pause, raise_noise, rollback, note; no check of a sum names a client",
        ),
        (["audit.on_alarm=raise_noise", "privacy=none"], "no noise is added to this sum"),
        (
            ["audit.on_alarm=raise_noise", "cohort=min_separation", "privacy.noise=correlated"],
            "rounds are one release together",
        ),
        (["audit=full", "audit.canaries=10", "privacy=record"], "test the claim of client-level privacy"),
        (["audit=full", "privacy.clipping=adaptive"], "would raise an adaptive one"),
        (["audit.canaries=10"], "canaries"),
        (["audit=full", "audit.alpha=0"], "must be above 0"),
        (["audit.on_alarm=shout"], "must be one of"),
    ],
)
def test_conflicting_settings_are_refused_in_a_sentence(overrides: list[str], said: str) -> None:
    with pytest.raises(Refusal, match=said):
        settings_from_overrides(overrides)
