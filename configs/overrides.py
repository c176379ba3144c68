"""Overrides of a command line: what they say, and which word of them Hydra did not know."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from ..base.refusal import Refusal
from .strict import TARGET, Mistakes, nearest
from .training_settings import names_with
from .tuning_settings import NO_PRIVATE_SELECTION

# Beside its own errors, what reading a file of the wrong kind comes to.
READING_ERRORS = (OSError, ValueError, TypeError, LookupError, RecursionError)
# Compressions that others have, and why a private sum has none of them.
UNSAFE = {
    "top_k": "which coordinates are largest is computed from data, so that their numbers are a release; use mask",
    "client_mask": "vectors with a mask of each client's own have no sum in fewer coordinates; use mask, which all share",
    "mask_after_clip": "all of a clipped vector may lie in what is kept: the noise stays and the signal falls; use mask",
    "fixed_projection": "a direction that one projection for all rounds omits is never learned; use project",
}
TUNED = re.compile(r"tune=(\w+)=\[?([^\[\]]*)\]?")  # a key and its values in one
# Words for a private choice of values in the literature.
PRIVATE_SELECTION = ("repeat_and_select", "private_selection", "random_stopping")
TARGETS = re.compile(r"(hydra|hydra_plugins)\..*|optuna\.(samplers|pruners)\.[A-Z]\w*")


def parse(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    """Hydra's reading of each override.

    Raises:
        Mistakes: one sentence for each that is not in Hydra's grammar.
    """
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    mistakes: list[Refusal] = []
    for index, override in enumerate(overrides):
        if index and overrides[index - 1].isidentifier() and "=" not in override:
            continue  # the value of a key without its sign, which was named
        try:
            parsed += parser.parse_overrides([override])
        except OverrideParseException as error:
            reason = str(error).splitlines()[0]
            key, equals, value = override.partition("=")
            remedy = f"cannot be read as key=value ({reason})"
            if equals and not set(value) & set("'\"[]{}()$"):
                remedy = f"cannot be read; put its value in quotes, for the shell too: \"{key}='{value}'\""
            following = [*overrides[index + 1 : index + 2], "="][0]
            if override.isidentifier() and "=" not in following:
                remedy = f"write {override}={following}"
            if match := TUNED.fullmatch(override):
                remedy = f"write tune={match[1]} tune.values=[{match[2]}]"
            mistakes.append(Refusal("override", override, remedy))
    if mistakes:
        raise Mistakes(mistakes)
    return parsed


def split(loader: ConfigLoader, overrides: Sequence[str]) -> tuple[list[str], list[Override], list[Refusal]]:
    """Part a job's overrides into choices of options that exist, keys, and options that do not exist."""
    groups: list[str] = []
    keys: list[Override] = []
    mistakes: list[Refusal] = []
    for override in parse(overrides, loader):
        options = loader.get_group_options(override.key_or_group)
        if not options or override.key_or_group.startswith("hydra"):
            keys.append(override)
        elif mistake := _unknown_option(override, options):
            mistakes.append(mistake)
        else:
            groups.append(text_of(override))
    return groups, keys, mistakes


def place_keys(keys: Sequence[Override], config: DictConfig) -> tuple[list[Refusal], list[str]]:
    """Part overrides of keys into mistakes and those that have a place in ``config``."""
    config_keys = dict(_paths(OmegaConf.to_container(config, resolve=False), ""))
    mistakes: list[Refusal] = []
    placed: list[str] = []
    for override in keys:
        mistake = _unplaced(override, config_keys)
        if mistake is None:
            placed.append(text_of(override))
        else:
            mistakes.append(mistake)
    return mistakes, placed


def check_hydra_targets(hydra: DictConfig) -> None:
    """Refuse classes in Hydra's own node that are not Hydra's: it would instantiate them."""
    for path, target in targets(OmegaConf.to_container(hydra, resolve=False), "hydra"):
        if not TARGETS.fullmatch(str(target)):
            remedy = "only Hydra's launchers, sweepers and callbacks, its plugins' and Optuna's samplers may stand here"
            raise Refusal(path, target, remedy)


def _unknown_option(override: Override, options: Sequence[str]) -> Refusal | None:
    value = override.value()
    key = override.key_or_group
    if override.is_delete() or not isinstance(value, str | int | float) or value in options:
        return None
    value = str(value)
    if key in ("task", "strategy") and re.fullmatch(TARGET, value):
        allowed = f"allow_modules=[{value.partition(':')[0]}]"
        text = f"there is no such option; write {key}=custom {key}.target={value} {allowed}"
        return Refusal(key, value, text)
    if key == "compress" and value in UNSAFE:
        return Refusal(key, value, UNSAFE[value])
    if key == "tune" and value.lower() in PRIVATE_SELECTION:
        return Refusal(key, value, NO_PRIVATE_SELECTION)
    return Refusal(key, value, f"there is no such option; {nearest(value, options)}")


def _unplaced(override: Override, config_keys: Mapping[str, Any]) -> Refusal | None:
    key = override.key_or_group
    value = text_of(override).partition("=")[2]
    if override.is_sweep_override():
        return Refusal(key, value, "holds several values; add -m to run one job for each")
    if override.is_add() or override.is_force_add() or key.startswith("hydra") or key in config_keys:
        return None
    if others := _options_with(key):
        text = f"there is no such key with this {others[0].partition('=')[0]}; {' and '.join(others)} have it"
        return Refusal(key, value, text if len(others) > 1 else text.replace(" have it", " has it"))
    return Refusal(key, value, f"there is no such key; {_nearest_key(key, config_keys)}")


def _options_with(key: str) -> list[str]:
    """Return the options of a key's group that have it."""
    group, _, word = key.rpartition(".")
    files = sorted(Path(__file__).parent.joinpath(group).glob("*.yaml")) if group.isidentifier() else []
    pattern = re.compile(rf"^{re.escape(word)}:", re.MULTILINE)
    names = [file.stem for file in files if pattern.search(file.read_text(encoding="utf-8"))]
    if group in ("strategy", "optimizer"):  # which have no files
        names = names_with(group, word)
    return [f"{group}={name}" for name in names]


def _nearest_key(key: str, config_keys: Mapping[str, Any]) -> str:
    """Search the key's group first, then all groups for the same last word."""
    group, _, word = key.rpartition(".")
    paths = [path for path in config_keys if not path.endswith(".name")]
    siblings = {path.rpartition(".")[2]: path for path in paths if path.rpartition(".")[0] == group}
    anywhere = {path.rpartition(".")[2]: path for path in reversed(paths)}
    for candidates, cutoff in ((siblings, 0.6), (anywhere, 0.85 if group and siblings else 0.6)):
        if matches := difflib.get_close_matches(word, candidates, n=1, cutoff=cutoff):
            return f"did you mean '{candidates[matches[0]]}'?"
    if group and siblings:
        return f"known: {', '.join(sorted(siblings.values()))}"
    return "fedveil simulate --help lists them all"


def quoted(text: str) -> str:
    """Return a text in the quotes of Hydra's grammar, where a backslash before one stands twice."""
    doubled = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return f"'{doubled}'"


def text_of(override: Override) -> str:
    """Return the override as it was written."""
    assert override.input_line is not None  # it came from a line
    return override.input_line


def end_of(override: Override, end: int) -> str:
    """Return the override with one value of its sweep.

    Args:
      override: any; one that holds a single value is returned as it is.
      end: 0 for the first value, -1 for the last.
    """
    if not override.is_sweep_override():
        return text_of(override)
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return f"{override.get_key_element()}={(sweep.start, sweep.end)[end]}"
    return f"{override.get_key_element()}={list(override.sweep_string_iterator())[end]}"


def _paths(node: Any, above: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{above}.{key}" if above else str(key)
            yield path, value
            yield from _paths(value, path)


def targets(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield where in a configuration Hydra's ``_target_`` stands, and what it names."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        here = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield here, value
        else:
            yield from targets(value, here)
