"""The audit group of a composed configuration, read strictly."""

from .schema import AuditSettings, PrivacySettings, client_level
from .strict import Section

AUDITS = ("full", "light", "off")
ACTIONS = ("stop", "pause", "raise_noise", "rollback", "note")
MAX_CANARIES = 1_000_000
MAX_LOOKS = 1_000
MAX_SUPPORT = 1_000_000_000
LARGEST_ALPHA = 0.2


def read_audit(section: Section, privacy: PrivacySettings, by_turns: bool) -> AuditSettings | None:
    """Read the group; `by_turns` says whether the cohort's clients come so."""
    name = section.option(AUDITS)
    if name not in ("light", "full"):
        section.done()
        return None
    full = name == "full"
    settings = AuditSettings(
        name=name,
        on_alarm=_action(section, privacy, by_turns),
        alpha=section.real("alpha", above=0, at_most=LARGEST_ALPHA),
        canaries=section.optional_whole("canaries", at_least=0, at_most=MAX_CANARIES) if full else None,
        looks=section.whole("looks", at_least=1, at_most=MAX_LOOKS) if full else 0,
        support=section.optional_whole("support", at_least=2, at_most=MAX_SUPPORT) if full else None,
        loss_traces=section.flag("loss_traces") if full else False,
    )
    client = client_level(privacy)
    if client is None:
        if settings.canaries:
            section.refuse(
                "canaries", "test the claim of client-level privacy, and there is none; leave it null"
            )
    elif full and client.clipping == "adaptive" and settings.canaries != 0:
        remedy = "canaries are longer than any norm and would pull one that adapts; use privacy.clipping=fixed, or 0"
        section.refuse("canaries", remedy)
    section.done()
    return settings


def _action(section: Section, privacy: PrivacySettings, by_turns: bool) -> str:
    action = section.word("on_alarm", (*ACTIONS, "drop_client"))
    if action == "drop_client":
        section.refuse(
            "on_alarm", "no check of a sum names a client; use stop, pause, raise_noise or rollback"
        )
    if action != "raise_noise":
        return action
    if client_level(privacy) is None:
        section.refuse("on_alarm", "no noise is added to this sum; use stop, pause or rollback")
    elif by_turns:
        section.refuse(
            "on_alarm", "the whole run is one release, its noise is fixed; use stop, pause or rollback"
        )
    return action
