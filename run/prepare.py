"""Preparation of a run: its parts, its clients' settings and its checks; refusals come before anything is written."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.notice import say, warn
from ..base.refusal import Refusal
from ..messages.client_settings import ClientSettings
from ..modes.federation import Federation
from ..privacy.ledger.caps import CapEnded
from ..privacy.plan import Unaffordable
from ..server.checkpoint import NO_CHECKPOINT, Checkpoint, read
from ..strategies.registry import make_strategy
from ..tasks.arrays import check_base, dimension_of
from ..tasks.data import (
    check_data,
    check_size,
    check_taken,
    data_of,
    data_of_all,
    figures_of,
    held_out_of,
    text_of,
)
from ..tasks.hardware import check_made_here
from ..tasks.independence import check_independence
from ..tasks.persons import names_of
from ..tasks.probe import is_large
from ..tasks.protocol import Task, check_trainable, own_training
from .acts import require_use
from .client_instructions import client_settings
from .observer import check as check_observer
from .prepared_run import Run, Saved
from .queries import queries_of
from .saved import require_free
from .sum_plan import sum_plan
from .tuning import require_arms, tuning_of

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

NOT_MEASURED = (
    "task.held_out: the held-out data count as private, so the model is not evaluated on them; if they are public, say "
    "task.held_out=public, or held_out_public = True in the task"
)
NO_HELD_OUT = (
    "task.held_out_file: no public data are held out, so the model is not evaluated; name a public table"
)


def prepare(federation: Federation, folder: Path, saved: Saved) -> Run:
    """Return the run before it begins or resumes; nothing is written.

    Args:
      federation: the federation that runs.
      folder: folder of the run.
      saved: state of an earlier process of the run.

    Raises:
      Refusal: the settings, the model, the strategy or the checkpoint are invalid.
    """
    is_resumed = bool(saved.name)
    checkpoint = _checkpoint(federation, folder, saved)
    client, spent = _client_settings(federation, folder, checkpoint, is_resumed)
    _check_data(federation)
    _warn_of_scale(federation)
    _check_evaluation(federation)
    _check_records(federation)
    _check_base(federation)  # after layers that no record-level mode can train
    if federation.mode.charges_records:
        federation.population.check_mode(federation.mode.charges_records)
    make_strategy_of(federation)
    has_names = federation.simulated or not federation.population.reads_data
    has_winner = checkpoint.state.winner is not None
    # Clients of real tables go by their places, which another table moves: a new deal is charged beside the old one.
    tuning = tuning_of(federation, saved.deal if has_names or has_winner else None)
    _check_sums(federation)
    if not has_winner:
        require_arms(federation, tuning)
    # `opened` checks the plan of a simulation with a ledger.
    if not is_resumed and not (federation.simulated and federation.mode.budget):
        require_use(federation, sum_plan(federation))
    # Noise of the system's generator cannot be repeated: on real data the rest is charged as a run of its own, unless
    # rounds were charged together and each row of their noise is used once.
    is_repeatable = federation.seed is not None or federation.mode.mechanism.rows is not None
    name = saved.name if is_resumed and is_repeatable else federation.population.new_name()
    run = Run(federation, folder, name, client, saved, checkpoint, tuning=tuning, spent=spent)
    run.client_ledgers.require(checkpoint.client_heads)
    return run


def _checkpoint(federation: Federation, folder: Path, saved: Saved) -> Checkpoint:
    """Return the checkpoint to resume from; refuse a folder, a cohort, data or a checkpoint of another run."""
    population = federation.population
    if not saved.name:
        require_free(folder)
    elif saved.turns not in (None, federation.cohort.name):
        remedy = f"started with the cohort {saved.turns!r}, and it is now {federation.cohort.name!r}; start a new run"
        raise Refusal("resume", str(folder), remedy)
    population.check_identity(federation.settings.task.data_id, federation.mode.spends)
    checkpoint = (saved.name and read(folder)) or NO_CHECKPOINT
    if checkpoint.run:
        population.check_run(checkpoint.run, folder)
    return checkpoint


def _client_settings(
    federation: Federation, folder: Path, checkpoint: Checkpoint, resumed: bool
) -> tuple[ClientSettings, str]:
    """Return the clients' settings, and why a resumed run's remaining rounds cannot be paid; empty where they can.

    If they cannot, the settings are those for empty ledgers: no further round is trained with them.
    """
    rounds = federation.settings.rounds_left(checkpoint.state.round)
    try:
        return client_settings(federation, folder, rounds, resumed), ""
    except (Unaffordable, CapEnded) as refusal:
        if not resumed:
            raise
        return client_settings(federation, folder), str(refusal)


def _check_data(federation: Federation) -> None:
    """Refuse data without valid batches, if they are accessible: held-out data and those of simulated clients.

    In a large population on synthetic data the clients that are looked at are spread evenly, and the others are checked
    when drawn: a refused client drops out of the round.
    """
    task, held_out = federation.task, held_out_of(federation.task)
    check_made_here(task.model())
    if not len(held_out) and federation.population.needs_held_out:
        text = "there are no examples; give at least one, of tables as task.held_out_file"
        raise Refusal("held_out", 0, text)
    check_data(held_out, "held-out data")
    check_observer(federation)
    clients = federation.population.clients_to_check(task, federation.needs_all_clients)
    if not clients:
        return
    is_shipped = federation.simulated and not federation.settings.task.own
    model = None if is_shipped or own_training(task) is not None else task.model().eval()
    for client in clients:
        data, owner = data_of(task, client), f"client {client}"
        check_size(task, client, data)
        check_data(data, owner, held_out)
        if model is not None:
            check_taken(data, owner, model, task.loss)
        if federation.mode.per_person is not None:
            names_of(data, owner)  # refuses examples without a person
    if len(clients) == task.num_clients or not any(len(data_of(task, client)) for client in clients):
        federation.mode.check_sizes()


def _warn_of_scale(federation: Federation) -> None:
    """Warn of columns of real data that seem scaled by mean, deviation or range of one client's data, or of all data.

    Such a scale depends on every record, and no ledger is charged for it.
    """
    task, mode = federation.task, federation.mode
    clients = federation.population.local_clients(task) if federation.settings.task.own else ()
    if not clients or not mode.spends:
        return
    from ..tasks.own_scale import WARNING, own_scale  # of real data alone

    # `own_scale` reads twice, and only a part of the data is in memory at a time.
    reads = [partial(data_of_all, task, client) for client in clients]
    scales = [own_scale(lambda read=read: [read()]) for read in reads]
    pooled = own_scale(lambda: (read() for read in reads))
    if mode.hides_records and any(scales):
        number = next(client for client, scale in enumerate(scales) if scale)
        others = sum(map(bool, scales)) - 1
        warn(f"columns of client {number}, and of {others} others, {WARNING.format(scales[number])}")
    elif pooled and not all(scales):  # where clients are hidden, each may scale by its own
        warn(f"columns of all clients' data together {WARNING.format(pooled)}")


def _check_evaluation(federation: Federation) -> None:
    """Warn of a model that is not evaluated; refuse a user's that fails on the first held-out examples."""
    count = len(held_out_of(federation.task))
    if not count or not federation.held_out_public:
        warn(getattr(federation.task, "not_measured", NOT_MEASURED) if count else NO_HELD_OUT)
    elif federation.settings.task.own and own_training(federation.task) is None:
        _check_measured(federation.task, federation.settings.engine.examples_at_once)


def _check_measured(task: Task, limit: str) -> None:
    """Refuse a model, or metrics, that fail on the first held-out examples, of which `limit` are in memory at a time."""
    import torch  # takes a second, and a plan does not need it

    from ..tasks.batch_memory import answers

    field, remedy = "task.model", "fails on the held-out data in evaluation mode"
    try:
        with torch.no_grad():
            outputs, targets = next(answers(task.model().eval(), held_out_of(task), limit))
            field, remedy = "task.metrics", "fails on the held-out data; return numbers by name"
            figures_of(task, outputs, targets)
    except Exception as error:
        raise Refusal(field, text_of(error), remedy) from error


def _check_records(federation: Federation) -> None:
    """Refuse a model, or a query of it, that does not keep records independent, where they are hidden."""
    task = federation.task
    if not federation.mode.hides_records:
        return
    model = task.model()
    check_trainable(model)
    if is_large(model):
        say("model: measuring once whether it keeps records independent", failed=True)
    for data in federation.population.to_measure(task):
        check_independence(model, task, data)
        for query in queries_of(federation.settings):
            query.check_records(federation, data)


def _check_base(federation: Federation) -> None:
    """Refuse a model whose untrained base training would change, and warn of statistics that noise changes.

    A task that trains by itself is checked at its clients.
    """
    import torch

    task, held_out = federation.task, held_out_of(federation.task)
    if own_training(task) is not None:
        return
    examples = held_out if len(held_out) else federation.population.sample_examples(task)
    two_inputs, _ = examples.batch(torch.arange(min(2, len(examples))))
    unmoved = check_base(task, two_inputs)
    if unmoved and federation.mode.hides_clients:
        warn(
            f"model: noise moves {unmoved[0]}, which training does not; if it is to stay, set track_running_stats = False on its module"
        )


def make_strategy_of(federation: Federation) -> Strategy:
    """Return a new strategy by the settings, or the user's object: with arms, a copy for each, which it changes."""
    if federation.strategy is not None:
        return deepcopy(federation.strategy) if federation.settings.tried else federation.strategy
    s = federation.settings
    return make_strategy(s.strategy.target or s.strategy.name, s.strategy.parameters, s.allow_modules)


def _check_sums(federation: Federation) -> None:
    """Refuse a cohort that is too small, vectors that cannot be sent, and queries that cannot be answered."""
    federation.check_cohort()
    coordinates = dimension_of(federation.task)  # refuses numbers that cannot be sent
    if federation.compression is not None:
        federation.compression.of(coordinates)  # refuses a grid that is too coarse
    for query in queries_of(federation.settings):
        query.check(federation)
