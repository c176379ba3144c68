"""The command line: version, help, refusals and exit codes."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from shared.console import Console

from fedveil.cli.app import app

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


def test_module_shows_its_version_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; from fedveil.__main__ import main; sys.argv = ['fedveil', '--version']; main();"
        "print(sorted({'torch', 'flwr', 'hydra', 'ray', 'opacus', 'dp_accounting'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"fedveil {version('fedveil')}", "[]"]


def test_python_m_fedveil_refuses_with_2_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedveil", "simulate", "num_rounds=0", "privacy.epsilonn=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "privacy.epsilonn='1': there is no such key; did you mean 'privacy.target_epsilon'?",
        "num_rounds=0: must be from 1 to 100000",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["--help", "plan --json task=digits num_rounds=2", "nosuch"])
def test_a_verb_outlives_the_reader_of_its_output(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fedveil", *words.split()]
    done = subprocess.run(command, stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == (2 if words == "nosuch" else 0)


def test_output_on_a_full_disk_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fedveil", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "standard output: cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_network_is_off_by_default() -> None:
    names = (
        "FLWR_TELEMETRY_ENABLED",
        "FLWR_DISABLE_UPDATE_CHECK",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
        "RAY_USAGE_STATS_ENABLED",
    )
    assert [os.environ.get(name) for name in names] == ["0", "1", "1", "0"]


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(console: Console, argv: list[str]) -> None:
    code, out, _ = console(*argv)
    assert code == 0
    for verb in app.registered_commands:
        assert f"\n  {verb.name} " in out
    for group in app.registered_groups:
        assert f"\n  {group.name} " in out
    assert "\nOther:" not in out


def test_help_is_one_screen_with_the_runs_first(console: Console) -> None:
    _, out, _ = console("--help")
    lines = out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Run:", "Look:", "Own your data:", "Serve:", "Prove:", "Options:"]
    assert lines[lines.index("Run:") + 1].startswith("  simulate ")


def test_no_verb_is_a_mistake(console: Console) -> None:
    code, out, err = console()
    assert (code, out) == (2, "")
    assert "\n  simulate " in err


def test_unknown_verb_is_refused_with_the_nearest(console: Console) -> None:
    code, _, err = console("simulat")
    assert code == 2
    assert err == "verb='simulat': there is no such verb; did you mean 'fedveil simulate'?\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ledger"], "fedveil ledger verify PATH"),
        (["ledger", "shwo", "x"], "verb='shwo': there is no such verb; did you mean 'fedveil ledger show'?"),
        (["ledger", "show"], "fedveil ledger show: missing argument 'PATH'\nusage: fedveil ledger show PATH"),
    ],
)
def test_ledger_help_lists_its_arguments(console: Console, argv: list[str], said: str) -> None:
    code, out, err = console(*argv)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize("verb", ["simulate", "plan"])
def test_help_of_a_verb_lists_groups_examples_and_keys(console: Console, verb: str) -> None:
    code, out, _ = console(verb, "--help")
    assert code == 0
    assert "\n  engine=inprocess                One of inprocess, ray.\n" in out
    assert f"\n  fedveil {verb} task=heart privacy=record\n" in out
    assert f"usage: fedveil {verb} [key=value ...]" in out
    assert "\n  privacy.target_epsilon=3.0" in out
    assert console.written() == []


@pytest.mark.parametrize("verb", ["simulate", "plan"])
def test_cfg_job_shows_the_configuration_and_runs_nothing(console: Console, verb: str) -> None:
    code, out, _ = console(verb, "--cfg", "job", "cohort.rate=0.125")
    assert code == 0
    assert "rate: 0.125" in out
    assert "hydra:" not in out
    assert console.calls == []
    assert console.written() == []


def test_cfg_job_refuses_a_typo_too(console: Console) -> None:
    code, out, err = console("simulate", "--cfg", "job", "cohort.ratee=0.125")
    assert (code, out) == (2, "")
    assert "did you mean 'cohort.rate'?" in err


@pytest.mark.parametrize(
    ("verb", "argv", "extra"),
    [
        ("simulate", [], "simulation"),
        ("plan", [], "simulation"),
        ("server", ["folder"], "server"),
        ("provision", ["federation.yaml"], "server"),
        ("client start", ["folder"], "client"),
    ],
)
def test_missing_extra_is_named_in_one_sentence(
    console: Console, verb: str, argv: list[str], extra: str
) -> None:

    def found(name: str) -> str | None:
        return None if name == "torch" else name

    console.monkeypatch.setattr("fedveil.base.extras.find_spec", found)
    code, out, err = console(*verb.split(), *argv)
    assert (code, out) == (2, "")
    assert err == f"extra='{extra}': fedveil {verb} needs torch: pip install 'fedveil[{extra}]'\n"
