"""Extensions: parts of fedveil that the core finds by name, in this one table, and runs without."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .refusal import Refusal

# By extension point and name, the module below fedveil that has it, and the object in it; without one, all of its functions.
TABLE = {
    ("audit", "Observation"): "audit.observer",  # run/observer.py
    ("audit", "ExtraParticipants"): "audit.participants",  # populations/population.py
    ("audit", "ExtraClients"): "audit.canary_updates",  # client/extra.py
    ("audit", "ExtraRecords"): "audit.record_canaries",  # client/extra.py
    ("settings", "server"): "deployment.settings:ServerSettings",  # configs/reference.py
    ("engine", "ray"): "engines.ray:ray_grid",  # simulations/engines.py
    ("query", "scaling"): "questions.scaling:SCALING_QUERY",  # run/queries.py
    ("query", "evaluation"): "questions.evaluation:EVALUATIONS",
    ("query", "answer"): "questions.client:answer",  # client/app.py
    ("query", "counts"): "questions.answers:counts_of",  # simulations/clients.py
}


def extension(point: str, name: str, field: str, value: object) -> Any:
    """Return an extension's object or module, which is imported when it is first used.

    Args:
      point: of extension.
      name: of the extension.
      field: of the configuration that asks for it.
      value: of that field.

    Raises:
      Refusal: this installation does not have it.
    """
    module, _, attribute = TABLE[point, name].partition(":")
    package = f"{__name__.split('.')[0]}.{module.partition('.')[0]}"
    if find_spec(package) is None:
        raise Refusal(
            field, value, f"needs {package}, which is missing here: install all of fedveil, or change this"
        )
    module = import_module(f"{package}.{module.partition('.')[2]}")
    return getattr(module, attribute) if attribute else module
