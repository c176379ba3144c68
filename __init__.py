"""fedveil: federated learning that keeps count of what it reveals.

``import fedveil as fv`` is the Python face; docs/tutorial.ipynb shows it. A name is imported when it is first used, so that the
import itself is fast; a name whose packages are not installed is refused with the extra that installs them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.personal_app import make_personal, personal_app
    from .adapters.protect import protect
    from .base.refusal import Refusal
    from .client.private_update import private_update
    from .configs.privacy_settings import (
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
    from .questions.evaluations import ClientEvaluation
    from .questions.private_evaluation import private_evaluation
    from .run.callbacks import Callback, RoundEnd, RunEnd, RunStart
    from .run.unit_plan import UnitPlan
    from .strategies.cohorts import All, CyclicPoisson, First, Fixed, MinSeparation, Poisson
    from .tasks.data import Examples, LazyExamples
    from .tasks.protocol import Task

__version__ = "0.2.0"

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
    "First",
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
    "make_personal",
    "personal_app",
    "plan",
    "private_evaluation",
    "private_update",
    "protect",
    "simulate",
]

# Of the names above: their module, the extra that it needs ("" for none), and the names in it, separated by blanks.
_MODULES = (
    (".questions.private_evaluation", "client", "private_evaluation"),
    (".client.private_update", "client", "private_update"),
    (
        ".configs.privacy_settings",
        "simulation",
        "ClientCentral ClientDistributed NoPrivacy Record RecordAndClient RecordDistributed",
    ),
    (".face", "", "FinishedRun ask load plan simulate"),
    (".privacy.accounting.epsilon", "", "epsilon"),
    (".privacy.budget", "", "Adjacency Adversary Budget Release Unit"),
    (".privacy.ledger.ledger", "", "BudgetExhausted Ledger"),
    (".base.refusal", "", "Refusal"),
    (".questions.evaluations", "client", "ClientEvaluation"),
    (".adapters.personal_app", "client", "make_personal personal_app"),
    (".adapters.protect", "client", "protect"),
    (".run.callbacks", "simulation", "Callback RoundEnd RunEnd RunStart"),
    (".run.unit_plan", "simulation", "UnitPlan"),
    (".strategies.cohorts", "", "All CyclicPoisson First Fixed MinSeparation Poisson"),
    (".tasks.data", "client", "Examples LazyExamples"),
    (".tasks.protocol", "client", "Task"),
)
_HOMES = {name: (module, extra) for module, extra, names in _MODULES for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a name of the face when it is first used.

    Raises:
        AttributeError: there is no such name.
        Refusal: a package that it needs is not installed.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, extra = _HOMES[name]
    if extra:
        from .base.extras import require_extra

        require_extra(extra, f"fedveil.{name}")
    value = globals()[name] = getattr(import_module(module, __name__), name)
    return value


def __dir__() -> list[str]:
    """Return the names of the face."""
    return sorted([*__all__, "__version__"])
