"""Groups of keys as pydantic models: strict, frozen, and refused in sentences of a JSON schema.

The schema says of every key its type, range, default and meaning; help, completion and refusals read it.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from ..base.extensions import extension, installed, names
from ..base.refusal import Range, Refusal
from ..messages.local_training import RULES
from .strict import Mistakes, unknown_key, value_at, wrong

Schema = Mapping[str, Any]  # JSON schema, of a whole configuration or a part
BOUNDS = {
    "exclusiveMinimum": "gt",
    "minimum": "ge",
    "exclusiveMaximum": "lt",
    "maximum": "le",
}  # fields of `Range`


def remedy(text: str, **keywords: Any) -> Any:
    """Return pydantic's Field with these keywords; if it refuses a value, this text is the remedy, after the range if any."""
    return Field(json_schema_extra={"remedy": text}, **keywords)


class OfKeys:
    """Mark of a field that is a frozen dataclass, read from a group of keys as strictly as a `Group`."""

    def __get_pydantic_core_schema__(self, source: type[Any], handler: Any) -> Any:
        """Return pydantic's schema: a dictionary of those fields that are keys (`RULES`), from which the dataclass is created.

        An instance of the dataclass is read like the dictionary of its fields, and dumped as that.
        """
        fields = {
            name: core_schema.typed_dict_field(handler.generate_schema(hint), required=False)
            for name, hint in get_type_hints(source, include_extras=True).items()
            if name in RULES
        }
        keys = core_schema.no_info_before_validator_function(
            lambda value: vars(value) if is_dataclass(value) else value,
            core_schema.typed_dict_schema(fields, config={"strict": True, "allow_inf_nan": False}),
        )
        return core_schema.no_info_after_validator_function(
            lambda values: source(**values),
            keys,
            serialization=core_schema.plain_serializer_function_ser_schema(vars),
        )


class OfExtension:
    """Mark of a field whose models belong to an extension; without the extension it is read by the core's own model."""

    def __init__(self, group: str, core: Any) -> None:
        self.group, self.core = group, core

    def __get_pydantic_core_schema__(self, source: type[Any], handler: Any) -> Any:
        """Return the schema of the extension's models if it is installed, else of the core's."""
        has_extension = installed("settings", self.group)
        model = extension("settings", self.group, "", "") if has_extension else self.core
        return handler.generate_schema(model)


class OfExtensions:
    """Mark of a field whose models, chosen by `name`, are the core's own and those of every installed extension of a point."""

    def __init__(self, point: str, core: Any) -> None:
        self.point, self.core = point, core

    def __get_pydantic_core_schema__(self, source: type[Any], handler: Any) -> Any:
        """Return the schema of the union of all these models."""
        rooms = [name for name in names(self.point) if installed(self.point, name)]
        models = reduce(or_, (extension(self.point, name, "", "") for name in rooms), self.core)
        return handler.generate_schema(Annotated[models, Field(discriminator="name")])


class Group(BaseModel):
    """Group of keys. Its values are checked like those of the command line, and refused in the same sentences."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)
    inline_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Fields whose keys stand at the group's own level, and those keys."""

    if not TYPE_CHECKING:  # with it a type checker would not know the keywords of each model

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise mistakes_of(error, type(self), values) from None

        __init__.__pydantic_base_init__ = True  # pydantic need not call it for groups within groups

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield (key, remedy) for each broken rule between keys of this group, each of which is in range by itself."""
        yield from ()

    @property
    def option(self) -> str:
        """Name of the option; empty of a group without options."""
        return str(getattr(self, "name", ""))

    def queries(self, whole: Any) -> Mapping[str, tuple[str, object]]:
        """Return the kinds of query that this group of the settings `whole` requests, each with the (key, value) for it."""
        return {}

    def options_of_task(self, whole: Any) -> Mapping[str, Any]:
        """Return the options that this group of the settings `whole` adds to those of every task."""
        return {}

    def conflicts(self, whole: Any) -> Iterator[tuple[str, str]]:
        """Yield (dotted key, remedy) for each broken rule between this group and others of the settings `whole`."""
        yield from ()

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        """Collect the keys of each inline group into one dictionary, as pydantic expects it."""
        if not isinstance(values, dict):
            return values
        for field, keys in cls.inline_groups.items():
            if field not in values:
                inner = {name: value for name, value in values.items() if name in keys}
                rest = {name: value for name, value in values.items() if name not in keys}
                values = {**rest, field: inner}
        return values

    @model_validator(mode="after")
    def _check_rules(self) -> Any:
        if broken := tuple(self.rules()):
            raise PydanticCustomError("rules", "rules are broken", {"broken": broken})
        return self


@dataclass(frozen=True)
class Node:
    """Place in a schema: its path of keys, the schema there, and the schema of the group above it."""

    path: tuple[str, ...]
    schema: Schema
    above: Schema


@cache
def schema_of(model: type[Group]) -> dict[str, Any]:
    """Return the JSON schema of a configuration: every key with type, range, default and meaning."""
    schema = model.model_json_schema()
    models = {group.__name__: group for group in _subclasses(Group)}
    for title, group in {**schema.get("$defs", {}), model.__name__: schema}.items():
        for key, value in group.get("properties", {}).items():
            value.pop("title", None)
            # The meaning of a key is the docstring below its field, which pydantic does not read.
            if text := _field_doc(models.get(title, model), key):
                value["description"] = text
        group.pop("title", None)
        if "description" in group:
            group["description"] = group["description"].partition("\n\nExample:")[0]
    # Keys of an inline group, such as training, stand at the top of the configuration.
    for key, keys in model.inline_groups.items():
        inner = schema["properties"].pop(key)["properties"]
        schema["properties"] |= {name: {**inner[name], "description": RULES[name][2]} for name in keys}
    for key, field in model.model_fields.items():
        if field.exclude:
            del schema["properties"][key]
    return schema


def node_at(schema: Schema, location: Sequence[str | int]) -> Node:
    """Return the node of a schema at a location, as pydantic's errors have it.

    Among the keys stand names of options, numbers of items and "training", an inline group: they are not in the node's path.
    """
    root, here, above = schema, schema, schema
    path: list[str] = []
    for part in location:
        here = _resolve(root, here)
        mapping = here.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            here = _definition(root, mapping[part])
        elif isinstance(part, str) and part != "training":
            above, here = here, here.get("properties", {}).get(part, {})
            path.append(part)
    return Node(tuple(path), _resolve(root, here), above)


def _resolve(root: Schema, schema: Schema) -> Schema:
    """Return a schema with its reference followed; a nullable type becomes that type, a constant an enumeration."""
    others = [each for each in schema.get("anyOf", ()) if each.get("type") != "null"]
    if "discriminator" not in schema and len(others) == 1:
        schema = {**schema, **others[0]}
    if "const" in schema:
        schema = {**schema, "enum": [schema["const"]]}
    return {**_definition(root, schema["$ref"]), **schema} if "$ref" in schema else schema


def _definition(root: Schema, reference: str) -> Schema:
    return root["$defs"][reference.rpartition("/")[2]]


def _subclasses(model: type[Group]) -> Iterator[type[Group]]:
    """Yield a model and all that inherit from it."""
    yield model
    for each in model.__subclasses__():
        yield from _subclasses(each)


@cache
def _field_docs(module: str) -> dict[tuple[str, str], str]:
    """Return the docstrings below the fields of a module's models, by the names of model and field."""
    docs: dict[tuple[str, str], str] = {}
    for group in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(group, ast.ClassDef):
            for field, text in zip(group.body, group.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    doc = ast.literal_eval(text.value)
                    docs[group.name, ast.unparse(field.target)] = " ".join(doc.replace("``", "").split())
    return docs


def _field_doc(model: type[Group], key: str) -> str:
    """Return the docstring of a key's field in a model, or else in those that it inherits from; empty without one."""
    name = next((name for name, field in model.model_fields.items() if field.alias == key), key)
    kinds = (each for each in inspect.getmro(model) if issubclass(each, Group))
    docs = (_field_docs(each.__module__).get((each.__name__, name)) for each in kinds)
    return next(filter(None, docs), "")


def mistakes_of(error: ValidationError, model: type[Group], config: Mapping[str, Any]) -> Mistakes:
    """Return pydantic's errors as refusals. They show the values in `config`, where a reference to a secret is unresolved."""
    refusals: list[Refusal] = []
    schema = schema_of(model)
    for details in error.errors():
        node = node_at(schema, details["loc"])
        if details["type"] == "rules":
            broken = details.get("ctx", {})["broken"]  # as `Group.rules` yields them
        elif details["type"].startswith("union_tag"):
            broken = [("name", _remedy(details, node))]
        else:
            broken = [("", _remedy(details, node))]
        for key, remedy in broken:
            path = [*node.path, *filter(None, key.split("."))]
            refusals.append(Refusal(".".join(path), value_at(config, path), remedy))
    return Mistakes(refusals)


def _remedy(error: ErrorDetails, node: Node) -> str:
    """Return the remedy for one of pydantic's errors, from its type, the value, and the schema of the key."""
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
    """Return the range of a key's number in words, such as "at least 1"; empty if it has none."""
    bounds = Range(**{name: schema[key] for key, name in BOUNDS.items() if key in schema})
    return bounds.words(int if schema.get("type") == "integer" else float)
