"""Guard of a user's YAML file, before Hydra loads it: its size, its encoding, and the size of what its aliases expand to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..base.refusal import Refusal

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
# libyaml parses ten times as fast; PyYAML is built without it where its headers are missing.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_DEPTH = 3  # group/subgroup/option.yaml


def check_directory(directory: Path) -> list[Refusal]:
    """Return a refusal for each YAML file of a configuration directory that cannot be loaded safely."""
    mistakes: list[Refusal] = []
    patterns = ["/".join(["*"] * depth) + ".yaml" for depth in range(1, MAX_DEPTH + 1)]
    for file in sorted(file for pattern in patterns for file in directory.glob(pattern)):
        try:
            check_file(file)
        except Refusal as mistake:
            mistakes.append(mistake)
    return mistakes


class Limits(NamedTuple):
    """Largest size of a file, in bytes, and of what its aliases expand to, in values."""

    size: int = MAX_BYTES
    values: int = MAX_NODES


CONFIGURATION = Limits()


def check_file(path: Path) -> None:
    """Refuse a file that is too large, not UTF-8 or not YAML, or whose aliases expand to too many values."""
    composed(path, CONFIGURATION)


def composed(path: Path, limits: Limits) -> yaml.Node | None:
    """Return the nodes of a YAML file, None if it is empty; refuse it as `check_file` does, beyond these limits."""
    name = str(path)
    try:
        if path.stat().st_size > limits.size:
            raise Refusal("file", name, f"is larger than {limits.size} bytes; a configuration never is")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise Refusal("file", name, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise Refusal("file", name, f"is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    try:
        root = _compose(text)
        is_small = root is None or _num_nodes(root, {}, ()) <= limits.values
    except yaml.MarkedYAMLError as error:
        raise Refusal("file", name, yaml_sentence(error)) from None
    except (yaml.YAMLError, RecursionError):
        raise Refusal("file", name, "cannot be read as YAML") from None
    if not is_small:
        raise Refusal("file", name, f"its aliases expand to more than {limits.values} values")
    return root


def _compose(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text; raise YAML's error, as PyYAML's own parser says it."""
    try:
        return yaml.compose(text, Loader=LOADER)
    except yaml.YAMLError:
        return yaml.compose(text, Loader=yaml.SafeLoader)


def yaml_sentence(error: yaml.MarkedYAMLError) -> str:
    """Return the parser's error in one line, with the number of the file's line."""
    line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    return line + (error.problem or "cannot be read as YAML").splitlines()[0]


def _require_once(keys: Sequence[yaml.ScalarNode]) -> None:
    """Raise YAML's error for a key that a mapping has twice, which the loader would accept; << merges and may repeat."""
    previous = set[tuple[str, str]]()
    for key in keys:
        if (key.tag, key.value) in previous and key.value != "<<":
            raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
        previous.add((key.tag, key.value))


def _num_nodes(node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Return the number of nodes from this one on if every alias were copied; raise YAML's error if it contains itself."""
    if id(node) in above:  # ids of the nodes above it
        mark = node.start_mark
        raise yaml.MarkedYAMLError(problem="an alias refers to what holds it", problem_mark=mark)
    if id(node) not in sizes:  # results by id of a node, so that the target of many aliases is counted once
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
            _require_once([key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        sizes[id(node)] = 1 + sum(_num_nodes(child, sizes, (*above, id(node))) for child in children)
    return sizes[id(node)]
