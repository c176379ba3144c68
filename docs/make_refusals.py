"""Table of every refusal by its key, from the source: `page_of` returns docs/reference/refusals.md."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
OTHERS = ("docs", "examples", "tests", "typings", "benchmarks", "build")  # without refusals of the package
CLASSES = ("Refusal", "Unaffordable", "CapEnded", "LedgerUnavailable")  # called with key, value and remedy
RULES = ("rules", "conflicts")  # generators of (key, remedy)
UNKNOWN = "…"
ANY = "Any key"
PLACEHOLDERS = re.compile(rf"[A-Z _;,{UNKNOWN}]*")  # a remedy of which nothing is known
HEAD = """\
# Refusals

<!-- Made by docs/make_reference.py from the source; do not edit. -->

Every refusal is one sentence, `key=value: remedy`: here by its key, in alphabetical order. A word in capitals stands for a
text or number of your case, and … for a part that depends on it. A key below a group, such as `task.folder`, is under its
whole name; look under its last word, too. A number out of range, a word that is not among the valid ones, and a value
of a wrong type have the sentences under [any key](#any-key); [configuration](configuration.md) lists what each key takes.
[Troubleshooting](../troubleshooting.md) explains the most frequent refusals. With a refusal the exit code is 2, or 1 where
the disk or the system failed, and nothing was written, sent or spent.
"""
OF_ANY = (
    "Remedies that several keys share, such as those for a number out of range, and those of keys that you name yourself, such",
    "as a column of a schema or an option of your own task. The refusal names the key.",
    "",
)


def page_of() -> str:
    """Return the page: a section for each key with its remedies, those of any key last."""
    found: dict[str, set[str]] = {}
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for key, remedy in refusals_in(tree):
            if not PLACEHOLDERS.fullmatch(remedy):
                found.setdefault(key, set()).add(remedy)
    general = found.pop(ANY, set())
    keys = sorted(found, key=lambda key: (key.strip("-").lower(), key))
    return "\n".join(
        [HEAD, *(section(f"`{key}`", found[key]) for key in keys), section(ANY, general, OF_ANY)]
    )


def section(title: str, remedies: set[str], introduction: Sequence[str] = ()) -> str:
    remedies_in_order = sorted(remedies, key=str.lower)
    return "\n".join(
        [f"## {title}", "", *introduction, *(f"- {escaped(each)}" for each in remedies_in_order), ""]
    )


def escaped(text: str) -> str:
    """Return text in which nothing is markup."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", text)


def sources() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] not in OTHERS and not parts[0].startswith(".") and "templates" not in parts:
            yield path


def refusals_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (key, remedy) of each refusal in a file, in their own words."""
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            continue
        names = names_in(scope)
        for node in own_nodes(scope):
            if isinstance(node, ast.Call) and called(node) in CLASSES and len(node.args) == 3:
                key, _, remedy = node.args
            elif isinstance(node, ast.Yield) and getattr(scope, "name", "") in RULES and is_pair(node.value):
                key, remedy = node.value.elts  # type: ignore[union-attr]
            else:
                continue
            for name in texts(key, names):
                yield from ((key_of(name, key), " ".join(each.split())) for each in texts(remedy, names))


def is_pair(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Tuple) and len(node.elts) == 2


def called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function or file that are in no function inside it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from own_nodes(child)


def names_in(scope: ast.AST) -> dict[str, list[ast.expr]]:
    """Return the expressions that are assigned to each name of a function."""
    names: dict[str, list[ast.expr]] = {}
    for node in own_nodes(scope):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names.setdefault(name, []).append(value)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                for target, value in zip(targets, values, strict=False):
                    if isinstance(target, ast.Name):
                        names.setdefault(target.id, []).append(value)
            case _:
                pass
    return names


def key_of(text: str, node: ast.expr) -> str:
    """Return the heading of a key; `ANY` where the key is a variable."""
    return ANY if not isinstance(node, ast.Constant) and text in (UNKNOWN, placeholder(node)) else text


def texts(node: ast.expr, names: Mapping[str, list[ast.expr]], depth: int = 0) -> list[str]:
    """Return the texts that an expression may have, with a word in capitals for each part that is not known."""
    match node:
        case ast.Constant(value=str(value)):
            return [value]
        case ast.JoinedStr(values=parts):
            return joined([texts(each, names, depth) for each in parts])
        case ast.FormattedValue(value=value):
            return texts(value, names, depth + 1)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return joined([texts(left, names, depth), texts(right, names, depth)])
        case ast.IfExp(body=body, orelse=orelse):
            return [*texts(body, names, depth), *texts(orelse, names, depth)]
        case ast.BinOp(left=ast.Constant(value=str(value)), op=ast.Mult()):
            return ["", value]
        case ast.Name(id=name) if depth < 4 and name in names:
            return [each for value in names[name] for each in texts(value, names, depth + 1)]
        case ast.Name(id=name) if name in constants():
            return [constants()[name]]
        case ast.Call(func=ast.Name(id="unreadable"), args=[_, remedy, *_]):
            return [f"cannot be read; {each}" for each in texts(remedy, names, depth)]
        case ast.Call(func=ast.Name(id="nearest")):
            return ["did you mean NAME?"]
        case ast.Call(func=ast.Name(id="str" | "len" | "repr" | "sorted" | "int"), args=[first, *_]):
            return texts(first, {}, depth + 1)
        case ast.Call(func=ast.Attribute(attr="join"), args=[first]):
            return [placeholder(first)]
        case ast.Call(func=ast.Attribute(attr="field"), args=[ast.Constant(value=str(value))]):
            return [value]
        case _:
            return [placeholder(node)]


def placeholder(node: ast.expr) -> str:
    """Return a word in capitals for an expression: the last of its names; `UNKNOWN` where it has none."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").replace("_", " ").upper()
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return placeholder(value)
        case _:
            return UNKNOWN


def joined(parts: list[list[str]]) -> list[str]:
    """Return each combination of the parts' texts, at most 8."""
    results = [""]
    for part in parts:
        results = [before + each for before in results for each in part][:8]
    return results


@cache
def constants() -> Mapping[str, str]:
    """Return the texts of the package's constants by name; none of a name with several texts."""
    found: dict[str, set[str]] = {}
    for path in sources():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(value))):
                    found.setdefault(name, set()).add(value)
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                    for target, value in zip(targets, values, strict=False):
                        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                            found.setdefault(target.id, set()).add(str(value.value))
                case _:
                    pass
    return {name: next(iter(each)) for name, each in found.items() if len(each) == 1}
