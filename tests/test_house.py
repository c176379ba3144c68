"""House: figures of the package that a count of lines does not show, under ceilings that only fall.

A person holds the core; these say how much there is to hold. A ceiling is lowered when a figure is well below it.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    "base",
    "privacy",
    "messages",
    "configs",
    "tasks",
    "strategies",
    "client",
    "server",
    "populations",
    "modes",
    "run",
    "simulations",
    "cli",
)
EXTENSIONS = (
    "adapters",
    "audit",
    "deployment",
    "engines",
    "evidence",
    "export",
    "links",
    "personal",
    "questions",
    "tables",
    "text",
)
NO_CORE = ("tasks/adapters/", "tasks/shipped/", "cli/templates/")
# Names of parts that a mode or a population has or lacks.
PARTS = {"deployed", "together", "record", "summed", "simulated", "masking", "tuning", "tuned", "distributed"}
FEATURES = {  # what a file knows, by the words of its identifiers
    "real clients": r"\bdeployed\b|\bDeployed\b",
    "records at a client": r"\.record\b|RecordOrder|RecordPrivacy|record_budget",
    "records together": r"\btogether\b|RecordDistributed|StepTerms",
    "masks": r"\bmasking\b|Masking|secagg\b",
    "arms": r"\btuning\b|\barms?\b|\btuned\b",
    "evaluation": r"evaluation_plan|EvaluationPlan|one_evaluation|evaluate_at|\bevaluate\.clients",
    "compression": r"\bcompression\b|CompressionPlan",
    "audit": r"\baudit\b|canar",
    "scaling": r"\bscaling\b|ScalingPlan",
    "differences": r"differences?\b.*model|sends_differences|last_model",
    "simulation": r"\bsimulated\b",
    "persons": r"per_person|clients_per_person|\bowners\b",
}
MANY_FEATURES = 6
DIALECT = {
    "told",
    "said",
    "asked",
    "found",
    "given",
    "beside",
    "known",
    "wanted",
    "made",
    "seen",
    "shown",
    "held",
    "taken",
    "counted",
    "begun",
    "done",
    "whose",
    "whom",
    "put",
    "near",
    "behind",
    "place",
    "kept",
    "named",
    "left",
}
CEILINGS = {
    "lines of the package": 103_973,  # with docstrings, comments and blank lines
    "lines of the core": 63_432,
    "files that know many features": 0,
    "tests of None": 1_463,
    "tests of None on a part's name": 25,
    "conditional expressions": 1_619,
    "parameters that are tuples": 5,
    "properties that are read for their refusal": 0,
    "names that are participles or adverbs": 7,
    "files with functions and no test of their name": 189,
    "files that the smallest job loads": 187,
    "lines that the smallest job loads": 32_040,
}
SMALLEST = """
import sys, json
import fedveil as fv
fv.simulate("digits", num_rounds=3, seed=0, quiet=True, privacy="none", audit="off")
files = {m.__file__ for name, m in sys.modules.items() if name.partition(".")[0] == "fedveil"} - {None}
print(json.dumps([len(files), sum(open(each).read().count("\\n") for each in files)]))
"""


def shipped() -> Iterator[Path]:
    """Yield the files of the package."""
    yield from (ROOT / name for name in ("__init__.py", "face.py"))
    for room in (*CORE, *EXTENSIONS):
        yield from (each for each in ROOT.joinpath(room).rglob("*.py") if "templates" not in each.parts)


def figures() -> dict[str, int]:
    """Return the figures of the source."""
    count = Counter[str]()
    for path in shipped():
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        core = name.partition("/")[0] in CORE and not name.startswith(NO_CORE)
        count["lines of the package"] += text.count("\n")
        count["lines of the core"] += core * text.count("\n")
        tested = (ROOT / "tests" / path.relative_to(ROOT)).with_name(f"test_{path.name}").exists()
        count["files with functions and no test of their name"] += "def " in text and not tested
        known = sum(bool(re.search(words, text)) for words in FEATURES.values())
        count["files that know many features"] += known >= MANY_FEATURES
        for node in ast.walk(ast.parse(text)):
            count.update(_figures_of(node))
    return {name: count[name] for name in CEILINGS if "smallest" not in name}


def _figures_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare):
        if any(isinstance(each, ast.Constant) and each.value is None for each in node.comparators):
            yield "tests of None"
            left = node.left
            if (left.attr if isinstance(left, ast.Attribute) else getattr(left, "id", "")) in PARTS:
                yield "tests of None on a part's name"
    elif isinstance(node, ast.IfExp):
        yield "conditional expressions"
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for each in (*node.args.args, *node.args.kwonlyargs):
            hint = "" if each.annotation is None else ast.unparse(each.annotation)
            if hint.startswith("tuple[") and "..." not in hint:
                yield "parameters that are tuples"
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
        names = {getattr(each, "id", "") for each in node.targets}
        yield from ["properties that are read for their refusal"] * (names == {"_"})
    bound = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else ""
    if (node.arg if isinstance(node, ast.arg) else bound) in DIALECT:
        yield "names that are participles or adverbs"


def test_no_figure_of_the_source_rises() -> None:
    found = figures()
    assert {name: value for name, value in found.items() if value > CEILINGS[name]} == {}


def test_the_smallest_job_loads_no_more(tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", SMALLEST]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    files, lines = json.loads(done.stdout.splitlines()[-1])
    assert files <= CEILINGS["files that the smallest job loads"]
    assert lines <= CEILINGS["lines that the smallest job loads"]
