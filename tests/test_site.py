"""The site of the documents: it is built without a warning, loads nothing from elsewhere, and is served by a verb."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedveil import __version__
from fedveil.base.refusal import Refusal
from fedveil.cli import docs

ROOT = Path(__file__).parents[1]
QUIET = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=QUIET, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[
        -3000:
    ]  # a dead link or an orphan is a warning, and an error when strict
    return folder


def pages(site: Path) -> dict[str, str]:
    return {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}


def test_every_document_is_a_page_of_this_version(site: Path) -> None:
    found = pages(site)
    sources = {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
    }
    assert sources <= found.keys()
    assert all(f"fedveil {__version__}" in text for text in found.values())


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    assert {name: LOADED.findall(text) for name, text in pages(site).items() if LOADED.search(text)} == {}


def test_search_finds_a_term_of_each_section(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert {each["location"].partition("#")[0] for each in index if "epsilon" in each["text"]} > {
        "index.html",
        "epsilon.html",
        "budgets.html",
        "reference/configuration.html",
        "evidence/accuracy.html",
    }


def test_words_of_the_glossary_have_hover_texts(site: Path) -> None:
    text = (site / "budgets.html").read_text()
    assert '<abbr title="append-only, hash-chained, fsynced record of releases' in text


def test_a_notebook_is_a_page_with_its_code(site: Path) -> None:
    assert "fedveil" in (site / "tutorial.ipynb.html").read_text()


def test_files_that_pages_link_to_are_on_the_site(site: Path) -> None:
    assert (site / "files" / "examples" / "ledger_reader.mjs").read_bytes() == (
        ROOT / "examples" / "ledger_reader.mjs"
    ).read_bytes()


# --- the verb ---------------------------------------------------------------------------------------------------


# A shell's process in the background ignores Ctrl-C, and so would what it starts.
HEEDING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fedveil.__main__ import main
sys.exit(main())
"""


@pytest.fixture
def served() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", HEEDING, "docs", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[4]
        yield process, address
        process.kill()


def test_docs_serves_the_site_until_it_is_interrupted(served: tuple[subprocess.Popen[str], str]) -> None:
    process, address = served
    with urllib.request.urlopen(f"{address}epsilon.html") as page:
        assert b"What epsilon means" in page.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_docs_writes_into_an_empty_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(Refusal, match="is not empty; name another folder"):
        docs.docs(out=tmp_path)


def test_docs_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "CONFIG", tmp_path / "mkdocs.yml")
    with pytest.raises(Refusal, match="is missing; install fedveil again"):
        docs.build_site(tmp_path / "site")
