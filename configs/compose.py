"""Composition by Hydra: all jobs of a command line are composed and their mistakes reported before any file is written.

Hydra's public Compose API knows neither ``--config-dir`` nor sweeps, so this file (and no other) uses Hydra's
own parser, sweeper and loader from ``hydra._internal``; the version is pinned below 1.4 and tests hold it.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import hydra._internal.utils
import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser, run_and_report
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..base.extensions import TABLE
from ..base.refusal import Refusal
from ..messages.local_training import OPTIMIZERS
from . import overrides as lint
from .strict import Mistakes
from .training_settings import STRATEGIES
from .yaml_guard import check_directory, yaml_sentence

Settings = TypeVar("Settings")
Reader = Callable[[DictConfig], object]  # raises the mistakes of a configuration; the result is not used

SHIPPED_CONFIGS = "pkg://fedveil.configs"
BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
PRIMARY = "config"
CONSTRUCTOR_ARGUMENTS = ("task.args.", "strategy.parameters.", "partition.args.")  # prefixes of their keys
OF_TASK = "group of "  # extension point of the groups of a task
TASK_OF_GROUP = {name: point.removeprefix(OF_TASK) for point, name in TABLE if point.startswith(OF_TASK)}
TASK_GROUP = re.compile(rf"^(?:task\.)?({'|'.join(TASK_OF_GROUP)})(=|\.)")
PATHS = {"=": "{0}@task.{0}=", ".": "task.{0}."}  # of a choice in such a group, and of a key
VERSION_BASE = "1.3"
# Errors of Hydra, OmegaConf and the YAML parser for a file or a key that cannot be composed.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, *lint.READING_ERRORS)


class _Parser(argparse.ArgumentParser):
    """Parser that accepts Hydra's non-string help texts, which Python 3.14 checks on adding an argument."""

    def _check_help(self, action: argparse.Action) -> None:
        pass


if sys.version_info >= (3, 14):
    vars(hydra._internal.utils)["argparse"] = SimpleNamespace(ArgumentParser=_Parser)


class OwnConfigs(SearchPathPlugin):
    """Plugin that puts this package's options last in the search path, so that a user's own tree may leave them out."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("fedveil", SHIPPED_CONFIGS)


@dataclass(frozen=True)
class Job:
    """One composed job: its overrides without hydra.*, its configuration without Hydra's node, and that node."""

    overrides: tuple[str, ...]
    config: DictConfig
    hydra: DictConfig


def _store_tuned() -> None:
    """Store each row of tuned.yaml as an option of the group `tuned`; config.yaml chooses it by task and privacy."""
    table = yaml.safe_load((Path(__file__).parent / "tuned.yaml").read_text("utf-8"))
    for task, modes in table.items():
        for mode, keys in modes.items():
            node = OmegaConf.create()
            for key, value in keys.items():
                OmegaConf.update(node, key, value, force_add=True)
            ConfigStore.instance().store(f"{task}_{mode}", node, "tuned", "_global_", "fedveil")


def _store_models() -> None:
    """Store Hydra options: an optimizer takes any keyword of its torch class, a strategy the keys of its settings."""
    for name, rate in OPTIMIZERS.items():
        node = OmegaConf.create({"optimizer": {"name": name, "lr": None}})
        OmegaConf.set_struct(node.optimizer, name == "auto")
        if rate:
            node.learning_rate = rate
        ConfigStore.instance().store(name, node, "optimizer", "_global_", "fedveil")
    for name, model in STRATEGIES.items():
        keys = {key: each.get_default(call_default_factory=True) for key, each in model.model_fields.items()}
        needed = {key: "???" for key, each in model.model_fields.items() if each.is_required()}
        ConfigStore.instance().store(name, {"name": name, **keys, **needed}, "strategy", provider="fedveil")


_store_tuned()
_store_models()


def allow_arguments(argv: Sequence[str]) -> list[str]:
    """Return a command line as Hydra reads it.

    ++ stands before each argument of a user's class, a key that no shipped file can have. Groups of a task, such as
    `adapter`, and their keys get their path within the task.
    """
    argv = [TASK_GROUP.sub(lambda match: PATHS[match[2]].format(match[1]), each) for each in argv]
    return [f"++{each}" if each.startswith(CONSTRUCTOR_ARGUMENTS) else each for each in argv]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse Hydra's flags and the overrides; --config-path is relative to the working folder."""
    parser = get_args_parser()
    parser.prog = "fedveil"
    args = parser.parse_args(list(argv))
    args.overrides = allow_arguments(args.overrides)
    if args.experimental_rerun is not None:
        remedy = "reads a pickle; use resume=RUN instead"
        raise Refusal("--experimental-rerun", args.experimental_rerun, remedy)
    if args.config_path is not None and "://" not in args.config_path:
        args.config_path = os.path.abspath(args.config_path)
    return args


def compose_jobs(args: argparse.Namespace, read: Reader | None = None) -> list[Job]:
    """Compose each job of this command line, a sweep's in Hydra's own order.

    Args:
        args: result of `parse_arguments`.
        read: raises the mistakes of a configuration. It is called only for a job whose overrides Hydra refuses, with the
            other overrides, so that all mistakes are reported at once. None reports the refused overrides alone.

    Raises:
        Mistakes: one sentence for each mistake.
    """
    version.setbase(VERSION_BASE)
    setup_globals()
    loader = _loader(args)
    name = args.config_name or PRIMARY
    # Hydra cannot delete a group that names the option of another, `tuned`. Without its name it is read as missing too.
    overrides = [f"{each}.name" if each in ("~task", "~privacy") else each for each in args.overrides]
    parsed = lint.parse(overrides, loader)
    if bad_files := [each for folder in _directories(loader, overrides) for each in check_directory(folder)]:
        raise Mistakes(bad_files)
    jobs = _jobs_of_sweep(loader, name, parsed) if is_sweep(args) else [overrides]
    composed: list[Job] = []
    mistakes: list[Refusal] = []
    for job in jobs:
        try:
            composed.append(_compose(loader, name, job, read))
        except Refusal as mistake:
            mistakes += mistake.each if isinstance(mistake, Mistakes) else [mistake]
    if mistakes:
        raise Mistakes(unique(mistakes))
    return composed


def _jobs_of_sweep(loader: ConfigLoader, name: str, parsed: list[Override]) -> list[list[str]]:
    """Return the overrides of each job of a sweep.

    Hydra's own sweeper runs every combination. Others choose values during the sweep: of their search space two jobs are
    checked, that with the first value of each key and that with the last of each.
    """
    fixed = [lint.text_of(each) for each in parsed if not each.is_sweep_override()]
    try:
        sweeper = _load(loader, name, fixed).hydra.sweeper
    except COMPOSITION_ERRORS:
        # The mistake is reported when the jobs are composed.
        return BasicSweeper.split_arguments(parsed, None)[0]
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    overrides = [*lint.parse(params, loader), *parsed]
    if sweeper.get("_target_") == BASIC_SWEEPER:
        return BasicSweeper.split_arguments(overrides, None)[0]
    return [[lint.end_of(each, end) for each in overrides] for end in (0, -1)]


def is_sweep(args: argparse.Namespace) -> bool:
    """Return whether Hydra will run one job for each combination of values."""
    return args.multirun or "hydra.mode=MULTIRUN" in args.overrides


def compose_overrides(overrides: Sequence[str], read: Reader | None = None) -> Job:
    """Return the one job that these overrides make of the shipped configuration; arguments and errors as of `compose_jobs`."""
    return compose_jobs(parse_arguments(["--", *overrides]), read)[0]


def unique(mistakes: Sequence[Refusal]) -> list[Refusal]:
    """Return mistakes without repetitions, which the jobs of a sweep have."""
    return list({str(mistake): mistake for mistake in mistakes}.values())


def read_job(job: Job, read: Callable[[DictConfig], Settings]) -> Settings:
    """Read the job's configuration while ``${hydra:...}`` can be resolved in it."""
    hydra: Any = HydraConfig.instance()
    previous = hydra.cfg
    hydra.cfg = OmegaConf.create({"hydra": job.hydra})
    try:
        return read(job.config)
    finally:
        hydra.cfg = previous


def run_composed(job: Job, args: argparse.Namespace, folder: Path, task: Callable[[DictConfig], None]) -> int:
    """Call a function as Hydra's own run does, with its logging and callbacks; return 0, or Hydra's exit code if it fails.

    Hydra itself would compose the job twice more, so its loader gives it the composed configuration.

    Args:
        job: the only job of its command line.
        args: result of `parse_arguments`.
        folder: run folder.
        task: function that gets the job's configuration.
    """
    hydra: Any = job.hydra
    hydra.run.dir, hydra.mode = str(folder), RunMode.RUN

    def composed_configuration(**_: object) -> DictConfig:
        return hydra._get_parent()

    loader = _loader(args)
    vars(loader)["load_configuration"] = composed_configuration
    runner = Hydra("simulate", loader)
    GlobalHydra.instance().initialize(runner)
    try:
        run_and_report(lambda: runner.run(args.config_name or PRIMARY, task, args.overrides))
    except SystemExit as stop:  # Hydra has failed, and printed why
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        GlobalHydra.instance().clear()
    return 0


def _loader(args: argparse.Namespace) -> ConfigLoader:
    """Return Hydra's loader for the shipped configuration and the user's folders; refuse a folder that does not exist."""
    if OwnConfigs not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(OwnConfigs)
    search_path = create_config_search_path(args.config_path or SHIPPED_CONFIGS)
    if args.config_dir is not None:
        directory = os.path.abspath(args.config_dir)
        if not os.path.isdir(directory):
            raise Refusal("--config-dir", args.config_dir, "there is no such directory")
        search_path.prepend("command-line", f"file://{directory}", SearchPathQuery(provider="schema"))
    config_path = args.config_path or SHIPPED_CONFIGS
    if "://" not in config_path and not os.path.isdir(config_path):
        raise Refusal("--config-path", config_path, "there is no such directory")
    return ConfigLoaderImpl(config_search_path=search_path)


def _directories(loader: ConfigLoader, overrides: Sequence[str]) -> list[Path]:
    """Return the user's own directories in the search path, and those that an override hydra.searchpath adds."""
    paths = [element.path for element in loader.get_search_path().get_path()]
    for override in overrides:
        if override.startswith("hydra.searchpath="):
            paths += override.partition("=")[2].strip("[]'\"").split(",")
    return [Path(path.removeprefix("file://")) for path in paths if path.startswith("file://")]


def _compose(loader: ConfigLoader, name: str, overrides: Sequence[str], read: Reader | None) -> Job:
    """Compose one job, or raise all its mistakes: overrides that Hydra refuses, and what `read` raises for the others."""
    try:
        return _load(loader, name, overrides)
    except Refusal:
        raise
    except COMPOSITION_ERRORS as error:
        mistakes, others = _explain(loader, name, overrides)
        if not mistakes:
            raise _refusal_of(name, error) from None
    try:
        if read is not None:
            read(_load(loader, name, others).config)
    except Mistakes as more:
        mistakes += more.each
    except COMPOSITION_ERRORS:
        pass  # the others depend on the mistaken ones, and cannot be read without them
    raise Mistakes(mistakes)


def _explain(loader: ConfigLoader, name: str, overrides: Sequence[str]) -> tuple[list[Refusal], list[str]]:
    """Return the mistakes in the overrides of a job that Hydra could not compose, and the overrides that are right."""
    choices, keys, mistakes = lint.split(loader, overrides)
    try:
        config = _load(loader, name, choices).config
    except COMPOSITION_ERRORS:  # the primary configuration itself is broken: nothing to compare the keys with
        return mistakes, []
    unplaced, placed = lint.place_keys(keys, config)
    return mistakes + unplaced, choices + placed


def _load(loader: ConfigLoader, name: str, overrides: Sequence[str]) -> Job:
    """Compose one job by Hydra, which may raise `COMPOSITION_ERRORS`; refuse foreign classes that Hydra would instantiate."""
    try:
        config = loader.load_configuration(
            config_name=name, overrides=list(overrides), run_mode=RunMode.RUN, validate_sweep_overrides=True
        )
    except (AssertionError, AttributeError):  # OmegaConf raises them for a key below a null
        remedy = "Hydra cannot put keys below one that is null; a space to search is given as learning_rate=interval(1,9)"
        raise Refusal("overrides", " ".join(overrides), remedy) from None
    hydra = config.hydra
    lint.check_hydra_targets(hydra)
    job: Any = config.copy()
    with open_dict(job):
        del job["hydra"]
    return Job(tuple(each for each in overrides if not each.startswith("hydra.")), job, hydra)


def _refusal_of(name: str, error: Exception) -> Refusal:
    """Return one of `COMPOSITION_ERRORS` as a refusal; `name` is the primary configuration."""
    if isinstance(error, yaml.MarkedYAMLError):
        file = error.problem_mark.name if error.problem_mark else name
        return Refusal("file", file, yaml_sentence(error))
    if isinstance(error, RecursionError):
        return Refusal("config", name, "refers to itself")
    if group := re.search(r"Could not override '([\w/@.]+)'", str(error)):
        remedy = "is no group of this verb; its --help lists those that are"
        name = group[1].partition("@")[0]
        if name in TASK_OF_GROUP:
            remedy = f"is a group of another task; add task={TASK_OF_GROUP[name]}"
        return Refusal("override", name, remedy)
    return Refusal("config", name, " ".join(str(error).split()) or type(error).__name__)
