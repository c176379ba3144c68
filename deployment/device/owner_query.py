"""Query on a device's database, which runs with the rights of its owner: only one that the owner's policy lists."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ...base.refusal import Refusal
from .client_bundle import DEVICE_FILE, POLICY, TaskChoice
from .owner_policy import OwnerPolicy


def query_hash(choice: TaskChoice) -> str:
    """Return the SHA-256 of a query and the name of its database, in hexadecimal, which `OwnerPolicy.queries` lists."""
    return hashlib.sha256(json.dumps([choice.query, choice.database]).encode()).hexdigest()


def is_listed(choice: TaskChoice, policy: OwnerPolicy) -> bool:
    """Return whether the owner lists the query of a task; a task without one needs no list."""
    return choice.query is None or query_hash(choice) in policy.queries


def require_listed(choice: TaskChoice, policy: OwnerPolicy) -> None:
    """Refuse a query that the owner does not list, before it is executed."""
    if not is_listed(choice, policy):
        raise Refusal("task.query", choice.query, f"is not listed by the owner: {_remedy(choice)}")


def _remedy(choice: TaskChoice) -> str:
    return (
        f"it reads {choice.database} with this device's rights; if you agree to it as {DEVICE_FILE} has it, set in "
        f'{POLICY}: queries = ["{query_hash(choice)}"]'
    )


def query_line(choice: TaskChoice, policy: OwnerPolicy) -> str:
    """Return the query of a task with whether the owner lists it, for a display."""
    stand = (
        f"listed in {POLICY}"
        if is_listed(choice, policy)
        else f"not listed, and not executed: {_remedy(choice)}"
    )
    return f"query on {choice.database}: {' '.join(str(choice.query).split())}\n    {stand}"


def query_in_json(choice: TaskChoice, policy: OwnerPolicy) -> dict[str, Any]:
    """Return what programs read of the query of a task."""
    text = {"query": choice.query, "database": choice.database, "sha256": query_hash(choice)}
    return {**text, "listed": is_listed(choice, policy)}
