"""Groups of keys as pydantic models: strict, frozen, and refused in sentences of a JSON schema.

The schema says of every key its type, range, default and meaning; help, completion and refusals read it.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from ..base.extensions import extension, installed
from ..base.refusal import Range, Refusal
from ..messages.local_training import RULES
from .strict import Mistakes, unknown_key, value_at, wrong

Schema = Mapping[str, Any]
BOUNDS = {
    "exclusiveMinimum": "gt",
    "minimum": "ge",
    "exclusiveMaximum": "lt",
    "maximum": "le",
}  # as of `Range`


def remedy(text: str) -> Any:
    """Return the Field metadata for a refusal text other than the range."""
    return {"remedy": text}


class OfKeys:
    """Mark of a frozen dataclass that is read from a group of keys, as strictly as any."""

    def __get_pydantic_core_schema__(self, source: type[Any], handler: Any) -> Any:
        """Let pydantic read the keys, and make the dataclass of what it read."""
        read = {
            name: core_schema.typed_dict_field(handler.generate_schema(hint), required=False)
            for name, hint in get_type_hints(source, include_extras=True).items()
            if name in RULES
        }
        keys = core_schema.no_info_before_validator_function(
            lambda value: vars(value) if is_dataclass(value) else value,
            core_schema.typed_dict_schema(read, config={"strict": True, "allow_inf_nan": False}),
        )
        return core_schema.no_info_after_validator_function(
            lambda fields: source(**fields),
            keys,
            serialization=core_schema.plain_serializer_function_ser_schema(vars),
        )


class OfExtension:
    """Mark of a field whose models an extension brings; without it the field is read by the core's own model."""

    def __init__(self, group: str, core: Any) -> None:
        self.group, self.core = group, core

    def __get_pydantic_core_schema__(self, source: type[Any], handler: Any) -> Any:
        """Let pydantic read the keys by the models of the extension, if it is installed."""
        here = installed("settings", self.group)
        return handler.generate_schema(extension("settings", self.group, "", "") if here else self.core)


class Group(BaseModel):
    """Group of keys. Its values are checked like those of the command line, and refused in the same sentences."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
    inline_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Fields whose keys stand at the group's own level, and those keys."""

    if not TYPE_CHECKING:  # a type checker knows the keywords of each model, and would forget them

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise mistakes_of(error, type(self), values) from None

        __init__.__pydantic_base_init__ = True  # pydantic need not call it for groups within groups

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield a key and a remedy for each rule between keys that is broken. All are in range by themselves."""
        yield from ()

    @property
    def option(self) -> str:
        """Name of the option; empty of a group without options."""
        return str(getattr(self, "name", ""))

    def queries(self, whole: Any) -> Mapping[str, tuple[str, object]]:
        """Return the kinds of query that a run asks by this group, each with the field that asks for it.

        Args:
            whole: as of `conflicts`.
        """
        return {}

    def conflicts(self, whole: Any) -> Iterator[tuple[str, str]]:
        """Yield the same for each rule between this group and others that is broken.

        Args:
            whole: the settings, in which each group is in range by itself.
        """
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for field, names in cls.inline_groups.items():
            if field not in values:
                inner = {name: value for name, value in values.items() if name in names}
                rest = {name: value for name, value in values.items() if name not in names}
                values = {**rest, field: inner}
        return values

    @model_validator(mode="after")
    def _check_rules(self) -> Any:
        if broken := tuple(self.rules()):
            raise PydanticCustomError("rules", "rules are broken", {"broken": broken})
        return self


@dataclass(frozen=True)
class Node:
    """Place in a schema: its path of keys, its content, and its group."""

    path: tuple[str, ...]
    schema: Schema
    above: Schema


@cache
def schema_of(model: type[Group]) -> dict[str, Any]:
    """Return the JSON schema of a configuration: every key with type, range, default and meaning."""
    schema = model.model_json_schema()
    models = {group.__name__: group for group in _models(Group)}
    for title, group in {**schema.get("$defs", {}), model.__name__: schema}.items():
        for key, value in group.get("properties", {}).items():
            value.pop("title", None)
            if text := _meaning(models.get(title, model), key):
                value["description"] = text
        group.pop("title", None)
        if "description" in group:
            group["description"] = group["description"].partition("\n\nExample:")[0]
    for key, names in model.inline_groups.items():
        inner = schema["properties"].pop(key)["properties"]
        schema["properties"] |= {name: {**inner[name], "description": RULES[name][2]} for name in names}
    for key, field in model.model_fields.items():
        if field.exclude:
            del schema["properties"][key]
    return schema


def node_at(schema: Schema, location: Sequence[str | int]) -> Node:
    """Return where pydantic's location lies; the words by which it tells an option are no keys, nor are numbers."""
    root, here, above = schema, schema, schema
    path: list[str] = []
    for part in location:
        here = _opened(root, here)
        mapping = here.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            here = _at(root, mapping[part])
        elif isinstance(part, str) and part != "training":
            above, here = here, here.get("properties", {}).get(part, {})
            path.append(part)
    return Node(tuple(path), _opened(root, here), above)


def _opened(root: Schema, schema: Schema) -> Schema:
    """Return the schema with its reference followed, and of one that may be null what it is otherwise."""
    others = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    if "discriminator" not in schema and len(others) == 1:
        schema = {**schema, **others[0]}
    if "const" in schema:
        schema = {**schema, "enum": [schema["const"]]}
    return {**_at(root, schema["$ref"]), **schema} if "$ref" in schema else schema


def _at(root: Schema, reference: str) -> Schema:
    return root["$defs"][reference.rpartition("/")[2]]


def _models(model: type[Group]) -> Iterator[type[Group]]:
    """Yield a model and all that inherit from it."""
    yield model
    for each in model.__subclasses__():
        yield from _models(each)


@cache
def _meanings(module: str) -> dict[tuple[str, str], str]:
    """Return the docstring below each field of each model of a module."""
    meanings: dict[tuple[str, str], str] = {}
    for group in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(group, ast.ClassDef):
            for field, text in zip(group.body, group.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    doc = ast.literal_eval(text.value)
                    meanings[group.name, ast.unparse(field.target)] = " ".join(doc.replace("``", "").split())
    return meanings


def _meaning(model: type[Group], key: str) -> str | None:
    key = next((name for name, field in model.model_fields.items() if field.alias == key), key)
    kinds = (each for each in inspect.getmro(model) if issubclass(each, Group))
    texts = (_meanings(each.__module__).get((each.__name__, key)) for each in kinds)
    return next((text for text in texts if text), None)


def mistakes_of(error: ValidationError, model: type[Group], config: Mapping[str, Any]) -> Mistakes:
    """Return pydantic's errors as refusals."""
    refusals: list[Refusal] = []
    schema = schema_of(model)
    for details in error.errors():
        node = node_at(schema, details["loc"])
        context = details.get("ctx", {})
        if details["type"] == "rules":
            paths = [(*node.path, *field.split(".")) for field, _ in context["broken"]]
            remedies = [remedy for _, remedy in context["broken"]]
        else:
            tag = details["type"].startswith("union_tag")
            paths, remedies = [(*node.path, "name") if tag else node.path], [_remedy(details, node)]
        for path, remedy in zip(paths, remedies, strict=True):
            refusals.append(Refusal(".".join(path), value_at(config, path), remedy))
    return Mistakes(refusals)


def _remedy(error: ErrorDetails, node: Node) -> str:
    kind, value, more = error["type"], error["input"], node.schema.get("remedy", "")
    suffix = f"; {more}" if more else ""
    match kind:
        case "extra_forbidden":
            keys = [key for key in node.above.get("properties", {}) if key != "name"]
            return unknown_key(node.path[-1], keys)
        case "missing":
            options = ", ".join(sorted(node.schema.get("discriminator", {}).get("mapping", {})))
            return "is missing; must be " + (f"one of {options}" if options else "given a value")
        case "union_tag_invalid" | "union_tag_not_found":
            return f"must be one of {', '.join(sorted(node.schema['discriminator']['mapping']))}"
        case "literal_error" | "enum":
            return f"must be one of {', '.join(map(str, node.schema.get('enum', ())))}{suffix}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"must be {range_of(node.schema)}{suffix}"
        case "finite_number":
            return "must be finite"
        case "float_type" | "float_parsing":
            return "must be finite" if type(value) is int else wrong(float, value)
        case "int_type" | "int_from_float" | "int_parsing":
            return wrong(int, value)
        case "bool_type":
            return wrong(bool, value)
        case "string_type" | "string_pattern_mismatch":
            return more or f"{wrong(str, value)} or null"
        case "model_type" | "model_attributes_type" | "dict_type" | "dataclass_type":
            return wrong(Mapping, value)
        case _:
            return more or re.sub("^Input should be", "must be", error["msg"])


def range_of(schema: Schema) -> str:
    """Return the range of a number in words; nothing of what has none."""
    bounds = Range(**{name: schema[key] for key, name in BOUNDS.items() if key in schema})
    return bounds.words(int if schema.get("type") == "integer" else float)
