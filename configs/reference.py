"""Reference of the configuration from its models: rows of --help, shipped in `help.json`, and a JSON schema.

``python -m fedveil.configs.reference`` prints the JSON schema of `fedveil simulate`, with ``server`` that of
`fedveil server`; editors check and complete YAML files by it.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..base.extensions import extension
from ..messages.local_training import OPTIMIZERS
from .compose import PRIMARY, compose_jobs, parse_arguments
from .group import Group, Schema, node_at, range_of, schema_of
from .help import Row, Rows, layout, rows_by_part
from .schema import SimulationSettings


def help_text(config: DictConfig, model: type[Group]) -> str:
    """Return the help of a composed configuration: in sections, groups with their options, and keys with values and meanings."""
    return layout(help_rows(config, model))


def help_rows(config: DictConfig, model: type[Group]) -> Rows:
    """Return the rows of the help of a composed configuration; the row of a group stands before its keys."""
    schema = schema_of(model)
    values: Any = OmegaConf.to_container(config, resolve=False)
    if (name := values["optimizer"]["name"]) in OPTIMIZERS and name != "auto":
        from .optimizers import keywords_of  # imports torch

        values["optimizer"] = {**keywords_of(name), **values["optimizer"]}
    rows = rows_by_part(row for row in reference_rows(schema, values) if not row[0].endswith(".name"))
    for group, options in options_of(schema).items():
        chosen = str((values.get(group) or {}).get("name"))
        rows[group] = [(group, chosen, f"One of {', '.join(sorted(options))}."), *rows.get(group, ())]
    return rows


def shipped_rows(model: type[Group], config_name: str) -> dict[str, Rows]:
    """Return what `help.json` has of a primary configuration: its rows, and by group=option those that differ from them."""
    flags = ["--config-name", config_name]
    default = help_rows(compose_jobs(parse_arguments(flags))[0].config, model)
    shipped = {"": default}
    for group, options in options_of(schema_of(model)).items():
        for choice in (f"{group}={option}" for option in options):
            (job,) = compose_jobs(parse_arguments([*flags, choice]))
            rows = help_rows(job.config, model)
            shipped[choice] = {
                part: rows.get(part, [])
                for part in {**default, **rows}
                if rows.get(part) != default.get(part)
            }
    return shipped


def shipped_json() -> str:
    """Return the text of `help.json`, which takes half a minute."""
    texts: dict[str, Any] = {name: shipped_rows(model, name) for name, model in _models().items()}
    text = json.dumps({"made_from": source_digest(), **texts}, ensure_ascii=False)
    return text.replace("]], ", "]],\n") + "\n"


def source_digest() -> str:
    """Return the SHA-256 of what the rows of the help come from: the YAML files, and the schemas of the models."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.yaml")):
        digest.update(f"{file.parent.name}/{file.name}\n".encode() + file.read_bytes())
    for model in _models().values():
        digest.update(json.dumps(schema_of(model)).encode())
    return digest.hexdigest()


def _models() -> dict[str, type[Group]]:
    """Return the model of each primary configuration."""
    return {
        PRIMARY: SimulationSettings,
        "server": extension("settings", "server", "docs", "make_reference.py"),
    }


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


if __name__ == "__main__":
    server = sys.argv[1:] == ["server"]
    model = extension("settings", "server", "verb", "server") if server else SimulationSettings
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(model)}
    print(json.dumps(schema, indent=2))
