"""fedveil: federated learning that keeps count of what it reveals.

``import fedveil as fv`` is the Python face; docs/python.md shows it. Importing it loads nothing heavy: a name is
imported when it is first used, and says which extra brings what it lacks.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.private_evaluation import private_evaluation
    from .client.private_update import private_update
    from .configs.schema import (
        ClientCentral,
        ClientDistributed,
        NoPrivacy,
        Record,
        RecordAndClient,
        RecordDistributed,
    )
    from .face import FinishedRun, ask, load, plan, simulate
    from .privacy.accounting.epsilon import epsilon
    from .privacy.budget import Adjacency, Adversary, Budget, Release, Unit
    from .privacy.ledger.ledger import BudgetExhausted, Ledger
    from .privacy.refusal import Refusal
    from .server.evaluations import ClientEvaluation
    from .server.protect import protect
    from .server.run.callbacks import Callback, RoundEnd, RunEnd, RunStart
    from .server.run.unit_plan import UnitPlan
    from .strategies.cohorts import All, CyclicPoisson, Fixed, MinSeparation, Poisson
    from .tasks.data import Examples, LazyExamples
    from .tasks.protocol import Task

__version__ = "0.1.0"

__all__ = [
    "Adjacency",
    "Adversary",
    "All",
    "Budget",
    "BudgetExhausted",
    "Callback",
    "ClientCentral",
    "ClientDistributed",
    "ClientEvaluation",
    "CyclicPoisson",
    "Examples",
    "FinishedRun",
    "Fixed",
    "LazyExamples",
    "Ledger",
    "MinSeparation",
    "NoPrivacy",
    "Poisson",
    "Record",
    "RecordAndClient",
    "RecordDistributed",
    "Refusal",
    "Release",
    "RoundEnd",
    "RunEnd",
    "RunStart",
    "Task",
    "Unit",
    "UnitPlan",
    "ask",
    "epsilon",
    "load",
    "plan",
    "private_evaluation",
    "private_update",
    "protect",
    "simulate",
]

# Where a name lives, and the extra that its module needs; "" for none.
_HOMES = {
    "Adjacency": (".privacy.budget", ""),
    "Adversary": (".privacy.budget", ""),
    "All": (".strategies.cohorts", ""),
    "Budget": (".privacy.budget", ""),
    "BudgetExhausted": (".privacy.ledger.ledger", ""),
    "Callback": (".server.run.callbacks", "simulation"),
    "ClientCentral": (".configs.schema", "simulation"),
    "ClientDistributed": (".configs.schema", "simulation"),
    "ClientEvaluation": (".server.evaluations", "client"),
    "CyclicPoisson": (".strategies.cohorts", ""),
    "Examples": (".tasks.data", "client"),
    "FinishedRun": (".face", ""),
    "Fixed": (".strategies.cohorts", ""),
    "LazyExamples": (".tasks.data", "client"),
    "Ledger": (".privacy.ledger.ledger", ""),
    "MinSeparation": (".strategies.cohorts", ""),
    "NoPrivacy": (".configs.schema", "simulation"),
    "Poisson": (".strategies.cohorts", ""),
    "Record": (".configs.schema", "simulation"),
    "RecordAndClient": (".configs.schema", "simulation"),
    "RecordDistributed": (".configs.schema", "simulation"),
    "Refusal": (".privacy.refusal", ""),
    "Release": (".privacy.budget", ""),
    "RoundEnd": (".server.run.callbacks", "simulation"),
    "RunEnd": (".server.run.callbacks", "simulation"),
    "RunStart": (".server.run.callbacks", "simulation"),
    "Task": (".tasks.protocol", "client"),
    "Unit": (".privacy.budget", ""),
    "UnitPlan": (".server.run.unit_plan", "simulation"),
    "ask": (".face", ""),
    "epsilon": (".privacy.accounting.epsilon", ""),
    "load": (".face", ""),
    "plan": (".face", ""),
    "private_evaluation": (".client.private_evaluation", "client"),
    "private_update": (".client.private_update", "client"),
    "protect": (".server.protect", "client"),
    "simulate": (".face", ""),
}


def __getattr__(name: str) -> Any:
    """Import a name of the face when it is first used.

    Raises:
        AttributeError: there is no such name.
        Refusal: what it needs is not installed.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, extra = _HOMES[name]
    if extra:
        from .extras import require_extra

        require_extra(extra, f"fedveil.{name}")
    found = globals()[name] = getattr(import_module(module, __name__), name)
    return found


def __dir__() -> list[str]:
    """Return the names of the face."""
    return sorted([*__all__, "__version__"])
