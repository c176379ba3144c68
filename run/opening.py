"""Opening of a prepared run: its population's ledger, the plan of its sums, its folder, and what is written there first."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from ..base.durable_files import make_folder
from ..base.refusal import Refusal
from ..modes.federation import Federation
from ..privacy.budget import Adversary, Budget
from ..privacy.ledger.hash_chain import exclusive_lock
from ..privacy.ledger.ledger import Head, Ledger, LedgerUnavailable
from ..privacy.plan import Plan, Unaffordable
from ..server import noise_key
from ..server.round_terms import SumPrivacy
from .acts import require_use, write_acts
from .observer import Observer, begin
from .origin import origin_of
from .prepared_run import Run
from .queries import later_events, queries_of
from .saved import write_start
from .sum_plan import plan_of_rest, sum_plan, sum_plan_with


@contextmanager
def opened(run: Run, ask: Callable[[Run], Run]) -> Generator[tuple[Run, Observer]]:
    """Open the population's ledger, if clients are protected, and the run folder; refuse before either is written.

    Args:
      run: as `prepare` returned it; nothing is written yet.
      ask: asks the clients of a new run the queries that precede the first round, and returns the run with their answers.

    Yields:
      The run with the protection of its sums, and its observer.

    Raises:
      Refusal: a folder or the ledger cannot be opened, or the remaining budget affords no round.
    """
    federation, setting = run.federation, run.federation.population.words.folder
    run.client_ledgers.make_folder()
    budget = federation.mode.budget
    if budget is None:
        make_folder(setting, run.folder)
        with exclusive_lock(run.folder / "run", setting):  # no ledger keeps others out
            yield _started(ask(run))
        return
    planned = None
    if federation.simulated:  # planned as for an empty ledger, and before its folder is made
        planned = _planned(run, None)
        if not run.resumed:
            require_use(federation, planned[0])
    ledger = open_ledger(federation, run.folder, budget, run.checkpoint.head)
    ledger.purpose, ledger.origin = federation.settings.purpose, origin_of(federation)
    try:
        plan, spent = planned or _planned(run, ledger)
        privacy = _privacy(run, ledger, budget, plan)
        make_folder(setting, run.folder)
        privacy = replace(privacy, noise_key=_noise_key(run))
        write_acts(run, ledger)
        run = ask(_with_least_noise(replace(run, privacy=privacy, spent=run.spent or spent), privacy.plan))
        yield _started(replace(run, privacy=replace(privacy, units=run.federation.mode.units)))
    finally:
        close_ledger(federation, ledger)


def _started(run: Run) -> tuple[Run, Observer]:
    """Write what a run leaves before its first round, and return it with its observer."""
    run, observer = begin(run)
    run.client_ledgers.settle()
    claim_records(run.federation)  # last, since the claim of a refused run is not withdrawn
    write_start(run)
    return run, observer


def lock_records(federation: Federation) -> AbstractContextManager[None]:
    """Return a lock that keeps other runs and questions from charging the ledgers of these data; none if nothing is charged."""
    return federation.population.exclusive_lock() if federation.mode.spends else nullcontext()


def claim_records(federation: Federation) -> None:
    """Record which mode charges real records on this machine; of two that begin at the same time one is refused."""
    if federation.mode.charges_records:
        federation.population.claim_mode(federation.mode.charges_records)


def open_ledger(federation: Federation, folder: Path, budget: Budget, expect: Head | None = None) -> Ledger:
    """Return the population's ledger, open for writing; its people's losses elsewhere are charged first.

    A simulation has its ledger in the run's folder. The ledger must contain the expected entry.

    Raises:
      Refusal: its folder cannot be created, or it cannot be opened.
    """
    path, population = federation.mode.ledger_path(folder), federation.population
    make_folder(population.words.ledgers, path.parent)
    population.settle_sums(path, budget)
    ledger = Ledger.open(path, budget, owner=population.owner, simulated=population.simulated, expect=expect)
    try:
        population.share(ledger, budget)
        return ledger
    except BaseException:
        ledger.close()
        raise


def close_ledger(federation: Federation, ledger: Ledger) -> None:
    """Close the ledger of `open_ledger`; on real data of this machine its head is stored, to hold a later one to it."""
    with suppress(LedgerUnavailable):  # only notes are lost: the reservation stays spent
        ledger.close()
    federation.population.keep_head(ledger)


def _planned(run: Run, ledger: Ledger | None) -> tuple[Plan, str]:
    """Return the plan of the sums, and why the remaining rounds of a resumed run cannot be paid; empty where they can.

    A resumed run keeps its noise if all rounds are one release, no round is left, or there is no `ledger`, as in a
    simulation; near the end of a budget `plan_of_rest` decides. Else it is the least for what the budget has left.
    """
    federation, saved = run.federation, run.saved
    rounds = federation.settings.rounds_left(run.checkpoint.state.round)
    if saved.noise is not None and (ledger is None or rounds <= 0 or federation.mode.mechanism.rows):
        return sum_plan_with(federation, saved.noise, saved.filter_order), ""
    prior = (*ledger.events(Adversary.MODEL), *federation.mode.sums_before()) if ledger else ()
    try:
        plan = sum_plan(federation, prior, rounds, ledger.filter_order if ledger else None)
    except Unaffordable as refusal:
        if saved.noise is None:
            raise
        first = sum_plan_with(federation, saved.noise, saved.filter_order)
        rest = plan_of_rest(federation, first, prior, rounds)
        return (rest, "") if rest is not None else (first, str(refusal))
    assert plan is not None and federation.mode.budget is not None
    if not run.resumed:
        plan.require_one_round(federation.mode.budget, prior)
    return plan, ""


def _privacy(run: Run, ledger: Ledger, budget: Budget, plan: Plan) -> SumPrivacy:
    """Return the protection of the sums by a plan; refuse, or add noise, if it costs records more than they may lose."""
    mode = run.federation.mode
    if not run.resumed and not mode.sum_source:
        for shared in ledger.shared:
            from ..server.records_plan import within_records  # of real data alone

            target = None if mode.promises[0].noise_multiplier is not None else budget
            plan = within_records(plan, shared, target, "privacy", later_events(run.federation))
    if run.federation.simulated:  # a resumed simulation plans all of its rounds again
        source, adaptation = None, mode.adaptation(plan, (), 0)
    else:
        prior = tuple(ledger.events(Adversary.MODEL))
        source, adaptation = mode.sum_source, mode.adaptation(plan, prior, run.checkpoint.state.round)
    return SumPrivacy(plan, ledger, mode.metrics_share(plan), adaptation, units=mode.units, source=source)


def _noise_key(run: Run) -> bytes | None:
    """Return the key of correlated noise, which lies on disk before the first round; None for other noise or by a seed."""
    federation, folder = run.federation, run.folder
    if federation.mode.mechanism.rows is None or federation.seed is not None:
        return None
    if not run.resumed:
        try:
            return noise_key.make(folder)
        except OSError as problem:
            remedy = f"no key can be kept there ({problem.strerror}); choose another"
            raise Refusal(federation.population.words.folder, str(folder), remedy) from problem
    is_finished = run.checkpoint.state.round >= federation.settings.steps
    key = b"" if is_finished else noise_key.read(folder)  # erased when the run was closed
    if key and run.saved.places not in (None, federation.population.position_digest(key)):
        remedy = "started with other tables or another order, which the clients' turns depend on; restore it, or start a new run"
        raise Refusal("resume", str(folder), remedy)
    return key


def _with_least_noise(run: Run, plan: Plan) -> Run:
    """Return the run whose simulated clients refuse encrypted sums with less noise than its rounds and queries have."""
    encryption = run.client.encryption
    if encryption is None:
        return run
    queries = queries_of(run.federation.settings)
    plans = (plan, *(other for query in queries for other in query.plans(run.federation, run.name)))
    encryption = replace(encryption, minimum_noise_multiplier=min(each.noise_over_clip for each in plans))
    return replace(run, client=replace(run.client, encryption=encryption))
