"""Workbenches of one owner's data: from the bundle, scaled by an order, and without a run's held-out records."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

from ...client.workbench import Workbench
from ...messages.client_settings import ClientSettings
from ...tasks.arrays import agreement_of
from ...tasks.held_back import held_back

# Arguments: the held-out share, whether rows are measured one by one, whether equal rows stay together, `key_of` of the scaling.
ContextOf = Callable[[float | None, bool, bool, str], Workbench]


def create_contexts(settings: ClientSettings) -> tuple[Workbench, ContextOf, Callable[[str], str | None]]:
    """Return the owner's own workbench, those for orders, and the agreement under a scaling."""
    bundle_context = Workbench(settings)

    @lru_cache(maxsize=2)  # a run has one scaling; a question before its rounds has none
    def scaled(moments: str) -> Workbench:
        if not moments:
            return bundle_context
        options = {**settings.task_options, "moments": json.loads(moments)}
        return Workbench(replace(settings, task_options=options))

    @lru_cache(maxsize=2)  # a run has one share
    def context_for(share: float | None, per_record: bool, group_equal_rows: bool, moments: str) -> Workbench:
        bench = scaled(moments)
        if share is None:
            return bench
        return Workbench(bench.settings, held_back(bench.task, share, per_record, group_equal_rows))

    @lru_cache(maxsize=2)
    def agreement_for(moments: str) -> str | None:
        return agreement_of(scaled(moments).task)

    return bundle_context, context_for, agreement_for


def key_of(options: Mapping[str, object]) -> str:
    """Return the scaling in a task's options as text; empty where there is none."""
    return json.dumps(options["moments"], sort_keys=True) if options.get("moments") else ""
