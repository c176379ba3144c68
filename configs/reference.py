"""Reference of the configuration from its models: text for --help, rows for the documentation, a JSON schema.

``python -m fedveil.configs.reference`` prints the JSON schema of `fedveil simulate`, with ``server`` that of
`fedveil server`; editors check and complete YAML files by it.
"""

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..base.extensions import extension
from ..messages.local_training import OPTIMIZERS
from .group import Group, Schema, node_at, range_of, schema_of
from .schema import SimulationSettings

WIDTH, COLUMN = 80, 34  # of the help: characters of a line, and the column where meanings begin
Row = tuple[str, str, str]  # key, value and meaning


def help_text(config: DictConfig, model: type[Group]) -> str:
    """Return the help of a composed configuration: groups with their options, keys with their values and meanings."""
    schema = schema_of(model)
    lines = ["\nGroups (choose one each, group=option):"]
    lines += [
        _entry(f"{group}=", ", ".join(sorted(each))) for group, each in sorted(options_of(schema).items())
    ]
    values: Any = OmegaConf.to_container(config, resolve=False)
    if (name := values["optimizer"]["name"]) in OPTIMIZERS and name != "auto":
        from .optimizers import keywords_of  # imports torch

        values["optimizer"] = {**keywords_of(name), **values["optimizer"]}
    lines += ["", "Keys (change any, key=value):"]
    rows = reference_rows(schema, values)
    lines += [_entry(f"{key}={value}", meaning) for key, value, meaning in rows if not key.endswith(".name")]
    return "\n".join(lines)


def options_of(schema: Schema) -> dict[str, list[str]]:
    """Return the options of each group that Hydra chooses."""
    options = {
        group: list(each["discriminator"]["mapping"])
        for group, each in schema["properties"].items()
        if "discriminator" in each
    }
    if "link" in schema["properties"]:
        options["link"] = node_at(schema, ["link", "name"]).schema["enum"]
    return options


def reference_rows(schema: Schema, values: Any, location: tuple[str, ...] = ()) -> Iterator[Row]:
    """Yield the row of each key in `values`, a composed configuration, or a group of it at `location` (`node_at`)."""
    for key, value in values.items():
        inner = (*location, str(key))
        node = node_at(schema, inner)
        if isinstance(value, Mapping) and value:
            option = [str(value.get("name"))] if "discriminator" in node.schema else []
            yield from reference_rows(schema, value, (*inner, *option))
        else:
            yield ".".join(node.path), _render(value), meaning_of(node.schema)


def meaning_of(schema: Schema) -> str:
    """Return what a key means and which values it may have, in a sentence or two."""
    values, text = range_of(schema), str(schema.get("description", ""))
    if not values and len(schema.get("enum", ())) > 1:
        values = f"One of {', '.join(map(str, schema['enum']))}"
    return f"{text} {values[:1].upper()}{values[1:]}.".strip() if values else text


def _render(value: Any) -> str:
    """Return a value as YAML would have it, in one line."""
    return json.dumps(value) if isinstance(value, bool | tuple | None) else str(value)


def _entry(key: str, meaning: str) -> str:
    """Return a key and its meaning in two columns; the meaning of a long key begins in the line below."""
    first, indent = f"  {key}", " " * COLUMN
    first = f"{first}\n{indent}" if len(first) >= COLUMN else first.ljust(COLUMN)
    meaning_lines = textwrap.wrap(meaning, WIDTH - COLUMN, break_on_hyphens=False)
    return (first + f"\n{indent}".join(meaning_lines)).rstrip()


if __name__ == "__main__":
    server = sys.argv[1:] == ["server"]
    model = extension("settings", "server", "verb", "server") if server else SimulationSettings
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(model)}
    print(json.dumps(schema, indent=2))
