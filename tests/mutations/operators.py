"""Operators on the syntax tree that put a fault into one place of the package; `<room>.toml` beside it lists the faults.

A block names a fault, the function, the operator with its place, and tests of which at least one must fail:

    ["a client takes an older roster"]
    in = "deployment/device/client_bundle.py: renew_roster"
    fault = "never version"
    red = "test_deployment_provision.py -k never_an_older"

    always WORDS            a condition is true: of an if, a loop or a filter; a comparison; an operand of and, or, not
    never WORDS             a condition is false
    skip WORDS              a statement is left out
    drop WORDS              an argument, an element, an entry or an operand of arithmetic is left out
    change WORDS to CODE    an expression becomes another; `part 2 of WORDS` is its second argument or operand
    replace WORDS by CODE   a statement becomes another

The place is the smallest one of the operator's kind that holds all the words: names, `call()`, `argument=`, `assigned=`,
`"key":`, constants, operators and keywords, in any order. There must be one such place; `WORDS inside OTHERS` takes the
one in the smallest statement that holds the others. In CODE, `$0` is the old expression, `$1` its first argument or operand.
`change return to`, `change for to` and `change x= to` are of what is returned, gone through or assigned.

Take words that stay when locals are renamed: a call, an attribute, a constant. A nested function is a place of its own,
`outer.inner`; a class and a module are what stands in them outside their functions, and the module has no name.
"""

import ast
import builtins
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FAULT = re.compile(
    r"(?P<verb>always|never|skip|drop|change|replace)(?: part (?P<part>\d+) of)?(?: (?P<words>.+?))??"
    r"(?: inside (?P<around>.+?))?(?: (?:to|by) (?P<code>.+))?",
    re.DOTALL,
)
DEFINES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
# Words of a node that has no name, by its class.
SYMBOLS = dict(
    re.findall(
        r"(\w+) ([^,]+)",
        "Add +, Sub -, Mult *, Div /, FloorDiv //, Mod %, Pow **, MatMult @, BitOr |, BitAnd &, BitXor ^, LShift <<, "
        "RShift >>, Eq ==, NotEq !=, Lt <, LtE <=, Gt >, GtE >=, Is is, IsNot is not, In in, NotIn not in, And and, Or or, "
        "Not not, USub -, UAdd +, Invert ~, IfExp if else, Subscript [], Starred *, Return return, Raise raise, For for, "
        "comprehension for",
    )
)
ELEMENTS = {ast.Tuple: "elts", ast.List: "elts", ast.Set: "elts", ast.MatchOr: "patterns"}


@dataclass(frozen=True)
class Mutation:
    """One fault, and the tests of which at least one must fail."""

    name: str
    file: str
    function: str
    fault: str
    tests: str
    select: str

    def applied(self, source: str) -> str:
        """Return the source of the file with the fault in it; each other line stays where it is.

        Raises:
          LookupError: no place or several are meant, or the fault names what the file does not.
        """
        match = FAULT.fullmatch(self.fault)
        if match is None or bool(match["code"]) != (match["verb"] in ("change", "replace")):
            raise LookupError(
                f"{self.name!r}: `{self.fault}` is none of the faults that {Path(__file__).name} lists"
            )
        verb, part, words, around, code = match.groups("")
        module = _module_of(source)
        targets = [scope for name, scope in module.scopes if name == self.function]
        candidates = [place for scope in targets for place in places(scope, verb, words, around)]
        if len(candidates) != 1:
            lines = "".join(f", line {place.node.lineno}" for place in candidates)
            count = f"{len(candidates)} places for" if targets else "no such function or class for"
            remedy = "give words that one of them holds alone" if targets else "give its new name"
            where = f"{self.file}: {self.function or 'module'}"
            raise LookupError(f"{self.name!r}: {where}: {count} `{self.fault}`{lines}; {remedy}")
        if unknown := _read_in(code) - module.bound:
            raise LookupError(
                f"{self.name!r}: {self.file} has no {', '.join(sorted(unknown))} any more; correct `{code}`"
            )
        try:
            return with_fault(source, candidates[0], verb, code, int(part or 0))
        except IndexError as error:
            raise LookupError(
                f"{self.name!r}: the place of `{self.fault}` has fewer parts; correct it"
            ) from error


@dataclass(frozen=True)
class Module:
    """The classes and functions of a file by their qualified names, and all names that it binds."""

    scopes: list[tuple[str, ast.AST]]
    bound: set[str]


@dataclass(frozen=True)
class Place:
    """What a fault may change: a node, the words by which it is found, and the part of the source that they are in."""

    node: Any
    words: frozenset[str]
    start: tuple[int, int]
    end: tuple[int, int]
    parent: Any = None


def read_mutations(folder: Path) -> dict[str, Mutation]:
    """Read the faults of all rooms by their name."""
    mutations: dict[str, Mutation] = {}
    for path in sorted(folder.glob("*.toml")):
        for name, block in tomllib.loads(path.read_text()).items():
            if name in mutations or set(block) != {"in", "fault", "red"}:
                raise ValueError(f"{path.name}: {name!r} stands twice, or its keys are not in, fault and red")
            file, _, function = block["in"].partition(": ")
            if (room := Path(file).parts[0].removesuffix(".py")) != path.stem:
                raise ValueError(f"{path.name}: {name!r} is of another room; move it to {room}.toml")
            tests, _, select = block["red"].partition(" -k ")
            mutations[name] = Mutation(name, file, function, block["fault"], tests, select)
    return mutations


def scopes(node: ast.AST, name: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield the module, its classes and functions, and theirs, by their qualified names."""
    yield name, node
    for child in _own(node):
        if isinstance(child, DEFINES) and child is not node:
            yield from scopes(child, f"{name}.{child.name}".lstrip("."))


def places(scope: ast.AST, verb: str, words: str, around: str = "") -> list[Place]:
    """Return the smallest places that hold all words, inside the smallest statement that holds those around them."""
    here = _smallest(_blocks(scope), around) if around else [Place(scope, frozenset(), (0, 0), (10**9, 0))]
    inside = [one for one in PLACES[verb](scope) if any(_holds(block, one) for block in here)]
    return _smallest(inside, words)


def _smallest(candidates: Iterable[Place], words: str) -> list[Place]:
    wanted = set(re.findall(r'"[^"]*":?|\S+', words))
    fits = [place for place in candidates if wanted <= place.words]
    return [one for one in fits if not any(_holds(one, other) and one.words > other.words for other in fits)]


def _holds(outer: Place, inner: Place) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def with_fault(source: str, place: Place, verb: str, code: str = "", part: int = 0) -> str:
    """Return the source with the fault at a place of it."""
    node = place.node
    match verb:
        case "always" | "never":
            text = f"({verb == 'always'})"
        case "skip":
            text = "pass"
        case "replace":
            text = code
        case "drop":
            node, text = place.parent, f"({ast.unparse(_without(place.parent, node))})"
        case _:
            operands = operands_of(node)
            node = operands[part - 1] if part else node
            texts = [f"({_cut(source, each)[1]})" for each in (node, *operands)]
            text = f"({re.sub(r'[$]([0-9])', lambda match: texts[int(match[1])], code)})"
    before, old, after = _cut(source, node)
    # What follows stays on its line.
    lines = "\n" * (old.count("\n") - text.count("\n"))
    return before + (f"{text[:-1]}{lines})" if text[0] == "(" else text + lines) + after


def operands_of(node: ast.AST) -> list[ast.expr]:
    """Return the arguments of a call; of another expression the operands, as they stand in the source."""
    if isinstance(node, ast.Call):
        return [*node.args, *(each.value for each in node.keywords)]
    operands = (each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr))
    return sorted(operands, key=lambda each: (each.lineno, each.col_offset))


def words_in(*nodes: ast.AST) -> frozenset[str]:
    """Return all words of some nodes."""
    return frozenset(word for node in nodes for each in _own(node) for word in _words_of(each))


@lru_cache(maxsize=1)  # faults of one file follow each other
def _module_of(source: str) -> Module:
    tree = ast.parse(source)
    return Module(list(scopes(tree)), _bound_in(tree) | {*dir(builtins)})


def _read_in(code: str) -> set[str]:
    """Return the names that a fault's code reads or sets, but its own: with one that is nowhere every test would fail."""
    tree = ast.parse(re.sub(r"[$][0-9]", "None", code))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    own = _bound_in(tree) & read
    return {node.id for node in names} - own


def _bound_in(tree: ast.Module) -> set[str]:
    bound: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                bound.add(name)
            case ast.alias(name=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name.partition(".")[0])
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                bound.add(name)
            case _:
                pass
        if isinstance(node, ast.alias) and node.asname:
            bound.add(node.asname)
    return bound


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and what is in it, but of a function or class in it no more than that it is there."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from [child] if isinstance(child, DEFINES) else _own(child)


def _readable(scope: ast.AST) -> list[ast.AST]:
    """Return the nodes of a scope but those in an f-string, whose positions differ between releases of Python."""
    hidden = {
        id(each)
        for node in _own(scope)
        if isinstance(node, ast.JoinedStr)
        for each in ast.walk(node)
        if each is not node
    }
    return [node for node in _own(scope) if node is not scope and id(node) not in hidden]


def _words_of(node: ast.AST) -> Iterable[str]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return [name]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return [f"{name}()"]
        case ast.keyword(arg=str(name)) | ast.Assign(targets=[ast.Name(id=name) | ast.Attribute(attr=name)]):
            return [f"{name}="]
        case ast.Constant(value=value):
            return [f'"{value}"' if isinstance(value, str) else repr(value)]
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            return [SYMBOLS[type(op).__name__]]
        case ast.Compare(ops=ops):
            return " ".join(SYMBOLS[type(op).__name__] for op in ops).split()
        case _:
            return SYMBOLS.get(type(node).__name__, "").split()


def _place(node: Any, *head: Any, parent: ast.AST | None = None, more: str = "") -> Place:
    """Return the place of a node, which is found by the words of `head`, or by its own."""
    spans = head or (node,)
    start = min((each.lineno, each.col_offset) for each in spans)
    end = max((each.end_lineno, each.end_col_offset) for each in spans)
    return Place(node, words_in(*spans) | set(more.split()), start, end, parent)


def _conditions(scope: ast.AST) -> Iterator[Place]:
    tests: list[ast.expr] = []
    for node in _readable(scope):
        match node:
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.Assert(test=test):
                tests.append(test)
            case ast.comprehension(ifs=ifs):
                tests += ifs
            case ast.BoolOp(values=values):
                tests += [node, *values]
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                tests += [node, operand]
            case ast.Compare():
                tests.append(node)
            case _:
                pass
    yield from map(_place, {id(test): test for test in tests}.values())


def _statements(scope: ast.AST) -> Iterator[Place]:
    """Yield the statements; those of several lines are found by the words of their first."""
    for place in _blocks(scope):
        head = [
            each for each in ast.iter_child_nodes(place.node) if isinstance(each, ast.expr | ast.withitem)
        ]
        whole = not hasattr(place.node, "body")
        yield place if whole else Place(place.node, words_in(*head), place.start, place.end)


def _blocks(scope: ast.AST) -> Iterator[Place]:
    own = (node for node in _own(scope) if isinstance(node, ast.stmt) and not isinstance(node, DEFINES))
    yield from map(_place, own)


def _parts(scope: ast.AST) -> Iterator[Place]:
    for node in _readable(scope):
        match node:
            case ast.Call(args=args, keywords=keywords):
                parts = [*args, *keywords]
            case ast.BinOp(left=left, right=right):
                parts = [left, right]
            case ast.Dict(keys=keys, values=values):
                parts = []
                yield from (
                    _place(each, key or each, each, parent=node)
                    for key, each in zip(keys, values, strict=True)
                )
            case _:
                parts = getattr(node, ELEMENTS.get(type(node), ""), [])  # type: ignore[arg-type]
        yield from (_place(part, parent=node) for part in parts)


def _expressions(scope: ast.AST) -> Iterator[Place]:
    for node in _readable(scope):
        match node:
            case ast.Return(value=ast.expr() as value) | ast.Assign(value=value) | ast.keyword(value=value):
                yield _place(value, node)
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                yield _place(value, target, value, more="for")
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant):
                        yield _place(value, key, value, more=f'"{key.value}":')
            case _:
                pass
        loaded = isinstance(getattr(node, "ctx", None), ast.Load | None)
        if isinstance(node, ast.expr) and loaded and not isinstance(node, ast.Starred | ast.Slice):
            yield _place(node)


PLACES = {
    "always": _conditions,
    "never": _conditions,
    "skip": _statements,
    "replace": _statements,
    "drop": _parts,
    "change": _expressions,
}


def _without(parent: Any, part: ast.AST) -> ast.AST:
    """Return an expression without one of its parts."""
    match parent:
        case ast.BinOp(left=left, right=right):
            return right if part is left else left
        case ast.Call(func=func, args=args, keywords=keywords):
            rest = [each for each in keywords if each is not part]
            return ast.Call(func, [each for each in args if each is not part], rest)
        case ast.Dict(keys=keys, values=values):
            rest = [(key, each) for key, each in zip(keys, values, strict=True) if each is not part]
            return ast.Dict(*map(list, zip(*rest, strict=True)) if rest else ([], []))
        case _:
            field = ELEMENTS[type(parent)]
            return type(parent)(**{field: [each for each in getattr(parent, field) if each is not part]})


def _cut(source: str, node: ast.AST) -> tuple[str, str, str]:
    """Return what stands before a node, the node, and what stands after it."""
    place, lines = _place(node), source.encode().splitlines(keepends=True)
    start, end = (sum(map(len, lines[: line - 1])) + column for line, column in (place.start, place.end))
    whole = source.encode()
    return whole[:start].decode(), whole[start:end].decode(), whole[end:].decode()
