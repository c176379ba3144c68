"""The pages are true: their commands run, their Python runs, their links lead somewhere, their keys exist.

Above a block an HTML comment may say what the reader need not see:

  <!-- not run: install -->       it installs something; no other reason is accepted
  <!-- run with: num_rounds=2 --> appended to each `fedveil simulate`, `server` and `plan --accuracy` of the block, so
                                  that it ends soon
  <!-- file: my_task.py -->       the block is that file; later blocks of the page find it

A page's blocks run in their order in one folder, as a reader would run them. A page with the line

  <!-- continues: deploy.md -->    runs after that page, in the same folder
"""

import ast
import contextlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from fedveil.configs.optimizers import keywords_of
from fedveil.configs.training_settings import STRATEGIES
from fedveil.messages.local_training import OPTIMIZERS

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
EVIDENCE = ROOT / "docs" / "evidence"  # its commands take minutes: they must exist, and are not run
CONTINUES = re.compile(r"^<!-- continues: (\S+) -->$", re.MULTILINE)
REFERENCE = ROOT / "docs" / "reference"  # made by docs/make_reference.py
TOP_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = sorted([*(ROOT / name for name in TOP_PAGES), *(ROOT / "docs").rglob("*.md")])
RUN_PAGES = [page for page in PAGES if EVIDENCE not in page.parents]
INSTALLS = re.compile(
    r"\b(pip (install|download)|apt(-get)? install|pre-commit install)\b|^bash \.ci/run$|\.ci/release\.py|^openssl pkeyutl",
    re.MULTILINE,
)
FENCE = re.compile(
    r"(?:<!-- ([a-z ]+): ([^\n]*) -->\n)?^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """One fenced block and the comment above it."""

    page: Path
    language: str
    body: str
    note: str = ""
    value: str = ""

    def commands(self) -> list[str]:
        """The commands of a shell block, continued lines joined."""
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.language == "console":
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.startswith("#")]

    def shown(self) -> list[str]:
        """The output that a console block shows."""
        return [line for line in self.body.splitlines() if line and not line.startswith("$ ")]


def blocks_of(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text())
    return [Block(page, m[3], m[4], m[1] or "", m[2] or "") for m in found]


def is_shell(block: Block) -> bool:
    return block.language in ("bash", "console", "sh", "shell")


def prose_of(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def is_file(span: str) -> bool:
    """Whether a span with a dot names a file, of the tree or of a run folder, and no key."""
    return (ROOT / span).exists() or span.endswith((".json", ".npy", ".png", ".svg"))


def identity(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- what a reader would run ------------------------------------------------------------------------------------


def series() -> list[list[Path]]:
    """Return each page that begins in an empty folder, with the pages that continue it behind it."""
    before = {page: CONTINUES.search(page.read_text()) for page in RUN_PAGES}
    first = {page: (page.parent / match[1]).resolve() for page, match in before.items() if match}
    assert set(first.values()) <= set(RUN_PAGES)

    def from_page(page: Path) -> list[Path]:
        return [
            page,
            *(
                each
                for next_page in RUN_PAGES
                if first.get(next_page) == page
                for each in from_page(next_page)
            ),
        ]

    return [from_page(page) for page in RUN_PAGES if page not in first]


@pytest.mark.parametrize("pages", series(), ids=lambda pages: "+".join(map(identity, pages)))
def test_every_block_of_a_page_runs(
    pages: Sequence[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    forks: dict[str, str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    request.addfinalizer(partial(end_what_was_left, tmp_path))
    for number, block in enumerate(block for page in pages for block in blocks_of(page)):
        if block.note == "file":
            (tmp_path / block.value).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.value).write_text(block.body)
        elif block.note == "not run":
            assert block.value == "install" and INSTALLS.search(block.body), block.body
        elif block.language == "python":
            script = tmp_path / f"block_{number}.py"
            script.write_text(block.body)
            succeed(f"fedveil --script {script}", tmp_path, forks)
        elif is_shell(block):
            run_commands(block, tmp_path, number, forks)


NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
# A line that its cells print, and the pictures that it shows.
PRINTED = {
    "tutorial": ("model    client  epsilon 3.00 at delta 0.0001", 1),
    "tables": ("epsilon 3.0", 0),
    "hugging_face": ("'accuracy': 1.0", 0),
    "opacus_ledger": ("BudgetExhausted the record budget is spent", 0),
    "officer": ("result.json differs from the bundled file", 0),
    "research": ("3.0 0.831", 1),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_in_their_order(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: dict[str, str]
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    line, pictures = PRINTED[path.stem]
    assert line in succeed(f"fedveil --script {script}", tmp_path, forks)
    shown = [output.get("data", {}) for cell in cells for output in cell["outputs"]]
    assert sum("image/svg+xml" in data for data in shown) == pictures


def end_what_was_left(folder: Path) -> None:
    """End the processes that a page started in the background, if it did not come to where it ends them."""
    for process in [int(each) for file in folder.rglob("*.pid") for each in file.read_text().split()]:
        with contextlib.suppress(OSError):  # it is over
            if Path(f"/proc/{process}/cwd").readlink() == folder:
                os.kill(process, signal.SIGTERM)


def run_commands(block: Block, folder: Path, number: int, forks: Mapping[str, str]) -> None:
    printed = ""
    for index, command in enumerate(block.commands()):
        words = shlex.split(command)
        if "fedveil" in words[:2]:
            command += suffix_of(block, words, f"block-{number}-{index}")
        printed += succeed(command, folder, forks)
    if block.language == "console" and block.note != "run with":
        rest = iter(printed.splitlines())
        for line in block.shown():
            assert any(line.rstrip() == other.rstrip() for other in rest), f"not printed: {line!r}\n{printed}"


def suffix_of(block: Block, words: Sequence[str], name: str) -> str:
    """What the page does not show: overrides that make a run short, and a folder of its own for each run."""
    more = (
        block.value if block.note == "run with" and {"simulate", "server", "--accuracy"} & set(words) else ""
    )
    foldered = any(word.startswith(("hydra.run.dir=", "resume=")) for word in words)
    if "simulate" in words and not {"-m", "--help"} & set(words) and not foldered:
        more += f" hydra.run.dir={name}"  # two runs of one second would share the default
    return f" {more}"


def succeed(command: str, folder: Path, forks: Mapping[str, str] | None = None) -> str:
    environment = {**os.environ, **(forks or {})}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_the_installed_command_runs_the_main_job_as_the_readme_says(tmp_path: Path) -> None:
    first = blocks_of(ROOT / "README.md")[0].body.strip()
    assert first.endswith("&& .venv/bin/fedveil simulate")
    command = [str(Path(sys.executable).parent / "fedveil"), "simulate", "num_rounds=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "completed: 1 rounds; results: " in done.stdout


def commands_of(page: Path) -> list[str]:
    return [command for block in blocks_of(page) if is_shell(block) for command in block.commands()]


def test_the_evidence_is_there() -> None:
    names = {"accuracy", "audits", "benchmarks", "design", "questions", "reliability", "security"}
    assert {page.stem for page in EVIDENCE.glob("*.md")} == names
    assert all(commands_of(EVIDENCE / f"{name}.md") for name in names - {"audits", "design", "security"})


@pytest.mark.parametrize("page", sorted(EVIDENCE.glob("*.md")), ids=identity)
def test_the_commands_of_the_evidence_exist(page: Path) -> None:
    """Each is a module, a campaign, a script with its options, or `fedveil` with keys that exist."""
    for command in commands_of(page):
        campaign = re.search(r"-m pytest -m campaign -s (tests/\S+\.py) -k (\w+)", command)
        if campaign:
            tests = (ROOT / campaign[1]).read_text().split("\n\n\n")
            assert any(campaign[2] in test and "mark.campaign" in test for test in tests), command
        elif module := re.search(r"python3? -m (\S+)", command):
            assert importlib.util.find_spec(module[1]), command
        elif oracle := re.match(r"python (tests/oracles/\S+\.py) ", command):
            options = set(re.findall(r"--[a-z][a-z-]*", command))
            script = (ROOT / oracle[1]).read_text()
            assert all(f'"{each}"' in script for each in options), command
        else:
            assert command.startswith("fedveil simulate "), command
            assert unknown_keys(command) == [], command


# --- what a reader would follow or believe ----------------------------------------------------------------------


@pytest.mark.parametrize(("page", "least"), [("security", 40), ("reliability", 30)])
def test_every_test_that_a_page_names_exists(page: str, least: int) -> None:
    names = set(re.findall(r"`(test_\w+)`", (EVIDENCE / f"{page}.md").read_text()))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > least
    assert {name for name in names if f"def {name}(" not in tests} == set()


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_internal_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_relative_to(ROOT) and linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


def known_keys() -> tuple[set[str], dict[str, set[str]]]:
    """Every key that a configuration can have, and every group's options."""
    keys, groups = set[str](), dict[str, set[str]]()
    for file in CONFIGS.rglob("*.yaml"):
        text = file.read_text()
        place = file.parent.relative_to(CONFIGS)
        prefix = "" if "@package _global_" in text else ".".join(place.parts)
        keys |= set(_paths(yaml.safe_load(text), prefix))
        if place.parts:
            groups.setdefault(place.parts[0], set()).add(file.stem)
    groups |= {"strategy": set(STRATEGIES), "optimizer": set(OPTIMIZERS)}
    keys |= {f"strategy.{key}" for each in STRATEGIES.values() for key in each.model_fields}
    keys |= {f"optimizer.{key}" for name in [*OPTIMIZERS][1:] for key in ("lr", *keywords_of(name))}
    return keys, groups


def _paths(node: object, prefix: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path
            yield from _paths(value, path)


def unknown_keys(command: str) -> list[str]:
    """Return the overrides of a `fedveil simulate` command that name no key, no group and no argument of a task."""
    keys, groups = known_keys()
    named = [word.partition("=")[0] for word in shlex.split(command) if "=" in word]
    return [
        name
        for name in named
        if name not in keys and name not in groups and not name.startswith("task.args.")
    ]


# Keys that are Hydra's own, or stand in other files than a configuration.
OTHER_KEYS = re.compile(r"task\.args\.|hydra\.|link=|fedveil\.|pip\b")


@pytest.mark.parametrize("page", [page for page in PAGES if REFERENCE not in page.parents], ids=identity)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    keys, groups = known_keys()
    for span in re.findall(r"`([^`\n]+)`", prose_of(page)):
        match = re.fullmatch(r"([a-z_][a-z_.]*[a-z_])\.?(?:(=)(\S*))?", span)
        if match is None or OTHER_KEYS.match(span):
            continue
        key, equals, value = match.groups()
        if equals and key in groups:
            assert value == "" or value in groups[key], span
        elif equals or ("." in key and key.split(".")[0] in groups and not is_file(key)):
            assert key in keys, span


def test_checked_keys_are_neither_all_nor_none() -> None:
    """So that the test above cannot pass by finding everything, or nothing."""
    keys, groups = known_keys()
    assert {"num_rounds", "cohort.rate", "privacy.clipping_norm", "privacy.record.max_grad_norm"} <= keys
    assert {"learning_rate", "faults.dropout", "ledger.dir", "strategy.eta"} <= keys
    assert "privacy.epsilon" not in keys
    assert groups["cohort"] == {"poisson", "fixed", "min_separation", "first", "cyclic_poisson", "all"}


@pytest.mark.parametrize("page", PAGES, ids=identity)
def test_a_page_names_no_machine(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    assert not re.search(r"\b(TODO|TBD|XXX)\b", text)


def test_reference_is_that_of_the_docstrings() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["pages"]()
    kept = {name: (REFERENCE / name).read_text() for name in made}
    assert kept == made, "run: python docs/make_reference.py"
    assert {page.name for page in REFERENCE.glob("*.md")} - made.keys() == {
        "policy.md"
    }  # a test makes its table
    assert (
        "## `cohort.size`" in made["refusals.md"]
        and "there is no such key; did you mean" in made["refusals.md"]
    )
    assert "**Args**" in made["privacy.md"] and "### Ledger.reserve" in made["privacy.md"]


@pytest.mark.parametrize("name", ["architecture", "evidence/audits", "reliability"])
def test_every_file_that_a_page_names_exists(name: str) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose_of(ROOT / "docs" / f"{name}.md"))
    files = [span for span in spans if re.fullmatch(r"[\w/]+\.(py|yaml)", span) and "NAME" not in span]
    assert [file for file in files if "/" in file and not (ROOT / file).exists()] == []


def said_by_the_program() -> list[re.Pattern[str]]:
    """Return a pattern for each text of the package, with anything in the place of what is filled in."""
    patterns: list[re.Pattern[str]] = []
    for file in ROOT.rglob("*.py"):
        if file.relative_to(ROOT).parts[0] not in (
            "tests",
            "benchmarks",
            "docs",
            "typings",
            ".venv",
            "build",
        ):
            patterns += [re.compile(text) for text in _texts(ast.parse(file.read_text()))]
    return patterns


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        fixed = [each.value if isinstance(each, ast.Constant) else None for each in parts]
        if len(" ".join(each for each in fixed if isinstance(each, str)).split()) >= 3:
            yield "".join(re.escape(each) if isinstance(each, str) else ".+" for each in fixed)


def test_sentences_of_the_troubleshooting_page_are_the_programs() -> None:
    page = ROOT / "docs" / "troubleshooting.md"
    quoted = [
        line
        for block in blocks_of(page)
        if block.language == "text"
        for line in block.body.strip().splitlines()
    ]
    patterns = said_by_the_program()
    assert len(quoted) >= 25
    for sentence in quoted:
        # What a `Refusal` says stands behind the field and its value.
        said = [found for each in patterns if (found := each.search(sentence))]
        assert any(found.end() == len(sentence) for found in said), sentence


def test_the_task_of_the_quickstart_is_short_and_complete() -> None:
    example = next(b for b in blocks_of(ROOT / "docs" / "quickstart.md") if b.note == "file")
    assert len(example.body.splitlines()) < 60
    assert "..." not in example.body
