"""Commands that reproduce and check a run, for its report."""

import shlex
from collections.abc import Mapping
from typing import Any

from ..base.refusal import Refusal
from ..run.run_files import RunFiles, flat

NOT_REPEATED = ("resume", "optimize", "run")  # keys that name a run, and change nothing in it


def commands_of(run: RunFiles) -> list[str]:
    """Return the commands that reproduce and check a run; FOLDER and RUN stand for a reader's own folders."""
    groups = [
        f"{name}={value['name']}"
        for name, value in run.config.items()
        if isinstance(value, Mapping) and "name" in value
    ]
    verb = ["fedveil", "server", "FOLDER"] if run.deployed else ["fedveil", "simulate"]
    words = [*groups, *([] if run.deployed else _differences(run, groups))]
    commands = [shlex.join([*verb, *words])]
    if run.ledger is not None:
        head = run.result.get("ledger_head")
        head_option = ["--head", *map(str, head)] if head else []
        commands.append(shlex.join(["fedveil", "ledger", "verify", f"RUN/{run.ledger.name}", *head_option]))
    if run.audit:
        commands.append("fedveil audit RUN")
    return [*commands, "fedveil report RUN"]


def _differences(run: RunFiles, groups: list[str]) -> list[str]:
    """Return the overrides that make a run's configuration of these groups, or all keys of groups that are unknown."""
    from ..configs.compose import compose_overrides
    from ..configs.settings import publishable_keys

    try:
        composed: dict[str, Any] = dict(flat(publishable_keys(compose_overrides(groups).config)))
    except Refusal:  # groups of an older release, or of somebody's own folder
        composed = {}
    left_out = {*NOT_REPEATED, *(f"{group.partition('=')[0]}.name" for group in groups)}
    return [
        f"{key}={value}"
        for key, value in flat(run.publishable)
        if key not in left_out and composed.get(key) != value
    ]
