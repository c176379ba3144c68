"""Instructions to clients: the settings of simulated clients, with their own noise, and the order to real ones."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..base.bounded_decoding import build
from ..base.refusal import Refusal
from ..configs.schema import SimulationSettings
from ..configs.task_settings import CsvTask, FlwrPartition
from ..messages.client_settings import ClientSettings
from ..messages.training_order import ORDER_KEY, OWN_LAYERS, OwnLayers, TrainingOrder
from ..modes.federation import Federation, mode_of
from ..populations.population import extra_of
from ..tasks import DEALT, GROUP_EQUAL_ROWS, HELD_ALONE, HELD_BACK, PLANTED
from .files import PERSONAL
from .origin import origin_of
from .prepared_run import Run
from .queries import queries_of, query_events

TRACES = "client_traces"  # folder of each client's own loss traces, in a simulation


def question_settings(federation: Federation, folder: Path) -> ClientSettings:
    """Return the clients' settings for a question; at the record level with their ledgers, but without training noise.

    `folder` is that of the answers.
    """
    settings = _plain_settings(federation, folder)
    if not federation.population.reads_data:
        return settings
    return _with_origin(federation, federation.mode.instruct_for_question(settings, folder), None)


def client_settings(
    federation: Federation, folder: Path, rounds: int = 0, resumed: bool = False
) -> ClientSettings:
    """Return the clients' settings; record-level noise is planned here, once for each size of data set.

    Real clients plan it themselves and get the other settings by `order_of`.

    Args:
      federation: the federation that runs.
      folder: folder of the run, under which a simulation has its ledgers; nothing is written there.
      rounds: remaining ones, planned with the remaining budget of ledgers of real data; 0 plans all rounds for empty
        ledgers.
      resumed: whether the run has begun; a ledger with too little left for a plan keeps the noise of an empty one.

    Raises:
      Unaffordable: the budget affords no round at this noise.
      Refusal: the audit asks for loss traces of real data.
    """
    settings = _plain_settings(federation, folder)
    if not federation.population.reads_data:
        return settings
    settings = federation.mode.instruct(settings, folder, rounds, resumed, partial(query_events, federation))
    return _with_origin(federation, settings, federation.settings.purpose)


def _with_origin(federation: Federation, client: ClientSettings, purpose: str | None) -> ClientSettings:
    """Return the clients' settings with what their ledgers say of the run; other settings where there are no such ledgers."""
    if client.record is None:
        return client
    origin = json.dumps({**origin_of(federation), "purpose": purpose})
    return replace(client, record=replace(client.record, origin=origin))


def with_task_of(federation: Federation, client: ClientSettings) -> ClientSettings:
    """Return the clients' settings with the scaled task; their noise stays, since its plan counted the scaling question.

    Args:
      federation: whose clients have answered the scaling question.
      client: settings before scaling.
    """
    names = tuple(federation.population.client_ledger_names)
    record = client.record and replace(client.record, ledgers=names)
    return replace(client, task_options=_task_options_here(federation), record=record)


def _plain_settings(federation: Federation, folder: Path) -> ClientSettings:
    """Return the clients' settings without the mode's terms of DP-SGD."""
    s = federation.settings
    return ClientSettings(
        task=s.task.own or s.task.option,
        task_options=_task_options_here(federation),
        training=s.local_training,
        seed=federation.seed,
        allow_modules=s.allow_modules,
        encryption=federation.encryption,
        loss_traces=traces_of(federation, folder),
        accelerator=s.engine.device,
        dtype=s.engine.dtype,
        examples_at_once=s.engine.examples_at_once,
        own_folder=str((folder / PERSONAL).absolute()),
    )


def _task_options_here(federation: Federation) -> dict[str, Any]:
    """Return the task's constructor options for clients of this machine; empty for others, which have their own."""
    if not federation.population.reads_data:
        return {}
    scaling = {} if federation.moments is None else {"moments": federation.moments}
    return task_options(federation.settings, federation.seed) | scaling


def traces_of(federation: Federation, folder: Path) -> str:
    """Return the folder of simulated owners' loss traces; empty if they keep none.

    Raises:
      Refusal: the data are real, and a run folder must not hold such losses.
    """
    if not extra_of(federation.settings).keeps_losses(federation.settings):
        return ""
    if not federation.simulated:
        remedy = "these data are real: only its owner may see a record's losses; leave it out"
        raise Refusal("audit.loss_traces", True, remedy)
    return str(folder / TRACES)


def task_options(settings: SimulationSettings, seed: int | None) -> dict[str, Any]:
    """Return the task's constructor options; a user's task gets its arguments and the seed of planted examples.

    Args:
      settings: settings of the federation.
      seed: seed of the simulation; None stands for 0.
    """
    seed = seed or 0
    share = held_out_share(settings)
    common = dict(settings.options_of_groups)
    if share is not None:
        common[HELD_BACK] = share
    if share is not None and mode_of(settings).charges_records:
        common[HELD_ALONE] = True
    if settings.group_equal_rows:
        common[GROUP_EQUAL_ROWS] = True
    if extra_of(settings).plants_examples(settings):
        common[PLANTED] = seed
    counts = {"num_clients": settings.task.num_clients, "seed": seed}
    if settings.task.own:
        return settings.task.options | {DEALT: settings.partition.model_dump() | counts} | common
    options: dict[str, Any] = {
        **counts,
        "partition": settings.partition.name,
        "alpha": settings.partition.alpha,
        "dealer": settings.partition.model_dump() if isinstance(settings.partition, FlwrPartition) else None,
        "group_equal_rows": (isinstance(settings.task, CsvTask) and settings.group_equal_rows) or None,
        **settings.task.options,
        **common,
    }
    return {key: value for key, value in options.items() if value is not None}


def own_layers_of(settings: SimulationSettings) -> OwnLayers | None:
    """Return the layers that stay at their client; None if all travel."""
    plain = settings.options_of_groups.get(OWN_LAYERS)
    return plain and build(OwnLayers, plain)


def held_out_share(settings: SimulationSettings) -> float | None:
    """Return the share of its records that a client holds out for evaluation; None if no query needs any."""
    return next(filter(None, (query.held_out(settings) for query in queries_of(settings))), None)


def order_of(run: Run) -> dict[str, str]:
    """Return the order to real clients, who check it: training, mode, and claimed noise; the same for all rounds here."""
    from ..tasks.arrays import agreement_of  # torch, and plans know these instructions too

    s, mode = run.federation.settings, run.federation.mode
    order = TrainingOrder(
        run=run.name,
        privacy=mode.name,
        training=s.local_training,
        client=None if run.privacy is None else mode.claim(run.privacy.plan),
        record=mode.record_order(),
        agreement=agreement_of(run.federation.task),
        held_out=held_out_share(s),
        group_equal_rows=s.group_equal_rows and held_out_share(s) is not None,
        moments=run.federation.moments,
        own_layers=own_layers_of(s),
    )
    return {ORDER_KEY: order.to_json()}
