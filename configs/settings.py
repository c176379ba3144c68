"""Settings of a run: what Hydra composed, validated by the models of `schema`, or one sentence for each mistake."""

import re
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from ..base.refusal import Refusal
from .compose import Job, compose_overrides, read_job
from .group import mistakes_of
from .overrides import targets
from .schema import FederationSettings, SimulationSettings
from .strict import Mistakes
from .yaml_guard import check_file

CUSTOM = "custom"  # option of the task group for a user's own class
# An interpolation of OmegaConf: the key to which it refers, and the value if that key does not exist.
REFERENCE = re.compile(r"\$\{(?:oc\.select:)?(\w+(?:\.\w+)*)(?:,([\w.]+))?\}")
Model = TypeVar("Model", bound=FederationSettings)


def settings_from_overrides(overrides: Sequence[str]) -> SimulationSettings:
    """Return the settings of ``fedveil simulate`` followed by these Hydra overrides. Errors as of `validated`."""
    return settings_of(compose_overrides(overrides, from_config))


def settings_of(job: Job) -> SimulationSettings:
    """Return a job's settings. A resumed run has its earlier ones; only its reason may be new. Errors as of `validated`."""
    settings = read_job(job, from_config)
    if settings.resume is None:
        return settings
    others = [each for each in job.overrides if not each.startswith(("resume=", "reason=", "hydra."))]
    if others:
        remedy = f"continues a run as it was configured; drop {' '.join(others)}"
        raise Refusal("resume", settings.resume, remedy)
    saved = Path(settings.resume) / "config.yaml"
    if not saved.is_file():
        fault = "holds no config.yaml" if saved.parent.is_dir() else "is not there"
        raise Refusal("resume", settings.resume, f"{fault}; name the folder of an earlier run")
    check_file(saved)
    earlier = OmegaConf.load(saved)
    if not isinstance(earlier, DictConfig):
        raise Refusal("resume", settings.resume, "its config.yaml is not a group of keys")
    return from_config(earlier).model_copy(update={"resume": settings.resume, "reason": settings.reason})


def from_config(cfg: DictConfig) -> SimulationSettings:
    """Return the settings of a simulation. Errors as of `validated`."""
    return validated(SimulationSettings, cfg)


def publishable_keys(source: str | DictConfig) -> dict[str, Any]:
    """Return a configuration with its references to other keys resolved; other interpolations stay: they may read a secret."""
    plain: Any = OmegaConf.to_container(OmegaConf.create(source), resolve=False)

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): resolve(each) for key, each in value.items()}
        if isinstance(value, list):
            return [resolve(each) for each in value]
        reference = REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if reference is None:
            return value
        try:
            return resolve(reduce(getitem, reference[1].split("."), plain))
        except (LookupError, TypeError, RecursionError):  # the key is missing, or of another release
            return value if reference[2] is None else yaml.safe_load(reference[2])

    return resolve(plain)


def differing(before: Mapping[str, object], now: Mapping[str, object], path: str = "") -> str | None:
    """Return the first dotted key at which two configurations differ; None if they are equal. `path` is above both."""
    for key in sorted({*before, *now}):
        old, new, here = before.get(key), now.get(key), f"{path}.{key}" if path else key
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if (key_path := differing(old, new, here)) is not None:
                return key_path
        elif old != new:
            return here
    return None


def _with_custom_task(cfg: DictConfig) -> DictConfig:
    """Return a configuration in which a user's own option, such as task/hosp.yaml, is the option `custom`.

    The option's file needs only `target` and `args`. The run is named by its key `label` or `name`, else by the file's name.
    """
    task = OmegaConf.to_container(cfg.get("task") or OmegaConf.create(), resolve=False)
    assert isinstance(task, dict)
    if not task.get("target") or task.get("name") == CUSTOM:
        return cfg
    hydra: Any = HydraConfig.get() if HydraConfig.initialized() else OmegaConf.create()
    file_name = OmegaConf.select(hydra, "runtime.choices.task")
    defaults: Any = OmegaConf.load(Path(__file__).parent / "task" / f"{CUSTOM}.yaml")
    del defaults["defaults"]  # Hydra's list
    copy: Any = OmegaConf.merge(cfg)
    OmegaConf.set_struct(copy, False)
    custom = {"name": CUSTOM, "label": task.get("label") or task.get("name") or file_name}
    copy["task"] = OmegaConf.merge(defaults, task, custom)
    overrides = OmegaConf.select(hydra, "overrides.task") or []  # those of the whole command line
    if "partition" in copy and not any(str(each).startswith("partition") for each in overrides):
        copy["partition"] = {"name": "natural"}  # as the option custom chooses it
    return copy


def validated(model: type[Model], cfg: DictConfig) -> Model:
    """Return the settings that a model reads from a composed configuration (without Hydra's own node).

    Raises:
        Mistakes: a Refusal with one sentence for each mistake.
    """
    cfg = _with_custom_task(cfg)
    unresolved, values = _plain(cfg)
    remedy = "classes are not named here; use a registered name, or name=custom with 'target'"
    # fedveil instantiates no _target_, so none may stand in its own groups.
    mistakes = [Refusal(path, "...", remedy) for path, _ in targets(values)]
    source = OmegaConf.to_yaml(cfg, resolve=False)
    try:
        settings = model.model_validate({**values, "source": source})
    except ValidationError as error:
        refusals = mistakes_of(error, model, unresolved).each
        # As an unknown key a _target_ would be reported twice.
        others = [each for each in refusals if not (mistakes and each.field.endswith("_target_"))]
        raise Mistakes([*mistakes, *others]) from None
    if mistakes:
        raise Mistakes(mistakes)
    return settings


def _plain(cfg: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration as plain values, unresolved (an interpolation can hide a secret) and resolved."""
    unresolved = OmegaConf.to_container(cfg, resolve=False)
    try:
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            raise Mistakes([Refusal(key, "???", "must be given a value") for key in missing])
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error.msg).splitlines()[0]
        raise Mistakes([Refusal(str(error.full_key), "${...}", f"cannot be resolved: {reason}")]) from None
    if not isinstance(values, dict) or not isinstance(unresolved, dict):
        raise Mistakes([Refusal("config", "a list", "must be a group of keys")])
    return {str(k): each for k, each in unresolved.items()}, {str(k): each for k, each in values.items()}
