"""Models of the configuration: the shipped YAML files say what they say, and Python makes them with keywords."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import fedveil.configs
from fedveil.audit.settings import FullAudit, LightAudit, NoAudit
from fedveil.configs import schema
from fedveil.configs.compose import compose_overrides
from fedveil.configs.engine_settings import InProcess
from fedveil.configs.group import Group
from fedveil.configs.privacy_settings import ClientCentral, Record, RecordAndClient
from fedveil.configs.schema import SimulationSettings
from fedveil.configs.settings import settings_from_overrides
from fedveil.configs.task_settings import CORE_TASKS
from fedveil.deployment.settings import LinkSettings, ServerSettings
from fedveil.engines.settings import Ray
from fedveil.evidence.settings import CostSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.personal.settings import Layers, NoPersonal, PersonalSettings
from fedveil.privacy.budget import Adjacency
from fedveil.questions.settings import EvaluateSettings
from fedveil.tasks.shipped.settings import TASKS
from fedveil.text.settings import AdapterSettings, TextSettings

FOLDER = Path(fedveil.configs.__file__).parent
# Values that suit the task, and have no default of their own.
OF_TASK = {
    "num_clients",
    "learning_rate",
    "dp_sgd_learning_rate",
    "step_learning_rate",
    "local_epochs",
    "clipping_norm",
    "longest_update",
}
OF_EXTENSIONS = {"cost": CostSettings(), "evaluate": EvaluateSettings()}
TARGET = {
    "task/custom": {"target": "mine:Task"},
    "personal/layers": {"layers": ["head.*"]},
    "partition/flwr": {"target": "flwr_datasets.partitioner.IidPartitioner"},
}


def options() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(FOLDER.glob("*/*.yaml")):
        values = yaml.safe_load(file.read_text())
        nested = [
            each
            for each in values.pop("defaults", ())
            if isinstance(each, dict) and "/adapter@adapter" in each
        ]
        for each in nested:
            values["adapter"] = yaml.safe_load(
                (FOLDER / f"adapter/{each['/adapter@adapter']}.yaml").read_text()
            )
        yield f"{file.parent.name}/{file.stem}", values.get("privacy", values)


def model_of(group: str, name: str) -> type[Group]:
    if group == "link":
        return LinkSettings
    kinds = {
        "engine": (InProcess, Ray),
        "task": (*get_args(TASKS), *get_args(CORE_TASKS), TextSettings),
        "adapter": (AdapterSettings,),
        "secagg": (schema.SecaggSettings, schema.NoSecagg),
        "audit": (LightAudit, FullAudit, NoAudit),
        "compress": (schema.CompressionSettings, schema.NoCompression),
        "tune": get_args(schema.TuningSettings),
        "personal": (NoPersonal, *get_args(PersonalSettings), Layers),
    }
    known = kinds.get(group) or get_args(getattr(schema, f"{group.capitalize()}Settings"))
    (found,) = [kind for kind in known if name in get_args(kind.model_fields["name"].annotation)]
    return found


@pytest.mark.parametrize(
    ("option", "values"), list(options()), ids=lambda each: each if isinstance(each, str) else ""
)
def test_an_options_file_says_the_models_defaults(option: str, values: dict[str, Any]) -> None:
    group = option.partition("/")[0]
    own = TARGET.get(option, {})
    model = model_of(group, values["name"])(name=values["name"], **own)
    said = {key: value for key, value in differing_from_task(group, values).items() if key not in own}
    defaults = model.model_dump(mode="json", by_alias=True)
    assert set(values) == set(defaults), "every key stands in the file, so that Hydra knows it"
    assert said == {key: pick(defaults, key, said[key]) for key in said}


def differing_from_task(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a model can know by itself."""
    if group == "task":
        return {key: value for key, value in values.items() if key not in OF_TASK}
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            plain[key] = differing_from_task(group, value)
        elif not str(value).startswith("${"):
            plain[key] = value
    return plain


def pick(defaults: Mapping[str, Any], key: str, like: Any) -> Any:
    found = defaults[key]
    return (
        {each: pick(found, each, like[each]) for each in like} if isinstance(like, dict) and like else found
    )


@pytest.mark.parametrize(("file", "model"), [("config", SimulationSettings), ("server", ServerSettings)])
def test_the_primary_files_say_the_models_defaults(file: str, model: type[Group]) -> None:
    found = {
        **yaml.safe_load((FOLDER / "shared.yaml").read_text()),
        **yaml.safe_load((FOLDER / f"{file}.yaml").read_text()),
    }
    training = LocalTraining()
    for key in set(found) - {"defaults", "hydra"}:
        if str(found[key]).startswith("${"):
            continue
        default = (vars(training) | OF_EXTENSIONS).get(key, None)
        if default is None:
            default = model.model_fields[key].get_default()
        plain = (
            default.model_dump(mode="json")
            if isinstance(default, Group)
            else list(default)
            if isinstance(default, tuple)
            else default
        )
        assert found[key] == plain, key


def test_models_take_keywords_and_the_shipped_defaults() -> None:
    client = ClientCentral(target_epsilon=1.0, clipping_norm=2.0)
    assert (client.target_delta, client.adjacency, client.noise) == (1e-4, Adjacency.ZERO_OUT, "independent")
    both = RecordAndClient(record=Record(target_epsilon=8.0), client=client)
    assert (both.record.target_delta, both.client) == (1e-5, client)
    assert FullAudit().looks == 10


@pytest.mark.parametrize(
    ("asked", "norm"), [(["task=heart"], 5.0), (["task=digits"], 50.0), (["task.longest_update=7"], 7.0)]
)
@pytest.mark.parametrize("secagg", ["masked", "auto"])
def test_encryption_alone_clips_to_the_plan_of_the_task(asked: list[str], norm: float, secagg: str) -> None:
    masked = settings_from_overrides(["privacy=none", f"secagg={secagg}", *asked]).secagg
    assert isinstance(masked, schema.SecaggSettings) or masked is None
    dumped = compose_overrides(["privacy=none", f"secagg={secagg}", *asked]).config
    assert dumped.secagg.clipping_norm == norm
    assert masked is None or masked.clipping_norm == norm


def test_a_dump_is_the_group_of_the_file() -> None:
    settings = settings_from_overrides(["privacy=record", "cohort=fixed", "secagg=masked"])
    dumped = settings.model_dump(mode="json", by_alias=True)
    composed = compose_overrides(["privacy=record", "cohort=fixed", "secagg=masked"]).config
    for group in (
        "privacy",
        "cohort",
        "secagg",
        "audit",
        "task",
        "strategy",
        "engine",
        "partition",
        "faults",
    ):
        assert dumped[group] == dict(composed[group]), group
