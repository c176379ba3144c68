"""Allowance of a federation's owners: the budget of their policies as provisioned, held against what is spent already.

A server knows the ledgers that it keeps, and what its runs asked for. What each device has spent is on its own ledger,
and comes back as a code only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..configs.schema import Record, RecordAndClient, ServerSettings, SumLevel
from ..links.server_bundle import OwnersBudget, ServerBundle
from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.renyi_filter import counted
from ..privacy.budget import Unit
from ..privacy.ledger.book import read_book
from ..privacy.ledger.caps import NAMED, POPULATION, RECORDS
from ..privacy.plan import LEAST_SHARE_LEFT
from ..privacy.refusal import Refusal
from ..server.run.federation import Federation
from ..strategies.training_order import Mode

# Groups of targets; the modes that are not here have one, without a name.
LEVELS: Mapping[str, tuple[str, ...]] = {Mode.NONE: (), Mode.RECORD_AND_CLIENT: ("record", "client")}


def allowed_targets(
    bundle: ServerBundle, overrides: Sequence[str], begun: ServerSettings | None = None
) -> list[str]:
    """Return overrides that set the targets which a command leaves out: to what owners allow, or as the run began.

    Args:
      bundle: the server's; one of an earlier release does not say what owners allow, and sets nothing.
      overrides: Hydra's flags and overrides; a configuration file of the user's own is left alone.
      begun: settings of a run that is to be resumed.
    """
    if any(each.startswith("--config") for each in overrides):
        return []
    named = {each.partition("=")[0].lstrip("+~"): each.partition("=")[2] for each in overrides}
    mode = named.get("privacy", str(Mode.RECORD))
    found: list[str] = []
    for level in LEVELS.get(mode, ("",)):
        source = bundle.allowed
        if begun is not None:
            if begun.privacy.name != mode:
                return []
            source = getattr(begun.privacy, level) if level else begun.privacy
        for key in ("target_epsilon", "target_delta") if source is not None else ():
            path, value = ".".join(filter(None, ("privacy", level, key))), getattr(source, key)
            if path not in named:
                found.append(f"{path}={'null' if value is None else value}")
    return found


def begins_from(
    federation: Federation,
    allowed: OwnersBudget | None,
    earlier: Iterable[tuple[str, ServerSettings]],
    least: float = LEAST_SHARE_LEFT,
) -> str:
    """Return one line of what was spent before a run or question, its target, and what owners allow.

    It is empty if nothing was spent, and owners allow the target.

    Args:
      federation: whose ledger is looked at.
      allowed: by the owners; None if unknown.
      earlier: names and settings of the finished runs on this server.
      least: share of the target that must be left.

    Raises:
      Refusal: no more than that is left of the target.
    """
    level = federation.summed or federation.record
    if level is None or level.target_epsilon is None:
        return ""
    unit, target, budget = f"{level.unit.partition('_')[0]}s", level.target_epsilon, federation.sum_budget
    owners = "" if allowed is None else f"owners allow {allowed.target_epsilon:g}"
    spent = _spent(federation, level)
    if budget is not None and budget.target_epsilon == target and spent > (1 - least) * target:
        told = (f"{unit} have spent {spent:.4g}", owners, _remedy(spent, allowed))
        raise Refusal("privacy.target_epsilon", target, "; ".join(filter(None, told)))
    before = f"{unit} have spent epsilon {spent:.4g} before; " if spent else ""
    asked = {name: size for name, each in earlier if (size := _of_own_ledgers(each)) is not None}
    run = max(asked, key=asked.__getitem__, default="")
    if run and level.unit != Unit.CLIENT and asked[run] > spent:
        spent = asked[run]
        before = f"run {run} let each client spend epsilon {spent:g} on its records before; "
    if not before and (allowed is None or target <= allowed.target_epsilon):
        return ""
    line = before + ", ".join(filter(None, (f"the target is {target:g}", owners)))
    over = budget is None and spent > (1 - least) * target
    return f"{line}: clients that have spent it decline; {_remedy(spent, allowed)}" if over else line


def _remedy(spent: float, allowed: OwnersBudget | None) -> str:
    if allowed is not None and spent > (1 - LEAST_SHARE_LEFT) * allowed.target_epsilon:
        return "nothing is left unless owners raise target_epsilon in their policy.toml"
    return f"give a target above {spent:.4g}"


def _spent(federation: Federation, level: SumLevel | Record) -> float:
    """Return the epsilon of the unit on this server's ledger; 0 if it was begun otherwise, and is refused later."""
    assert federation.deployed is not None
    prefix = POPULATION if level.unit == Unit.CLIENT else POPULATION + RECORDS
    path = federation.deployed.ledgers / f"{prefix}{federation.owner[:NAMED]}.ledger"
    book = read_book(path) if path.exists() else None
    if book is None or book.identity.get("adjacency") != str(level.adjacency):
        return 0.0
    order, delta = book.filter_order, level.target_delta
    found = (counted(book.events(who), delta, level.adjacency, order, GATE_INTERVAL) for who in book.spent)
    return max(found, default=0.0)


def _of_own_ledgers(settings: ServerSettings) -> float | None:
    """Return what a run let each client spend on its own ledger of records; None if the server's ledger holds it."""
    privacy = settings.privacy.record if isinstance(settings.privacy, RecordAndClient) else settings.privacy
    return privacy.target_epsilon if isinstance(privacy, Record) else None
