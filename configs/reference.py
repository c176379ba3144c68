"""Reference of the configuration, made of its models: help, a page of the documentation, a JSON schema.

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

WIDTH, COLUMN = 80, 34
Row = tuple[str, str, str]


def help_text(config: DictConfig, model: type[Group]) -> str:
    """Return every group with its options, and every key with its value and meaning, for 80 columns."""
    schema = schema_of(model)
    groups = [
        _entry(f"{group}=", ", ".join(sorted(options)))
        for group, options in sorted(options_of(schema).items())
    ]
    values: Any = OmegaConf.to_container(config, resolve=False)
    if (name := values["optimizer"]["name"]) in OPTIMIZERS and name != "auto":
        from .optimizers import keywords_of  # torch

        values["optimizer"] = {**keywords_of(name), **values["optimizer"]}
    rows = reference_rows(schema, values)
    keys = [_entry(f"{key}={value}", meaning) for key, value, meaning in rows if not key.endswith(".name")]
    return "\n".join(
        ["\nGroups (choose one each, group=option):", *groups, "", "Keys (change any, key=value):", *keys]
    )


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
    """Yield key, value and meaning of everything in a composed configuration."""
    for key, value in values.items():
        node = node_at(schema, (*location, str(key)))
        if isinstance(value, Mapping) and value:
            chosen = (str(value.get("name")),) if "discriminator" in node.schema else ()
            yield from reference_rows(schema, value, (*location, str(key), *chosen))
        else:
            yield ".".join(node.path), _render(value), meaning_of(node.schema)


def meaning_of(schema: Schema) -> str:
    """Return what a key means and what it may be, in a sentence or two."""
    may, text = range_of(schema), str(schema.get("description", ""))
    if not may and len(schema.get("enum", ())) > 1:
        may = f"One of {', '.join(map(str, schema['enum']))}"
    return f"{text} {may[:1].upper()}{may[1:]}.".strip() if may else text


def _render(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool | tuple) else str(value)


def _entry(key: str, meaning: str) -> str:
    lines = textwrap.wrap(meaning, WIDTH - COLUMN, break_on_hyphens=False) or [""]
    first = f"  {key}"
    if len(first) >= COLUMN:
        return "\n".join([first, *(" " * COLUMN + line for line in lines if line)])
    return "\n".join([first.ljust(COLUMN) + lines[0], *(" " * COLUMN + line for line in lines[1:])]).rstrip()


if __name__ == "__main__":
    server = sys.argv[1:] == ["server"]
    model = extension("settings", "server", "verb", "server") if server else SimulationSettings
    print(
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(model)}, indent=2)
    )
