"""Overrides of a command line: parsed, and their mistakes explained, which Hydra's own messages do not."""

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

# Errors, besides Hydra's own, of reading a file of the wrong kind.
READING_ERRORS = (OSError, ValueError, TypeError, LookupError, RecursionError)
# Compressions of other frameworks, and why a private sum has none of them.
UNSAFE = {
    "top_k": "which coordinates are largest is computed from data, so that their numbers are a release; use mask",
    "client_mask": "vectors with a mask of each client's own have no sum in fewer coordinates; use mask, which all share",
    "mask_after_clip": "all of a clipped vector may lie in what is kept: the noise stays and the signal falls; use mask",
    "fixed_projection": "a direction that one projection for all rounds omits is never learned; use project",
}
# A key to tune and its values in one word, which is a mistake.
TUNED = re.compile(r"tune=(\w+)=\[?([^\[\]]*)\]?")
# Words for a private choice of values in the literature.
PRIVATE_SELECTION = ("repeat_and_select", "private_selection", "random_stopping")
# Classes that Hydra may instantiate: its own, those of its plugins, and Optuna's samplers and pruners.
TARGETS = re.compile(r"(hydra|hydra_plugins)\..*|optuna\.(samplers|pruners)\.[A-Z]\w*")


def parse(overrides: Sequence[str], loader: ConfigLoader) -> list[Override]:
    """Parse each override by Hydra; raise Mistakes with a sentence for each that is not in Hydra's grammar."""
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    mistakes: list[Refusal] = []
    for index, override in enumerate(overrides):
        if index and _is_key_alone(overrides[index - 1], override):
            continue  # it is part of the mistake before it
        try:
            parsed += parser.parse_overrides([override])
        except OverrideParseException as error:
            following = "".join(overrides[index + 1 : index + 2])
            remedy = _unparsed_remedy(override, following, str(error).splitlines()[0])
            mistakes.append(Refusal("override", override, remedy))
    if mistakes:
        raise Mistakes(mistakes)
    return parsed


def _is_key_alone(word: str, following: str) -> bool:
    """Return whether two words are a key and its value without the sign between them, as in `seed 3`."""
    return word.isidentifier() and bool(following) and "=" not in following


def _unparsed_remedy(override: str, following: str, reason: str) -> str:
    """Return the remedy for an override that Hydra cannot parse, from the word after it and Hydra's reason."""
    if match := TUNED.fullmatch(override):
        return f"write tune={match[1]} tune.values=[{match[2]}]"
    if _is_key_alone(override, following):
        return f"write {override}={following}"
    key, equals, value = override.partition("=")
    if equals and not set(value) & set("'\"[]{}()$"):
        return f"cannot be read; put its value in quotes, for the shell too: \"{key}='{value}'\""
    return f"cannot be read as key=value ({reason})"


def split(loader: ConfigLoader, overrides: Sequence[str]) -> tuple[list[str], list[Override], list[Refusal]]:
    """Split a job's overrides into choices of options that exist, keys, and mistaken choices."""
    choices: list[str] = []
    keys: list[Override] = []
    mistakes: list[Refusal] = []
    for override in parse(overrides, loader):
        options = loader.get_group_options(override.key_or_group)
        if not options or override.key_or_group.startswith("hydra"):
            keys.append(override)
        elif mistake := _unknown_option(override, options):
            mistakes.append(mistake)
        else:
            choices.append(text_of(override))
    return choices, keys, mistakes


def place_keys(keys: Sequence[Override], config: DictConfig) -> tuple[list[Refusal], list[str]]:
    """Split overrides of keys into mistakes, and those that a configuration can take: they have its keys, or add one."""
    config_keys = dict(_paths(OmegaConf.to_container(config, resolve=False), ""))
    mistakes: list[Refusal] = []
    placed: list[str] = []
    for override in keys:
        if mistake := _unplaced(override, config_keys):
            mistakes.append(mistake)
        else:
            placed.append(text_of(override))
    return mistakes, placed


def check_hydra_targets(hydra: DictConfig) -> None:
    """Refuse classes in Hydra's own node that Hydra would instantiate, except those of `TARGETS`."""
    for path, target in targets(OmegaConf.to_container(hydra, resolve=False), "hydra"):
        if not TARGETS.fullmatch(str(target)):
            remedy = "only Hydra's launchers, sweepers and callbacks, its plugins' and Optuna's samplers may stand here"
            raise Refusal(path, target, remedy)


def _unknown_option(override: Override, options: Sequence[str]) -> Refusal | None:
    """Return the mistake in the choice of a group's option; None if it exists, or no single one is chosen (~group, null)."""
    value = override.value()
    key = override.key_or_group
    if override.is_delete() or not isinstance(value, str | int | float) or value in options:
        return None
    if key == "privacy" and not isinstance(value, str):  # a number
        return Refusal(
            key, str(value), f"there is no such option; did you mean privacy.target_epsilon={value}?"
        )
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
    """Return the mistake in an override of a key; None if the key exists, or is added on purpose (+key=value)."""
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
    """Return the shipped options of a key's group that have the key, as overrides."""
    group, _, word = key.rpartition(".")
    if not group.isidentifier():
        return []
    if group in ("strategy", "optimizer"):  # they have no files
        return [f"{group}={name}" for name in names_with(group, word)]
    pattern = re.compile(rf"^{re.escape(word)}:", re.MULTILINE)
    files = sorted(Path(__file__).parent.joinpath(group).glob("*.yaml"))
    return [f"{group}={file.stem}" for file in files if pattern.search(file.read_text(encoding="utf-8"))]


def _nearest_key(key: str, config_keys: Mapping[str, Any]) -> str:
    """Return the end of the refusal of an unknown key: the nearest of its group, else of all keys by their last word."""
    group, _, word = key.rpartition(".")
    paths = [path for path in config_keys if not path.endswith(".name")]
    siblings = {path.rpartition(".")[2]: path for path in paths if path.rpartition(".")[0] == group}
    anywhere = {path.rpartition(".")[2]: path for path in reversed(paths)}
    # A key of another group must be nearly the same if this group has keys, which the refusal lists otherwise.
    for candidates, cutoff in ((siblings, 0.6), (anywhere, 0.85 if group and siblings else 0.6)):
        if matches := difflib.get_close_matches(word, candidates, n=1, cutoff=cutoff):
            return f"did you mean '{candidates[matches[0]]}'?"
    if group and siblings:
        return f"known: {', '.join(sorted(siblings.values()))}"
    return "fedveil simulate --help lists them all"


def quoted(text: str) -> str:
    """Return a text in the quotes of Hydra's grammar; backslashes before a quote, or at the end, are doubled."""
    doubled = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'")
    return f"'{doubled}'"


def text_of(override: Override) -> str:
    """Return the override as it was written."""
    return str(override.input_line)


def end_of(override: Override, end: int) -> str:
    """Return the override with the first (`end` 0) or the last (-1) value of its sweep; as it is without a sweep."""
    if not override.is_sweep_override():
        return text_of(override)
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return f"{override.get_key_element()}={(sweep.start, sweep.end)[end]}"
    return f"{override.get_key_element()}={list(override.sweep_string_iterator())[end]}"


def _paths(node: Any, above: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each key, groups included, below the dotted key `above`."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{above}.{key}" if above else str(key)
            yield path, value
            yield from _paths(value, path)


def targets(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, name of the class) for each ``_target_`` of Hydra in a configuration."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        here = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield here, value
        else:
            yield from targets(value, here)
