"""Preparation of a run: parts, plan and ledger before its first round; refusals come before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..base.durable_files import make_folder
from ..base.notice import warn
from ..base.refusal import Refusal
from ..modes.federation import Federation
from ..privacy.budget import Adversary, Budget
from ..privacy.ledger.caps import CapEnded
from ..privacy.ledger.hash_chain import exclusive_lock
from ..privacy.ledger.ledger import Head, Ledger, LedgerUnavailable
from ..privacy.plan import Plan, Unaffordable
from ..server import noise_key
from ..server.checkpoint import NO_CHECKPOINT, read
from ..server.records_plan import within_records
from ..server.round_terms import SumPrivacy
from ..strategies.registry import make_strategy
from ..tasks.arrays import check_base, dimension_of
from ..tasks.data import (
    Data,
    batches_of,
    check_data,
    check_size,
    check_taken,
    data_of,
    data_of_all,
    figures_of,
    held_out_of,
    run_on,
    text_of,
)
from ..tasks.hardware import check_made_here
from ..tasks.independence import check_independence
from ..tasks.own_scale import SAID, own_scale
from ..tasks.persons import names_of
from ..tasks.protocol import Task, check_trainable, own_training
from . import run_folder
from .acts import write_acts
from .client_instructions import client_settings
from .observer import Observer, begin
from .observer import check as check_observer
from .prepared_run import Run, Saved
from .queries import later_events, queries_of
from .sum_plan import plan_of_rest, sum_plan, sum_plan_with
from .tuning import require_arms, tuning_of
from .unit_plan import require_use

SEVERAL = 256  # held-out examples
NOT_MEASURED = (
    "task.held_out: the held-out data count as private, so the model is not evaluated on them; if they are public, say "
    "task.held_out=public, or held_out_public = True in the task"
)
NOTHING_HELD_OUT = (
    "task.held_out_file: no public data are held out, so the model is not evaluated; name a public table"
)


def prepare(federation: Federation, folder: Path, saved: Saved) -> Run:
    """Return the run before it begins or resumes; nothing is written.

    Args:
      federation: its parts.
      folder: of the run.
      saved: state of an earlier process of the run.

    Raises:
      Refusal: the settings, the model, the strategy or the checkpoint are invalid.
    """
    resumed = bool(saved.name)
    if not resumed:
        run_folder.require_free(folder)
    elif saved.turns not in (None, federation.cohort.name):
        remedy = f"started with the cohort {saved.turns!r}, and it is now {federation.cohort.name!r}; start a new run"
        raise Refusal("resume", str(folder), remedy)
    queries = queries_of(federation.settings)
    federation.population.check_identity(federation.settings.task.data_id, federation.mode.spends)
    checkpoint = (resumed and read(folder)) or NO_CHECKPOINT
    if checkpoint.run:
        federation.population.check_run(checkpoint.run, folder)
    left, spent = federation.settings.rounds_left(checkpoint.state.round), ""
    try:
        client = client_settings(federation, folder, left, resumed)
    except (Unaffordable, CapEnded) as refusal:
        if not resumed:
            raise
        client, spent = client_settings(federation, folder, 0), str(refusal)
    _check_every(federation)
    _warn_of_own_scale(federation)
    if not (measurable := len(held_out_of(federation.task))) or not federation.held_out_public:
        warn(NOT_MEASURED if measurable else NOTHING_HELD_OUT)
    elif federation.settings.task.own and own_training(federation.task) is None:
        _check_measured(federation.task)
    if federation.mode.hides_records:
        check_trainable(federation.task.model())
        for data in federation.population.to_measure(federation.task):
            check_independence(federation.task.model(), federation.task, data)
            for query in queries:
                query.check_records(federation, data)
    _check_base(federation)  # after layers that no record-level mode can train
    if federation.mode.charges_records:
        federation.population.check_mode(federation.mode.charges_records)
    make_strategy_of(federation)
    won = checkpoint.state.winner is not None
    # Clients of real tables go by their places, which another table moves: a new deal is charged beside the old one.
    named = federation.simulated or not federation.population.reads_data
    tuning = tuning_of(federation, saved.deal if named or won else None)
    federation.check_cohort()
    coordinates = dimension_of(federation.task)  # refuses numbers that cannot be sent
    if federation.compression is not None:
        federation.compression.of(coordinates)  # refuses a grid that is too coarse
    for query in queries:
        query.check(federation)
    if not won:
        require_arms(federation, tuning)
    if not resumed and not (federation.simulated and federation.mode.budget):
        require_use(federation, sum_plan(federation))
    # Noise of the system's generator cannot be repeated: on real data the rest is charged as a run of its own, unless
    # rounds were charged together and each row of their noise is used once.
    goes_on = federation.seed is not None or federation.mode.mechanism.rows is not None
    name = saved.name if resumed and goes_on else federation.population.new_name()
    run = Run(federation, folder, name, client, saved, checkpoint, tuning=tuning, spent=spent)
    run.client_ledgers.require(checkpoint.client_heads)
    return run


def alone_on_records(federation: Federation) -> AbstractContextManager[None]:
    """Prevent other runs and questions from charging the ledgers of a data set's records meanwhile; see `Population`."""
    return federation.population.exclusive_lock() if federation.mode.spends else nullcontext()


def claim_records(federation: Federation) -> None:
    """Record which mode charges real records on this machine; of two that begin at the same time one is refused."""
    if federation.mode.charges_records:
        federation.population.claim_mode(federation.mode.charges_records)


def _check_every(federation: Federation) -> None:
    """Refuse data without valid batches, if they are accessible: held-out data and those of simulated clients."""
    task, held_out = federation.task, held_out_of(federation.task)
    check_made_here(task.model())
    if not len(held_out) and federation.population.needs_held_out:
        raise Refusal(
            "held_out", 0, "there are no examples; give at least one, of tables as task.held_out_file"
        )
    check_data(held_out, "held-out data")
    check_observer(federation)
    if not (clients := _looked_at(federation)):
        return
    shipped = federation.simulated and not federation.settings.task.own
    model = None if shipped or own_training(task) is not None else task.model().eval()
    for client in clients:
        data, whose = data_of(task, client), f"client {client}"
        check_size(task, client, data)
        check_data(data, whose, held_out)
        if model is not None:
            check_taken(data, whose, model, task.loss)
        if federation.mode.per_person is not None:
            names_of(data, whose)  # refuses examples without a person
    if len(clients) == task.num_clients or not any(len(data_of(task, client)) for client in clients):
        federation.mode.check_sizes()


def _check_base(federation: Federation) -> None:
    """Refuse a model whose base training changes; a task that trains by itself is checked at its clients."""
    import torch  # takes a second, and a plan does not need it

    held_out = held_out_of(federation.task)
    if own_training(federation.task) is not None:
        return
    looked_at = held_out if len(held_out) else some_examples(federation)
    still = check_base(federation.task, looked_at.batch(torch.arange(min(2, len(looked_at))))[0])
    if still and federation.mode.hides_clients:
        warn(
            f"model: noise moves {still[0]}, which training does not; if it is to stay, set track_running_stats = False on its module"
        )


def _warn_of_own_scale(federation: Federation) -> None:
    """Warn who has real data of columns that seem scaled by the data themselves: one client's, or by those of all."""
    task, hides = federation.task, federation.mode.hides_records
    clients = federation.population.local_clients(task) if federation.settings.task.own else ()
    if not clients or not federation.mode.spends:
        return
    every = [partial(data_of_all, task, client) for client in clients]
    scales = [own_scale(lambda read=read: [read()]) for read in every]
    pooled = own_scale(lambda: (read() for read in every))
    if hides and any(scales):
        number = next(client for client, scale in enumerate(scales) if scale)
        warn(
            f"columns of client {number}, and of {sum(map(bool, scales)) - 1} others, {SAID.format(scales[number])}"
        )
    elif pooled and not all(scales):  # where clients are hidden, each may scale by its own
        warn(f"columns of all clients' data together {SAID.format(pooled)}")


def _check_measured(task: Task) -> None:
    """Refuse a user's model or metrics that fail on the first held-out examples, before a round is spent."""
    import torch

    inputs, targets = next(batches_of(held_out_of(task)))
    field, remedy = "task.model", "fails on the held-out data in evaluation mode"
    try:
        with torch.no_grad():
            outputs = run_on(task.model().eval(), inputs)
            field, remedy = "task.metrics", "fails on the held-out data; return numbers by name"
            figures_of(task, outputs, targets)
    except Exception as error:
        raise Refusal(field, text_of(error), remedy) from error


def _looked_at(federation: Federation) -> range:
    """Return the clients whose data are checked before anything is spent.

    In a large population on synthetic data these are spread evenly, and the others are checked when drawn: a refused
    client drops out of the round. A step on all clients' records uses all of them, so all are checked.
    """
    every = federation.settings.secagg is not None or federation.mode.sums_records
    return federation.population.clients_to_check(federation.task, every)


def some_examples(federation: Federation) -> Data:
    """Return examples with the clients' shapes: a client's, or public ones if clients keep theirs."""
    return federation.population.sample_examples(federation.task)


def make_strategy_of(federation: Federation) -> Any:
    """Return the strategy of the settings."""
    if federation.strategy is not None:
        return deepcopy(federation.strategy) if federation.settings.tried else federation.strategy
    s = federation.settings
    return make_strategy(s.strategy.target or s.strategy.name, s.strategy.parameters, s.allow_modules)


@contextmanager
def opened(run: Run, ask: Callable[[Run], Run]) -> Generator[tuple[Run, Observer]]:
    """Open the population's ledger, if clients are protected, and the run folder; refuse before either is written.

    Args:
      run: as `prepare` returned it.
      ask: asks the clients of a new run the questions that precede the first round.

    Yields:
      The run with its clients' privacy, and its observer.

    Raises:
      Refusal: a folder or the ledger cannot be opened, or the remaining budget affords no round.
    """
    federation = run.federation
    run.client_ledgers.make_folder()
    budget = federation.mode.budget
    if budget is None:
        make_folder(federation.population.words.folder, run.folder)
        with exclusive_lock(
            run.folder / "run", federation.population.words.folder
        ):  # no ledger keeps others out
            yield _started(ask(run))
        return
    simulated, checkpoint = federation.simulated, run.checkpoint
    plan, spent = _planned(run, None) if simulated else (None, "")
    if simulated and not run.resumed:
        require_use(federation, plan)
    ledger = open_ledger(federation, run.folder, budget, checkpoint.head)
    ledger.purpose = federation.settings.purpose
    try:
        if plan is None:
            plan, spent = _planned(run, ledger)
        source = federation.mode.sum_source
        for shared in () if run.resumed or source else ledger.shared:
            target = None if federation.mode.promises[0].noise_multiplier is not None else budget
            plan = within_records(plan, shared, target, "privacy", later_events(federation))
        prior = () if simulated else tuple(ledger.events(Adversary.MODEL))
        begun = 0 if simulated else checkpoint.state.round
        adaptation = federation.mode.adaptation(plan, prior, begun)
        make_folder(federation.population.words.folder, run.folder)
        key = _noise_key(run)
        share, units = federation.mode.metrics_share(plan), federation.mode.units
        privacy = SumPrivacy(
            plan, ledger, share, adaptation, key, units, source=None if simulated else source
        )
        write_acts(run, ledger)
        run = ask(_demanding(replace(run, privacy=privacy, spent=run.spent or spent), plan))
        yield _started(replace(run, privacy=replace(privacy, units=run.federation.mode.units)))
    finally:
        close_ledger(federation, ledger)


def close_ledger(federation: Federation, ledger: Ledger) -> None:
    """Close the ledger of `open_ledger`; on real data of this machine its head is kept, to hold a later one to it."""
    with suppress(LedgerUnavailable):  # only notes are lost: the reservation stays spent
        ledger.close()
    federation.population.keep_head(ledger)


def _demanding(run: Run, planned: Plan) -> Run:
    """Return the run with simulated owners' demand of the noise that its rounds and queries are planned with."""
    demand = run.client.encryption
    if demand is None:
        return run
    queries = queries_of(run.federation.settings)
    plans = (planned, *(each for query in queries for each in query.plans(run.federation, run.name)))
    demand = replace(demand, minimum_noise_multiplier=min(each.noise_over_clip for each in plans))
    return replace(run, client=replace(run.client, encryption=demand))


def open_ledger(federation: Federation, folder: Path, budget: Budget, expect: Head | None = None) -> Ledger:
    """Return the population's ledger, open for writing; its people's losses elsewhere are charged first.

    Args:
      federation: whose clients are protected in sums.
      folder: of the run, in which a simulation has its ledger.
      budget: of the ledger.
      expect: an entry that it must contain.

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


def _started(run: Run) -> tuple[Run, Observer]:
    run, observer = begin(run)
    run.client_ledgers.settle()
    claim_records(run.federation)  # last, since the claim of a refused run is not withdrawn
    run_folder.write_start(run)
    return run, observer


def _planned(run: Run, ledger: Ledger | None) -> tuple[Plan, str]:
    """Return the client level's plan: with the noise that this run began with, or the least for the remaining budget.

    Where this budget does not cover the remaining rounds of a resumed run, its noise comes with the refusal's sentence.
    """
    federation, saved, spent = run.federation, run.saved, ""
    left = federation.settings.rounds_left(run.checkpoint.state.round)
    if saved.noise is not None and (ledger is None or left <= 0 or federation.mode.mechanism.rows):
        plan = sum_plan_with(federation, saved.noise, saved.filter_order)
    else:
        prior = (*ledger.events(Adversary.MODEL), *federation.mode.sums_before()) if ledger else ()
        try:
            plan = sum_plan(federation, prior, left, ledger.filter_order if ledger else None)
        except Unaffordable as refusal:
            if saved.noise is None:
                raise
            begun = sum_plan_with(federation, saved.noise, saved.filter_order)
            assert begun is not None
            plan = plan_of_rest(federation, begun, prior, left)
            plan, spent = (begun, str(refusal)) if plan is None else (plan, "")
        if not run.resumed and plan is not None and federation.mode.budget is not None:
            plan.require_one_round(federation.mode.budget, prior)
    assert plan is not None and plan.noise_multiplier is not None
    return plan, spent


def _noise_key(run: Run) -> bytes | None:
    """Return the key of correlated noise on real data, on disk before the run's first round."""
    federation = run.federation
    if federation.mode.mechanism.rows is None or federation.seed is not None:
        return None
    if not run.resumed:
        try:
            return noise_key.make(run.folder)
        except OSError as problem:
            remedy = f"no key can be kept there ({problem.strerror}); choose another"
            raise Refusal(federation.population.words.folder, str(run.folder), remedy) from problem
    finished = run.checkpoint.state.round >= federation.settings.steps
    key = b"" if finished else noise_key.read(run.folder)
    if key and run.saved.places not in (None, federation.population.position_digest(key)):
        remedy = "started with other tables or another order, which the clients' turns depend on; restore it, or start a new run"
        raise Refusal("resume", str(run.folder), remedy)
    return key
