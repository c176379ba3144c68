"""Every verb, as the app lists them: help, usage errors, volume, JSON, colour and hints."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from hydra._internal.utils import get_args_parser
from shared.runs import run_quietly
from typer.main import get_command

from fedveil.cli.app import app
from fedveil.cli.plan import show_plan
from fedveil.cli.verbs import CONTEXT, HYDRA_FLAGS, leaves
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.budget import Budget, Unit
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.run.build import build
from fedveil.run.promise import meaning, recognised
from fedveil.run.unit_plan import unit_plans
from fedveil.strategies.hints import HINTS
from fedveil.strategies.registry import reason_against

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

run: Callable[[list[str]], int] = import_module("fedveil.__main__").run


def verbs() -> list[tuple[str, ...]]:
    """Return the words that every verb begins with, of the app's own list; a folder or file stands for hidden ones."""
    root = click.Context(get_command(app), info_name="fedveil", **CONTEXT)
    found: list[tuple[str, ...]] = []
    for leaf in leaves(root):
        words: list[str] = []
        context = leaf
        while context.parent is not None:
            words.insert(0, "./somewhere" if context.command.hidden else str(context.info_name))
            context = context.parent
        found.append(tuple(words))
    return found


VERBS = verbs()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that is over."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    run_quietly(["task=digits", "num_rounds=2", "audit=light"], folder)
    return folder


def test_the_list_of_verbs_is_whole() -> None:
    assert len(VERBS) >= 19
    assert {words[0] for words in VERBS} >= {"simulate", "plan", "ledger", "audit", "client"}


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_help_is_the_verbs_own_on_stdout_in_80_columns(say: Any, words: tuple[str, ...]) -> None:
    code, out, err = say(*words, "--help")
    assert (code, err) == (0, "")
    shown = " ".join(word for word in words if word != "./somewhere")
    first, rest = out.split("\n", 1)
    assert first.startswith(f"usage: fedveil {shown}")
    assert "Example:\n  fedveil " in rest and "--quiet" in rest and "--verbose" in rest
    assert max(map(len, rest.splitlines())) <= 80
    assert ("Change any of these with key=value:" in rest) == (
        words[0] in ("simulate", "plan") or words == ("server", "./somewhere")
    )


def test_helps_differ(say: Any) -> None:
    helps = [say(*words, "--help")[1] for words in VERBS if words[0] not in ("simulate", "server")]
    assert len(set(helps)) == len(helps)


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_unknown_option_is_refused_on_stderr(say: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = say(*words, "--jsn")
    assert (code, out) == (2, "")
    shown = " ".join(("fedveil", *(word for word in words if word != "./somewhere")))
    assert err.startswith(f"{shown}: there is no option '--jsn'")
    assert f"usage: {shown}" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ledger", "verify", "x", "--haed", "1"], "did you mean '--head'?"),
        (["simulate", "--cgf", "job"], "did you mean '--cfg'?"),
        (["simulate", "--epochs", "3"], "did you mean local_epochs=...?"),
        (["plan", "--lr=0.1"], "did you mean learning_rate=...?"),
        (["simulate", "--device", "cuda"], HINTS["device"]),
        (["provision", "rotat", "x", "y"], "did you mean 'fedveil provision rotate'?"),
        (["sim"], "did you mean 'fedveil simulate'?"),
        (["client", "stat", "x"], "did you mean 'fedveil client status'?"),
        (["budget", "set", "--epsilon", "1"], "missing option '--delta'"),
        (["client", "status", "x", "y"], "got unexpected extra argument"),
        (["audit", "x", "--records", "--membership", "loss"], "exclude each other"),
        (
            ["simulate", "task.folder=médecins"],
            "put its value in quotes, for the shell too: \"task.folder='médecins'\"",
        ),
        (["simulate", "link=flower"], "override='link': is no group of this verb"),
        (["audit", "x", "--membership", "guess"], "choose one of loss, rmia, lira, art"),
        (["version"], "did you mean 'fedveil --version'?"),
        (["simulate", "num_rounds", "5"], "override='num_rounds': write num_rounds=5\n"),
        (
            ["simulate", "cohort.size=10"],
            "with this cohort; cohort=first and cohort=fixed and cohort=min_separation have it",
        ),
        (["simulate", "scaling=asked"], "did you mean 'task.scaling'?"),
        (
            ["simulate", "task=my_task:Shops"],
            "write task=custom task.target=my_task:Shops allow_modules=[my_task]",
        ),
        (
            ["simulate", "privacy=3"],
            "privacy='3': there is no such option; did you mean privacy.target_epsilon=3?",
        ),
        (["nothing"], "verb='nothing': there is no such verb; fedveil --help lists them"),
    ],
)
def test_mistake_names_the_nearest_word(say: Any, argv: list[str], said: str, tmp_path: Path) -> None:
    code, out, err = say(*argv)
    assert (code, out) == (2, "")
    assert said in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "simulate task=x",
        "plan task=x",
        "ask x.yaml",
        "predict x x.csv",
        "export x --to int8",
        "server x",
        "client explain x x",
    ],
)
def test_a_users_own_modules_may_lie_in_the_folder_of_the_command(
    say: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert say(*words.split())[0] == 2
    assert sys.path[-1] == str(tmp_path)


def test_names_of_other_tools_are_understood(say: Any) -> None:
    code, _, err = say(
        "simulate", "lr=0.1", "device=cuda", "strategy=krum", "num_rounds=0", "privacy.epsilon=1"
    )
    assert code == 2
    assert sorted(err.splitlines()) == sorted(
        [
            "lr='0.1': there is no such key; did you mean 'learning_rate'?",
            "device='cuda': there is no such key; did you mean 'engine.device'?",
            f"strategy='krum': {reason_against('krum')}",
            "num_rounds=0: must be from 1 to 100000",
            "privacy.epsilon='1': there is no such key; did you mean 'privacy.target_epsilon'?",
        ]
    )


@pytest.mark.parametrize(
    "name", ["krum", "FedMedian", "median", "multikrum", "DifferentialPrivacyServerSideFixedClipping"]
)
def test_a_strategy_that_cannot_be_is_refused_with_the_reason(name: str) -> None:
    assert reason_against(name)
    assert reason_against("fedavg") is reason_against("fedavgg") is None


def test_the_flags_are_hydras_own() -> None:
    theirs = {name for action in get_args_parser()._actions for name in action.option_strings}
    ours = {name for names, _, _ in HYDRA_FLAGS for name in names}
    assert ours | {"--help", "-h", "--version"} == theirs


@pytest.mark.parametrize("argv", [["help"], ["help", "ledger", "show"], ["ledger", "help"]])
def test_help_may_be_a_word(say: Any, argv: list[str]) -> None:
    code, out, _ = say(*argv)
    assert code == (2 if argv == ["ledger", "help"] else 0)
    assert out or argv == ["ledger", "help"]


# --- results ------------------------------------------------------------------------------------------------------


def results(finished: Path) -> Iterator[tuple[str, ...]]:
    yield ("ledger", "show", str(finished / "ledger"))
    yield ("ledger", "verify", str(finished / "ledger"))
    yield ("ledger", "export", str(finished / "ledger"))
    yield ("budget", "set", "--epsilon", "3", "--delta", "1e-5", "--until", "2099-12-31")
    yield ("budget", "show")
    yield ("audit", str(finished))
    yield ("audit", "claim", "--epsilon", "3", "--delta", "1e-5", "--guesses", "400", "--correct", "330")
    yield ("plan", "privacy.noise_multiplier=9")


def test_json_is_one_value_and_quiet_is_nothing(say: Any, finished: Path) -> None:
    for argv in results(finished):
        code, out, _ = say(*argv, "--json")
        assert code in (0, 1, 3, 4), argv
        assert json.loads(out) is not None, argv
        assert say(*argv, "--json", "--quiet")[1] != "", argv
        assert say(*argv, "--quiet")[:2] == (code, ""), argv
    assert json.loads(say("client", "request", "keys", "--name", "harbour", "--json")[1]) == {
        "request": "keys/request.toml"
    }


def test_refusal_is_printed_though_quiet_and_traced_if_verbose(say: Any) -> None:
    assert (
        say("ledger", "verify", "none", "-q")[2]
        == "ledger='none': does not exist; give the path of a ledger\n"
    )
    code, _, err = say("ledger", "verify", "none", "-v")
    assert code == 2 and "Traceback" in err and err.endswith("give the path of a ledger\n")


def in_a_terminal(*argv: str, **environment: str) -> str:
    """Return what a command prints in a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "fedveil", *argv],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm-256color", **environment},
    )
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 4096):
            said += piece
    except OSError:  # the other end is closed
        pass
    child.wait()
    os.close(ours)
    return said.decode()


def test_no_color_is_honoured(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger", Budget(Unit.CLIENT, 1.0, 1e-5), owner="0" * 32, simulated=False):
        pass
    damaged = bytearray((tmp_path / "ledger").read_bytes())
    at = damaged.find(b"zero-out")
    damaged[at : at + 4] = b"ZERO"
    (tmp_path / "ledger").write_bytes(damaged)
    argv = ("ledger", "verify", str(tmp_path / "ledger"))
    assert "\x1b[1;31m" in in_a_terminal(*argv)
    plain = in_a_terminal(*argv, NO_COLOR="1")
    assert "DAMAGED" in plain and "31m" not in plain


def test_a_plan_says_the_same_whether_or_not_data_are_read() -> None:
    for overrides in (["task=digits"], ["task=digits", "privacy=record"]):
        settings = settings_from_overrides([*overrides, "num_rounds=2"])
        assert unit_plans(build(settings, announced=True)) == unit_plans(build(settings))


@pytest.mark.parametrize("epsilon", [1, 30])
def test_a_plan_says_what_its_epsilon_means(epsilon: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The two sentences are those of the page of a run, by the curve of the plan."""
    settings = settings_from_overrides([f"privacy.target_epsilon={epsilon}", "num_rounds=2", "cohort=all"])
    show_plan(settings)
    text = " ".join(capsys.readouterr().out.split())
    (plan,) = unit_plans(build(settings, announced=True))
    share = recognised({"curve": plan.curve.to_json()})
    first, second = meaning(["the other clients", "recipients of the model"], "client", share)
    assert f"{first} {second}" in text and ("does not prevent" in text) is (epsilon == 30)


def test_a_plan_without_a_target_says_no_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(settings_from_overrides(["privacy.target_epsilon=null", "privacy.noise_multiplier=1"]))
    assert "wrongly suspects" not in capsys.readouterr().out
