"""Extensions: parts of fedveil that the core finds by name, in this one table, and runs without."""

from importlib import import_module
from typing import Any

from .refusal import Refusal

# By kind and name, the module below fedveil that has it, and the object in it.
TABLE = {
    ("engine", "ray"): "engines.ray:ray_grid",
    ("query", "scaling"): "questions.scaling:SCALING_QUERY",
    ("query", "answer"): "questions.client:answer",
    ("query", "counts"): "questions.answers:counts_of",
    ("query", "evaluation"): "questions.evaluation:EVALUATIONS",
}


def extension(kind: str, name: str, field: str, value: object) -> Any:
    """Return an extension's object, which is imported when it is first used.

    Args:
      kind: of extension point.
      name: of the extension.
      field: of the configuration that asks for it.
      value: of that field.

    Raises:
      Refusal: this installation does not have it.
    """
    module, _, attribute = TABLE[kind, name].partition(":")
    try:
        return getattr(import_module(f"..{module}", __package__), attribute)
    except ModuleNotFoundError as error:
        if not (error.name or "").endswith(module.partition(".")[0]):
            raise
        room = module.partition(".")[0]
        raise Refusal(
            field, value, f"needs fedveil.{room}, which this installation lacks; leave it out"
        ) from error
