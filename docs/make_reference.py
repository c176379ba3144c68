"""Generator of docs/reference/ and of configs/help.json: `python docs/make_reference.py` writes both anew.

The pages have the docstrings and the refusals, and help.json the keys that --help shows.
"""

import importlib
import inspect
import json
import re
import runpy
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "reference"
MODULES = {"python": "fedveil", "privacy": "fedveil.privacy"}
LONGEST = 100  # characters of a signature's line
NOTE = "<!-- Made by docs/make_reference.py from the docstrings; do not edit. -->"
PROPERTIES = (property, cached_property)
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples", "Note")
SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):$", re.MULTILINE)
HIDDEN = ("source",)
KINDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true`, `false`",
    "string": "text",
    "null": "`null`",
    "array": "list",
    "object": "keys and values",
}
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
CONFIGURATION = """\
Give a key as `key=value` on the command line, and an option of a group as `group=option`. `fedveil simulate --help` shows
the same keys with the values of the YAML files. A task sets `learning_rate`, `local_epochs` and the clipping norm to what
suits it."""
RULES = ("rules", "conflicts")  # of a model, whose sentences users meet where they break one
ENTRY = re.compile(r"^(\*{0,2}\w[\w.]*)(?: \([^)]*\))?:\s*(.*)$", re.DOTALL)


def pages() -> Mapping[str, str]:
    """Return the text of every generated page by file name."""
    made = {f"{page}.md": module_page(name) for page, name in MODULES.items()}
    refusals = runpy.run_path(str(Path(__file__).with_name("make_refusals.py")))["page_of"]()
    return made | {"configuration.md": configuration_page(), "refusals.md": refusals}


def module_page(name: str) -> str:
    """Return the page of one module: every name of its `__all__`, in alphabetical order."""
    module = importlib.import_module(name)
    head = [f"# {name}", NOTE, text_of(module)]
    return "\n\n".join([*head, *members(module, name)]) + "\n"


def members(module: Any, name: str) -> Iterator[str]:
    for member in sorted(module.__all__, key=str.casefold):
        yield from entry(getattr(module, member), f"{name}.{member}", "##")


def entry(thing: Any, name: str, level: str) -> Iterator[str]:
    """Yield the paragraphs of one class, function or constant, and those of a class's own public members."""
    short = name.rpartition(".")[2]
    yield f"{level} {short}"
    if inspect.isclass(thing) and issubclass(thing, Enum):
        yield text_of(thing)
        yield "\n".join(f"- `{short}.{each.name}`: `{each.value!r}`".replace("'", '"') for each in thing)
        return
    if inspect.isroutine(thing) or made_by_users(thing):
        yield f"```text\n{signature(thing, name)}\n```"
    yield text_of(thing)
    if inspect.isclass(thing):
        for member, value in public(thing):
            yield from method(value, f"{short}.{member}")


def made_by_users(thing: Any) -> bool:
    """Whether a class is made by calling it: a dataclass, a model, an exception, or one whose constructor is documented."""
    if not inspect.isclass(thing) or getattr(thing, "_is_protocol", False):
        return False
    value = is_dataclass(thing) or hasattr(thing, "model_fields") or issubclass(thing, Exception)
    return value or bool(vars(thing).get("__init__") and thing.__init__.__doc__)


def public(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the documented public functions and properties that the class itself defines."""
    for name, value in vars(kind).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        documented = isinstance(function, PROPERTIES) or inspect.isfunction(function)
        if documented and not name.startswith("_") and name not in RULES and function.__doc__:
            yield name, value


def method(value: Any, name: str) -> Iterator[str]:
    bound = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    yield f"### {name}"
    if not isinstance(bound, PROPERTIES):
        yield f"```text\n{signature(bound, name)}\n```"
    yield text_of(bound)


def signature(thing: Callable[..., Any], name: str) -> str:
    """Return how the thing is called, one argument a line where one line would be too long."""
    found = inspect.signature(thing)
    parameters = [each for key, each in found.parameters.items() if key not in ("self", "cls")]
    arguments = list(shown(parameters))
    result = "" if inspect.isclass(thing) else returned(found.return_annotation)
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= LONGEST:
        return line
    return "\n".join([f"{name}(", *(f"    {each}," for each in arguments), f"){result}"])


def shown(parameters: list[inspect.Parameter]) -> Iterator[str]:
    """Yield each argument with its type and default, and `*` before the first that is given by name only."""
    by_name = False
    for each in parameters:
        if each.kind is each.KEYWORD_ONLY and not by_name:
            yield "*"
        by_name = by_name or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        kind = "" if each.annotation is each.empty else f": {annotation(each.annotation)}"
        equals = " = " if kind else "="
        yield f"{stars}{each.name}{kind}" + (
            "" if each.default is each.empty else equals + default(each.default)
        )


def returned(found: Any) -> str:
    return "" if found is inspect.Signature.empty else f" -> {annotation(found)}"


def annotation(found: Any) -> str:
    """Return a type without the modules that its parts come from."""
    text = inspect.formatannotation(found) if not isinstance(found, str) else found
    text = re.sub(r"ForwardRef\(([^)]*)\)", r"\1", text)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", text).replace("'", "").replace('"', "")


def default(value: Any) -> str:
    """Return a default as it is written; of an object that has no short form, three dots."""
    if isinstance(value, Enum):
        return repr(value.value).replace("'", '"')
    if isinstance(value, tuple):
        return f"({', '.join(map(default, value))}{',' if len(value) == 1 else ''})"
    plain = value is None or isinstance(value, str | int | float)
    return repr(value).replace("'", '"') if plain else "..."


def text_of(thing: Any) -> str:
    """Return a docstring as Markdown: its sections become lists."""
    text = re.sub(r"``([^`]+)``", r"`\1`", inspect.getdoc(thing) or "")
    summary, *rest = SECTION.split(text)
    made = [summary.strip()]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        made.append(section(title, body))
    return "\n\n".join(each for each in made if each)


def section(title: str, body: str) -> str:
    indented, after = inside(body)
    text = textwrap.dedent(indented).strip("\n")
    match title:
        case "Example" | "Examples":
            fence = "pycon" if ">>>" in text else "text"
            made = f"**{title}**\n\n```{fence}\n{text}\n```"
        case "Args" | "Attributes" | "Raises":
            made = f"**{title}**\n\n" + "\n".join(f"- {item(each)}" for each in items(text))
        case _:
            made = f"**{title}** {' '.join(text.split())}"
    return f"{made}\n\n{after}" if after else made


def inside(body: str) -> tuple[str, str]:
    """Return the indented lines that belong to a section, and the text after them."""
    lines = body.strip("\n").splitlines()
    end = next((n for n, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return "\n".join(lines[:end]), "\n".join(lines[end:]).strip()


def items(text: str) -> Iterator[str]:
    """Yield each entry of a section, its continued lines joined."""
    yield from (" ".join(each.split()) for each in re.split(r"\n(?=\S)", text) if each.strip())


def item(text: str) -> str:
    found = ENTRY.match(text)
    return f"`{found[1]}`: {found[2]}" if found else text


# --- the keys of a configuration ----------------------------------------------------------------------------------


def configuration_page() -> str:
    """Return the page of every key of `fedveil simulate` and `fedveil server`, from the models' JSON schemas."""
    schema = importlib.import_module("fedveil.configs.schema")
    schema_of = importlib.import_module("fedveil.configs.group").schema_of
    server = importlib.import_module("fedveil.deployment.settings").ServerSettings
    simulate, server = schema_of(schema.SimulationSettings), schema_of(server)
    own = {key: each for key, each in server["properties"].items() if key not in simulate["properties"]}
    parts = [
        "# Configuration",
        NOTE.replace("the docstrings", "the models in configs"),
        CONFIGURATION,
        *keys_of("Keys of `fedveil simulate`", "", simulate["properties"], simulate),
        *keys_of("Further keys of `fedveil server`", "", own, server),
    ]
    return "\n\n".join(parts) + "\n"


def keys_of(title: str, prefix: str, keys: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the plain keys, then a section for each group of keys."""
    plain = {key: each for key, each in keys.items() if not options_of(each, root) and key not in HIDDEN}
    yield f"## {title}"
    yield table(prefix, plain)
    for key, each in keys.items():
        found = options_of(each, root)
        if found:
            yield f"### {prefix}{key}"
        for names, model in found:
            yield from option(f"{prefix}{key}", names, model, root)


def option(key: str, names: list[str], model: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[str]:
    """Yield what one option of a group is, and its keys; those of a group inside it are named by their model's."""
    if names:
        yield " or ".join(f"`{key}={name}`" for name in names) + f": {sentence(model.get('description', ''))}"
    else:
        yield sentence(model.get("description", ""))
    inner = {name: each for name, each in model["properties"].items() if name != "name"}
    for name, each in inner.items():
        if options_of(each, root):
            yield f"`{key}.{name}`: the keys of `{key}={'client_central' if name == 'client' else name}`."
    plain = {name: each for name, each in inner.items() if not options_of(each, root)}
    if plain:
        yield table(f"{key}.", plain)
    if model.get("additionalProperties") is True:
        yield keywords(names)


def keywords(names: list[str]) -> str:
    """Return the table of the keywords that torch's class of each name takes."""
    of = importlib.import_module("fedveil.configs.optimizers")
    rows = ["| option | keys, with torch's defaults |", "|---|---|"]
    for name in names:
        cells = (f"`optimizer.{key}={json.dumps(value)}`" for key, value in of.keywords_of(name).items())
        rows.append(f"| `optimizer={name}` | {', '.join(cells)} |")
    return "\n".join(rows)


def options_of(
    schema: Mapping[str, Any], root: Mapping[str, Any]
) -> list[tuple[list[str], Mapping[str, Any]]]:
    """Return the models that a key may hold with the names that choose them; none if it holds a plain value."""
    if "discriminator" in schema:
        chosen: dict[str, list[str]] = {}
        for name, reference in schema["discriminator"]["mapping"].items():
            chosen.setdefault(reference, []).append(name)
        return [(names, at(reference, root)) for reference, names in chosen.items()]
    found = at(schema["$ref"], root) if "$ref" in schema else {}
    return [([], found)] if "properties" in found else []


def at(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    return root["$defs"][reference.rpartition("/")[2]]


def table(prefix: str, keys: Mapping[str, Any]) -> str:
    rows = [
        f"| `{prefix}{key}` | {default_of(each)} | {values_of(each)} | {sentence(each.get('description', ''))} |"
        for key, each in keys.items()
    ]
    return "\n".join(["| key | default | values | meaning |", "|---|---|---|---|", *rows])


def default_of(schema: Mapping[str, Any]) -> str:
    return f"`{json.dumps(schema['default'])}`".replace('"', "") if "default" in schema else ""


def values_of(schema: Mapping[str, Any]) -> str:
    """Return in words what a key may hold."""
    if "anyOf" in schema:
        return " or ".join(values_of(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if "$ref" in schema:  # the only plain model that several keys share
        return ", ".join(f"`{each.value}`" for each in importlib.import_module("fedveil.privacy").Adjacency)
    bounds = [f"{words} {number(schema[key])}" for key, words in BOUNDS.items() if key in schema]
    return " ".join([KINDS.get(schema.get("type", ""), "value"), " and ".join(bounds)]).strip()


def number(value: float) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:g}"


def sentence(text: str) -> str:
    """Return a meaning with its first letter as in a sentence, and a full stop."""
    text = " ".join(re.sub(r"``([^`]+)``", r"`\1`", text).split()).replace("|", "\\|")
    first = text.split(" ")[0]
    text = text[0].upper() + text[1:] if first.isalpha() else text
    return text.rstrip(".") + "." if text else ""


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in pages().items():
        (FOLDER / file).write_text(text)
    reference = importlib.import_module("fedveil.configs.reference")
    shipped = importlib.import_module("fedveil.configs.help").FILE
    if reference.source_digest() not in shipped.read_text(encoding="utf-8"):
        shipped.write_text(reference.shipped_json(), encoding="utf-8")
