"""Protection of whole clients for a job of NVFLARE's recipes, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode
from nvflare.app_common.widgets.convert_to_fed_event import ConvertToFedEvent
from nvflare.app_common.widgets.intime_model_selector import IntimeModelSelector
from nvflare.app_common.widgets.metrics_artifact_writer import MetricsArtifactWriter
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.client.config import ExchangeFormat
from nvflare.recipe.spec import Recipe

from ...base.extensions import PACKAGE
from ...base.notice import warn
from ...base.refusal import Refusal
from ...privacy.budget import Budget
from .job_terms import JobTerms
from .private_aggregator import PrivateAggregator, ReservedTask
from .quiet_executor import QuietExecutor
from .update_filter import UpdateFilter

SERVER = "server"  # NVFLARE's name of the server among a job's targets
# Parts that send clients' metrics, and parts of the server that wait for them and warn in each round.
OF_METRICS = (ConvertToFedEvent, IntimeModelSelector, MetricsArtifactWriter)
# What a controller of averages may not have, and why.
UNUSABLE = {
    "aggregator": "the private sum takes its place; leave it out",
    "aggregation_weights": "a weight multiplies what one client can change; leave it out, and all weigh the same",
    "exclude_vars": "all floating-point arrays are in the sum; leave it out",
    "stop_cond": "no budget covers the clients' metrics; leave it out",
}


def protect_recipe(
    recipe: Recipe,
    *,
    data_id: str,
    population: int,
    budget: Budget,
    clipping_norm: float,
    ledger_dir: Path | str | None = None,
    allow_large_delta: bool = False,
    accept_vacuous: bool = False,
    parameters: int | None = None,
) -> None:
    """Make a recipe's job a private one: call it once the recipe is complete, before it is exported or run.

    The recipe is one of `FedAvg` with NumPy as the format at the server: `FedAvgRecipe` of PyTorch, `NumpyFedAvgRecipe`,
    `FedProxRecipe`. Rounds and clients of a round are the recipe's. Each site needs fedveil beside NVFLARE.

    Args:
      recipe: changed in place.
      data_id: names the clients' data, and so their ledger at the server; a later job with the same name continues the
        same budget. Letters, digits, `-`, `_` and `.`, at most 64.
      population: number of clients that may connect, a public number.
      budget: at the client level, for all releases on this ledger.
      clipping_norm: L2 norm of the largest update, all parameters together.
      ledger_dir: an absolute folder at the server; None is the default of the server's user.
      allow_large_delta: accept a delta above one over the population.
      accept_vacuous: accept a vacuous guarantee.
      parameters: number of the model's, at least 1. A small model learns from fewer than 30 clients; None refuses these.

    Raises:
      Refusal: an argument is invalid, or the job has a part whose output no release covers.
    """
    inside: Any = recipe  # what NVFLARE's own helpers of recipes use too has no public name
    inside._ensure_client_apps_prepared()
    job = inside._job
    controller_id, controller = require_accountable(job, ())
    terms = JobTerms(
        data_id,
        population,
        controller.num_clients,
        controller.num_rounds,
        clipping_norm,
        budget.target_epsilon,
        budget.target_delta,
        str(budget.adjacency),
        str(budget.unit),
        ledger_dir and str(ledger_dir),
        allow_large_delta,
        accept_vacuous,
        parameters,
    )
    _, warning = terms.plan()
    if warning:
        warn(warning)
    task = str(controller.task_name)
    aggregator, reserved = PrivateAggregator(asdict(terms)), ReservedTask(task, controller_id)
    update = UpdateFilter(clipping_norm, task)
    controller.aggregator = aggregator
    controller._ignore_result_error = True  # else one client's failure ends the job, which all others see
    recipe.add_server_output_filter(reserved, tasks=[task])
    recipe.add_client_input_filter(update, tasks=[task])
    recipe.add_client_output_filter(update, tasks=[task])
    for app in (job._deploy_map[SERVER].app_config, *client_apps(job)):
        app.components = {k: v for k, v in app.components.items() if not isinstance(v, OF_METRICS)}
    for app in client_apps(job):
        for each in app.executors:
            each.tasks = [task]  # any other is unknown to the client
            each.executor.__class__ = QuietExecutor  # with all that the recipe has set
    _leave_out_own_files(job.job)
    check = inside._validate_before_use

    def validate() -> None:
        require_accountable(job, (aggregator, reserved, update))
        check()

    inside._validate_before_use = validate


def _leave_out_own_files(config: Any) -> None:
    """Let the export of a job copy no file of fedveil, which each site has installed.

    The packages that NVFLARE leaves out must lie in a folder of their name, which a checkout need not.
    """
    config.set_app_packages([*config.app_packages, PACKAGE])
    copy_file = config._get_custom_file

    def copy_others(folder: str, module: str, *more: Any, **options: Any) -> None:
        if module.partition(".")[0] != PACKAGE:
            copy_file(folder, module, *more, **options)

    config._get_custom_file = copy_others


def require_accountable(job: Any, own: Sequence[object]) -> tuple[str, Any]:
    """Return the id and the controller of a job, all of whose output a private sum covers.

    Args:
      job: of NVFLARE, with its apps.
      own: parts that `protect_recipe` has added.

    Raises:
      Refusal: a part of the job sends clients' data otherwise.
    """
    server = job._deploy_map[SERVER].app_config
    flows = [(each.id, each.controller) for each in server.workflows]
    if len(flows) != 1 or type(flows[0][1]) is not FedAvg:
        names = [type(controller).__name__ for _, controller in flows]
        remedy = "a protected job has one workflow, NVFLARE's FedAvg; no release covers what another collects"
        raise Refusal("workflows", names, remedy)
    controller: Any = flows[0][1]
    for name, remedy in UNUSABLE.items():
        value = getattr(controller, name)
        if value and not _among(value, own):
            raise Refusal(name, value, remedy)
    for app in (server, *client_apps(job)):
        for _, filters in (*app.task_data_filters, *app.task_result_filters):
            for each in filters:
                if not _among(each, own):
                    remedy = "the filters of the private sum take its place; remove it"
                    raise Refusal("filter", type(each).__name__, remedy)
    for app in client_apps(job):
        _check_client(app, [str(controller.task_name)] if own else [])
    return flows[0]


def client_apps(job: Any) -> list[Any]:
    """Return the configurations of a job's client apps: one for all sites, or one for each."""
    return [app.app_config for target, app in job._deploy_map.items() if target != SERVER]


def _check_client(app: Any, tasks: list[str]) -> None:
    """Refuse a client app that sends anything but the result of its script's task.

    Args:
      app: configuration of the app.
      tasks: those of its executors in a job that is protected, from which the parts that can be taken off are off; empty before.
    """
    for name, each in app.components.items():
        if tasks or not isinstance(each, ConvertToFedEvent):
            remedy = f"{type(each).__name__} may send what no release covers; remove it from the clients"
            raise Refusal("components", name, remedy)
    for each in app.executors:
        if not isinstance(each.executor, ClientAPIExecutor):
            remedy = "a protected job runs one script at each client, and no validator or learner; remove it"
            raise Refusal("executor", type(each.executor).__name__, remedy)
        if tasks and (not isinstance(each.executor, QuietExecutor) or each.tasks != tasks):
            remedy = (
                "it was added to a protected job; complete the recipe first, and call protect_recipe last"
            )
            raise Refusal("executor", type(each.executor).__name__, remedy)
        executor: Any = each.executor
        if executor._execution_mode == ExecutionMode.ATTACH:
            remedy = "a protected job starts its script itself, in the client's process or in one of its own"
            raise Refusal("execution_mode", executor._execution_mode, remedy)
        if executor._server_expected_format != ExchangeFormat.NUMPY:
            remedy = "the private sum adds arrays of NumPy; set it to ExchangeFormat.NUMPY"
            raise Refusal("server_expected_format", executor._server_expected_format.value, remedy)


def _among(part: object, own: Sequence[object]) -> bool:
    return any(part is each for each in own)
