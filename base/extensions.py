"""Extensions: parts of fedveil that the core finds by name, in this one table, and runs without."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .refusal import Refusal

PACKAGE = __name__.partition(".")[0]  # fedveil
# By extension point and name: the module below fedveil, and the object in it; without an object the module itself. The
# comment names the module that asks for it.
TABLE = {
    ("audit", "Observation"): "audit.observer",  # run/observer.py
    ("audit", "ExtraParticipants"): "audit.participants",  # populations/population.py
    ("audit", "ExtraClients"): "audit.canary_updates",  # client/extra.py
    ("audit", "ExtraRecords"): "audit.record_canaries",  # client/extra.py
    ("settings", "audit"): "audit.settings:AUDIT",  # configs/schema.py
    ("settings", "cost"): "evidence.settings:CostSettings",
    ("settings", "engine"): "engines.settings:ENGINE",
    ("settings", "evaluate"): "questions.settings:EvaluateSettings",
    ("settings", "personal"): "personal.settings:PERSONAL",
    ("settings", "server"): "deployment.settings:ServerSettings",  # configs/reference.py
    ("task settings", "shipped"): "tasks.shipped.settings:TASKS",  # configs/schema.py
    ("task settings", "text"): "text.settings:TASKS",
    ("label", "count"): "tables.counts:count",  # tables/label_keys.py
    ("label", "ordinal"): "tables.grades:ordinal",
    ("label", "survival"): "tables.survival:survival",
    ("label", "several"): "tables.several:several",
    ("personal", "own_layers"): "personal.own_layers",  # tasks/__init__.py, client/workbench.py
    ("engine", "ray"): "engines.ray:ray_grid",  # simulations/engines.py
    ("task", "mnist5k"): "tasks.shipped.mnist5k",  # tasks/__init__.py
    ("task", "digits"): "tasks.digits",
    ("task", "heart"): "tasks.shipped.heart",
    ("task", "fashion_mnist"): "tasks.shipped.fashion_mnist",
    ("task", "shakespeare"): "tasks.shipped.shakespeare",
    ("task", "sentences"): "tasks.shipped.sentences",
    ("task", "csv"): "tasks.tables",
    ("task", "census"): "tasks.shipped.census",
    ("task", "star"): "tasks.shipped.star",
    ("task", "text"): "text.task",
    ("group of text", "adapter"): "text.settings:AdapterSettings",  # configs/compose.py
    ("tables", "row_weights"): "tables.row_weights",  # tasks/tables.py, tasks/table_schema.py
    ("tables", "constraints"): "tables.constraints",  # tasks/tables.py
    ("tables", "label_of_kind"): "tables.label_keys:label_of_kind",  # tasks/table_schema.py
    ("tables", "since_of"): "tables.durations:since_of",  # tasks/table_schema.py
    ("tables", "group_weights"): "tables.group_weights",  # tasks/table_schema.py
    ("tables", "partition"): "tables.columnar:with_folders",  # tasks/table_files.py
    ("tables", "draft"): "tables.draft:draft_of",  # tasks/tables.py, cli/new.py
    ("device data", "csv"): "tasks.tables:SHARED",  # deployment/device/client_bundle.py
    ("device data", "text"): "text.files:SHARED",
    ("export of text", "peft"): "text.exports:write_peft",  # export/export.py
    ("export of text", "merged"): "text.exports:write_merged",
    ("link", "grpc"): "deployment.link_grpc",  # deployment/open_link.py, deployment/device/agent.py
    ("link", "flower"): "deployment.link_flower",
    ("callback", "csv"): "run.trackers:MetricsCsv",  # run/callbacks.py
    ("callback", "mlflow"): "run.trackers:MLflow",
    ("callback", "tensorboard"): "run.trackers:TensorBoard",
    ("callback", "wandb"): "run.trackers:WandB",
    ("table source", ".parquet"): "tables.columnar:open_parquet",  # tasks/table_files.py
    ("table source", ".gz"): "tables.packed:open_gzip",
    ("table source", ".zip"): "tables.packed:open_zip",
    ("table source", ".xlsx"): "tables.spreadsheet:open_xlsx",
    ("cells", "since"): "tables.durations:durations",  # tasks/table_files.py
    ("rows", "query"): "tables.queries:query_results",  # tasks/table_files.py
    ("query", "scaling"): "questions.scaling:SCALING_QUERY",  # run/queries.py
    ("query", "evaluation"): "questions.evaluation:EVALUATIONS",
    ("query", "layers"): "personal.layers_query:LAYERS",
    ("query", "personal"): "personal.simulation:PERSONAL_MODELS",
    ("query", "answer"): "questions.client:answer",  # client/app.py
    ("personal", "training"): "personal.training:own_training_of",  # questions/evaluation.py
    ("personal", "gains"): "personal.gains_at_client:gains_at",  # questions/client.py
    ("released figures", "held_out"): "tables.held_out:held_out_fields",
    ("released figures", "intervals"): "tables.intervals:interval_fields",  # run/run.py
    ("prediction columns", "interval"): "tables.intervals:interval_columns",  # cli/predict.py
    ("query", "counts"): "questions.answers:counts_of",  # simulations/clients.py
}


def names(point: str) -> tuple[str, ...]:
    """Return the names of an extension point's extensions, installed or not."""
    return tuple(name for each, name in TABLE if each == point)


def installed(point: str, name: str) -> bool:
    """Return whether this installation has an extension: the package of its module exists, which is not imported."""
    return bool(find_spec(_room(point, name)))


def _room(point: str, name: str) -> str:
    """Return the package that contains an extension's module, such as `fedveil.tasks.shipped`."""
    return f"{PACKAGE}.{TABLE[point, name].rpartition('.')[0]}"


def extension(point: str, name: str, field: str, value: object) -> Any:
    """Return an extension's object or module, which is imported when it is first used.

    Args:
      point: extension point, such as `task`.
      name: name of the extension there.
      field: key of the configuration that requests it, for a refusal.
      value: value of that key.

    Raises:
      Refusal: this installation does not have it.
    """
    if not installed(point, name):
        remedy = f"needs {_room(point, name)}, which is missing here: install all of fedveil, or change this"
        raise Refusal(field, value, remedy)
    module_name, _, attribute = TABLE[point, name].partition(":")
    module = import_module(f"{PACKAGE}.{module_name}")
    return getattr(module, attribute) if attribute else module
