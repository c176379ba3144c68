"""Recipes of NVFLARE, protected: what is refused, what stands in the job, and one job in NVFLARE's simulator."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.workspace import Workspace
from nvflare.app_common.aggregators.collect_and_assemble_model_aggregator import (
    CollectAndAssembleModelAggregator,
)
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_common.widgets.convert_to_fed_event import ConvertToFedEvent
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.app_opt.pt.recipes.fedprox import FedProxRecipe
from nvflare.app_opt.pt.recipes.scaffold import ScaffoldRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.private.fed.app.fl_conf import create_privacy_manager
from nvflare.recipe.spec import Recipe
from nvflare.recipe.utils import add_cross_site_evaluation
from shared.runs import reservations

from fedveil.adapters.nvflare.protect_recipe import protect_recipe
from fedveil.adapters.nvflare.update_filter import UpdateFilter
from fedveil.base.refusal import Refusal
from fedveil.privacy.budget import Budget
from fedveil.privacy.ledger.ledger import verify

SCRIPT = """
import nvflare.client as flare
from nvflare.client.tracking import SummaryWriter

flare.init()
writer = SummaryWriter()
while flare.is_running():
    model = flare.receive()
    if flare.get_site_name() == "site-3":
        raise ValueError("patient 17")
    writer.add_scalar(tag="loss", scalar=0.987654, global_step=model.current_round)
    params = {name: value + 0.25 for name, value in model.params.items()}
    meta = {"NUM_STEPS_CURRENT_ROUND": 432198765}
    flare.send(flare.FLModel(params=params, metrics={"accuracy": 0.123456}, meta=meta))
"""
ROOT = Path(__file__).parents[3]
BUDGET = Budget("client", 1000.0, 1e-2)  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder with the script of a client."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client.py").write_text(SCRIPT)
    return tmp_path


def of_numpy(**more: Any) -> Recipe:
    keys: dict[str, Any] = {
        "model": [[1.0, 2.0], [3.0, 4.0]],
        "min_clients": 3,
        "num_rounds": 2,
        "train_script": "client.py",
    }
    return NumpyFedAvgRecipe(name="shops", **keys | more)


def of_torch(kind: type[Recipe] = FedAvgRecipe, **more: Any) -> Recipe:
    net = {"class_path": "torch.nn.Linear", "args": {"in_features": 2, "out_features": 1}}
    keys: dict[str, Any] = {"model": net, "min_clients": 3, "num_rounds": 2, "train_script": "client.py"}
    return kind(name="shops", **keys | more)  # pyright: ignore[reportCallIssue]


def protect(recipe: Recipe, **more: Any) -> Recipe:
    terms: dict[str, Any] = {"data_id": "shops", "population": 3, "budget": BUDGET, "clipping_norm": 1.0}
    protect_recipe(recipe, **terms | {"accept_vacuous": True} | more)
    return recipe


def with_filter() -> Recipe:
    recipe = of_numpy()
    recipe.add_client_output_filter(PercentilePrivacy(), tasks=["train"])
    return recipe


def with_cross_site_evaluation() -> Recipe:
    recipe = of_numpy()
    add_cross_site_evaluation(recipe)
    return recipe


def with_streamed_logs() -> Recipe:
    recipe = of_numpy()
    recipe.enable_log_streaming()
    return recipe


def attached() -> Recipe:
    recipe: Any = of_numpy()
    executor = ClientAPIExecutor(execution_mode=ExecutionMode.ATTACH, attach_id="own")
    recipe._prepare_client_apps = lambda: recipe._job.to_clients(executor, tasks=["train"])
    return recipe


REFUSED: dict[str, tuple[Callable[[], Recipe], str]] = {
    "scaffold": (lambda: of_torch(ScaffoldRecipe), r"workflows=\['Scaffold'\]: a protected job has one"),
    "cross-site evaluation": (with_cross_site_evaluation, r"workflows=\['FedAvg', 'CrossSiteModelEval'\]"),
    "own aggregator": (lambda: of_numpy(aggregator=CollectAndAssembleModelAggregator("x")), "aggregator="),
    "weights": (lambda: of_numpy(aggregation_weights={"site-1": 2.0}), "aggregation_weights="),
    "excluded arrays": (lambda: of_torch(exclude_vars="bias"), "exclude_vars='bias'"),
    "a stop by metrics": (lambda: of_torch(stop_cond="accuracy >= 80"), "stop_cond='accuracy >= 80'"),
    "a filter": (with_filter, "filter='PercentilePrivacy': the filters of the private sum take its place"),
    "logs": (with_streamed_logs, "components=.*JobLogStreamer may send what no release covers"),
    "attached": (attached, "execution_mode='attach': a protected job starts its script itself"),
    "tensors": (
        lambda: of_torch(server_expected_format=ExchangeFormat.PYTORCH),
        "server_expected_format='pytorch': the private sum adds arrays of NumPy",
    ),
}


@pytest.mark.parametrize(("recipe", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_part_that_no_release_covers_is_refused(recipe: Callable[[], Recipe], sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        protect(recipe())


def test_a_job_is_refused_where_its_recipe_is_written(home: Path) -> None:
    with pytest.raises(Refusal, match="population=3: this guarantee is vacuous"):
        protect(of_numpy(), accept_vacuous=False)
    with pytest.raises(Refusal, match="population=2: a round has 3 clients"):
        protect(of_numpy(), population=2)
    records = Budget("record", 8.0, 1e-2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(Refusal, match=r"budget\.unit='record': a private sum hides whole clients"):
        protect(of_numpy(), budget=records)
    with pytest.raises(Refusal, match="aggregator="):
        protect(protect(of_numpy(), clipping_norm=1))
    assert not list(home.rglob("*.ledger"))


def added(page: Path) -> list[str]:
    """Return the lines that the page adds to a job, edit by edit."""
    edits = re.findall(r"^```diff job.py\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return ["\n".join(line[1:] for line in edit.splitlines() if line[0] == "+") for edit in edits]


def test_the_two_edits_of_the_page_protect_a_recipe(home: Path) -> None:
    imports, call = added(ROOT / "docs" / "nvflare.md")
    recipe = of_torch()
    exec(imports + "\n" + textwrap.dedent(call), {"recipe": recipe, "n_clients": 3})  # noqa: S102 (the page's own lines)
    recipe.export(str(home / "jobs"))
    (flow,) = configuration(home, "server")["workflows"]
    terms = flow["args"]["aggregator"]["args"]["terms"]
    assert (terms["data_id"], terms["target_epsilon"], terms["clients"]) == ("clinics-2026", 8.0, 3)


def site_filters(home: Path) -> list[Any]:
    """Return the filters of a site, as NVFLARE builds them from the page's file for it."""
    (text,) = re.findall(
        r"^```json\n(.*?)^```$", (ROOT / "docs" / "nvflare.md").read_text(), re.DOTALL | re.MULTILINE
    )
    for name in ("startup", "local"):
        (home / "site" / name).mkdir(parents=True)
    (home / "site" / "local" / "privacy.json").write_text(text)
    manager = create_privacy_manager(Workspace(str(home / "site"), "site-1"), names_only=False)
    scope: Any = manager.get_scope(None)
    return [*scope.task_data_filters["in"], *scope.task_result_filters["out"]]


def test_the_file_of_a_site_has_the_filter_on_both_chains(home: Path) -> None:
    filters = site_filters(home)
    chains = [each.get_prop(FilterContextKey.CHAIN_TYPE) for each in filters]
    assert chains == [FilterChainType.TASK_DATA_CHAIN, FilterChainType.TASK_RESULT_CHAIN]
    assert all(isinstance(each, UpdateFilter) and each.clipping_norm == 1.0 for each in filters)


def test_a_part_that_is_added_later_is_refused_too(home: Path) -> None:
    recipe = protect(of_numpy())
    add_cross_site_evaluation(recipe)
    with pytest.raises(Refusal, match="workflows="):
        recipe.export(str(home / "jobs"))
    assert not (home / "jobs").exists()


LATER: dict[str, tuple[Callable[[], object], dict[str, Any], str]] = {
    "a stream of metrics": (
        lambda: ConvertToFedEvent(events_to_convert=["analytix_log_stats"]),
        {},
        "components='again': ConvertToFedEvent may send what no release covers",
    ),
    "an executor": (
        lambda: ClientAPIExecutor(
            execution_mode="external_process",
            command="python client.py",
            server_expected_format=ExchangeFormat.NUMPY,
        ),
        {"tasks": ["validate"]},
        "executor='ClientAPIExecutor': it was added to a protected job",
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_a_part_of_the_clients_that_is_added_later_is_refused(name: str, home: Path) -> None:
    """The call takes metrics off a recipe's own parts; of later ones nobody would."""
    make, more, sentence = LATER[name]
    recipe = protect(of_numpy())
    job: Any = recipe
    job._job.to_clients(make(), id="again", **more)
    with pytest.raises(Refusal, match=sentence):
        recipe.export(str(home / "jobs"))


def configuration(home: Path, name: str) -> dict[str, Any]:
    return json.loads(next(home.rglob(f"config_fed_{name}.json")).read_text())


@pytest.mark.parametrize("kind", [FedAvgRecipe, FedProxRecipe])
def test_the_job_has_filters_at_both_ends_and_no_metrics(kind: type[Recipe], home: Path) -> None:
    protect(of_torch(kind)).export(str(home / "jobs"))
    client, server = configuration(home, "client"), configuration(home, "server")
    room = "fedveil.adapters.nvflare"
    update = {"path": f"{room}.update_filter.UpdateFilter", "args": {"clipping_norm": 1.0}}
    chain = [{"tasks": ["train"], "filters": [update]}]
    assert client["task_data_filters"] == client["task_result_filters"] == chain
    (executor,) = client["executors"]
    assert executor["tasks"] == ["train"] and client["components"] == []
    assert executor["executor"]["path"] == f"{room}.quiet_executor.QuietExecutor"
    assert executor["executor"]["args"]["task_script_path"] == "client.py"
    reserved = {"path": f"{room}.private_aggregator.ReservedTask", "args": {}}
    assert server["task_data_filters"] == [{"tasks": ["train"], "filters": [reserved]}]
    (flow,) = server["workflows"]
    assert flow["args"]["aggregator"]["path"] == f"{room}.private_aggregator.PrivateAggregator"
    assert flow["args"]["aggregator"]["args"]["terms"]["data_id"] == "shops"
    assert flow["args"]["ignore_result_error"] is True
    assert not [each for each in server["components"] if "model_selector" in each["id"]]
    assert not list((home / "jobs").rglob("fedveil")), "the package is installed, and no copy is sent"


def test_each_site_with_settings_of_its_own_has_the_filters(home: Path) -> None:
    recipe = of_numpy()
    recipe.set_per_site_config({f"site-{n}": {"train_args": f"--rate 0.{n}"} for n in (1, 2, 3)})
    protect(recipe).export(str(home / "jobs"))
    sites = [json.loads(path.read_text()) for path in (home / "jobs").rglob("config_fed_client.json")]
    assert len(sites) == 3
    for site in sites:
        (data,), (result,) = site["task_data_filters"], site["task_result_filters"]
        assert data == result and data["filters"][0]["path"].endswith("UpdateFilter")
        assert not site["components"] and [each["tasks"] for each in site["executors"]] == [["train"]]


def test_a_job_in_the_simulator_leaves_a_ledger_and_no_metric(home: Path) -> None:
    recipe = protect(of_numpy(), data_id="simulated", ledger_dir=str(home / "ledgers"))
    recipe.export(str(home / "jobs"))
    command = [
        sys.executable,
        "-m",
        "nvflare.private.fed.app.simulator.simulator",
        str(home / "jobs" / "shops"),
    ]
    command += ["-w", str(home / "work"), "-n", "3", "-t", "3"]
    done = subprocess.run(
        command, cwd=home, env=dict(os.environ), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (home / "ledgers").glob("*.ledger")
    assert [each["rng"] for each in reservations(path)] == ["system", "system"] and verify(path)
    model = np.load(next((home / "work").rglob("server.npy")))
    assert model.dtype == np.float32
    np.testing.assert_allclose(model, [[1 + 1 / 3, 2 + 1 / 3], [3 + 1 / 3, 4 + 1 / 3]], atol=0.1)
    log = next((home / "work" / "server").rglob("log.txt")).read_text()
    assert "round 2: 3 clients planned; epsilon" in log
    assert not [each for each in ("0.987654", "0.123456", "432198765", "patient 17") if each in log]
