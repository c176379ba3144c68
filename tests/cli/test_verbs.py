"""Every verb, as the app lists them: help, usage errors, volume, JSON, colour, hints, completion, and what is imported."""

import json
import os
import pty
import shutil
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
from fedveil.cli.new import COMMANDS
from fedveil.cli.verbs import CONTEXT, HYDRA_FLAGS, leaves
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.budget import Budget, Unit
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.run.build import build
from fedveil.run.unit_plan import unit_plans
from fedveil.strategies.hints import HINTS
from fedveil.strategies.registry import reason_against
from fedveil.tasks.exported import FILES

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

run: Callable[[list[str]], int] = import_module("fedveil.__main__").run
SHELLS = ("bash", "zsh")
Said = tuple[int, str, str]


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


@pytest.fixture
def say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Said]:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def spoken(*argv: object) -> Said:
        capsys.readouterr()
        code = run([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return spoken


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
    own = rest.split("Groups (choose one each")[0]
    assert max(map(len, own.splitlines())) <= 80
    assert ("Keys (change any, key=value):" in rest) == (
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
        (["simulate", "cohort.size=10"], "with this cohort; cohort=fixed and cohort=min_separation have it"),
        (["simulate", "scaling=asked"], "did you mean 'task.scaling'?"),
        (
            ["simulate", "task=my_task:Shops"],
            "write task=custom task.target=my_task:Shops allow_modules=[my_task]",
        ),
        (["simulate", "privacy=3"], "privacy='3': there is no such option; known: client_central,"),
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


def test_ledgers_are_verified_by_a_pattern_without_their_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder, tmp_path = tmp_path, tmp_path / "client_ledgers"
    tmp_path.mkdir()
    for name in ("a.ledger", "b.ledger"):
        Ledger.open(tmp_path / name, Budget(Unit.CLIENT, 1.0, 1e-5), owner="0" * 32, simulated=False).close()
    (tmp_path / "a.ledger.lock").write_text("17")
    (tmp_path / "caps.json").write_text("{}")
    assert run(["ledger", "verify", *map(str, sorted(tmp_path.iterdir()))]) == 0
    said = " ".join(capsys.readouterr().out.split())  # a long path wraps its line
    assert said.count("every hash is correct") == 2 and "DAMAGED" not in said
    assert run(["ledger", "verify", str(tmp_path / "a.ledger.lock")]) == 2
    assert "is a lock or journal" in capsys.readouterr().err
    for folder in (tmp_path, run_folder):
        assert run(["ledger", "verify", str(folder)]) == run(["ledger", "show", str(folder)]) == 0
        assert " ".join(capsys.readouterr().out.split()).count("every hash is correct") == 2
    assert run(["ledger", "export", str(tmp_path)]) == 2
    assert "is a folder; give the path of one ledger in it" in capsys.readouterr().err
    (tmp_path / "b.ledger").write_bytes(b"nothing")
    assert run(["ledger", "verify", "--json", *map(str, sorted(tmp_path.glob("*")))]) == 1
    assert [json.loads(line)["ok"] for line in capsys.readouterr().out.splitlines()] == [True, False]


# --- completion ---------------------------------------------------------------------------------------------------

BASH = """
source <(_FEDVEIL_COMPLETE=bash_source fedveil)
COMP_LINE="$1"; COMP_POINT=${#1}
compopt() { [[ $2 == default ]] && echo files; [[ $2 == dirnames ]] && echo folders; }
_fedveil_completion fedveil
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
autoload -Uz compinit; compinit -u -D
source <(_FEDVEIL_COMPLETE=zsh_source fedveil)
compadd() { while [[ $1 == -* ]]; do [[ $1 == -S ]] && shift; [[ $1 == -a ]] && { shift; break; }; shift; done; print -l -- ${(P)1}; }
_path_files() { print files; }
words=("${(@s: :)1}"); CURRENT=$#words
_fedveil_completion
"""


def completed(shell: str, line: str, folder: Path) -> list[str]:
    """Return what a shell offers at the end of a line, by its own completion."""
    folder.mkdir(exist_ok=True)
    (folder / "fedveil").write_text(f'#!/bin/sh\nexec {sys.executable} -m fedveil "$@"\n')
    (folder / "fedveil").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    command = {
        "bash": ["bash", "--norc", "-c", BASH, "bash", line],
        "zsh": ["zsh", "-f", "-c", ZSH, "zsh", line],
    }[shell]
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return [word for word in done.stdout.splitlines() if word]


@pytest.mark.parametrize(
    "shell",
    [pytest.param(s, marks=pytest.mark.skipif(not shutil.which(s), reason=f"no {s} here")) for s in SHELLS],
)
def test_a_shell_completes_verbs_options_groups_and_keys(shell: str, tmp_path: Path) -> None:
    def offered(line: str) -> list[str]:
        return completed(shell, line, tmp_path / "bin")

    def value(word: str) -> str:
        """Return the word as the shell inserts it: bash's words end at an equals sign."""
        return word.partition("=")[2] if shell == "bash" else word

    assert offered("fedveil sim") == ["simulate"]
    assert set(offered("fedveil ledger ")) >= {"show", "verify", "export"}
    assert offered("fedveil ledger verify --he") == ["--head", "--help"]
    assert "privacy=" in offered("fedveil simulate priv")
    assert "privacy.target_epsilon=" in offered("fedveil simulate priv")
    assert value("privacy=record") in offered("fedveil simulate privacy=")
    assert offered("fedveil simulate privacy=record privacy.max") == ["privacy.max_grad_norm="]
    assert offered("fedveil plan num_rounds=") == [value("num_rounds=100")]
    assert offered("fedveil simulate --conf")[:1] == ["--config-dir"]
    assert offered("fedveil server somewhere lin") == [
        "link=",
        *[w for w in offered("fedveil server x link.")],
    ]
    assert offered("fedveil simulate num_rounds=x priv")[0] == "privacy="
    assert offered("fedveil plan --cfg ") == ["job", "hydra", "all"]
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "small.yaml").write_text("{}")
    assert offered(f"fedveil simulate --config-dir {tmp_path}/own +exp") == ["+experiment="]
    assert offered("fedveil simulate --config-dir e") == (["folders"] if shell == "bash" else [])
    assert offered("fedveil ledger show ") == ["files"]
    assert offered("fedveil new shops --from ") == [*COMMANDS]
    assert offered("fedveil export runs/first --to ") == [*FILES]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_installs_itself(
    say: Any, shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    (tmp_path / "home").mkdir()
    for _ in range(2):
        code, out, _ = say("--install-completion")
        assert code == 0 and "start a new shell" in out
    files = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert len(files) == (1 if shell == "fish" else 2)
    assert sum(path.read_text().count("# completion of fedveil") for path in files) == (shell != "fish")
    assert "_fedveil_completion" in say("--show-completion")[1]
    monkeypatch.setenv("SHELL", "/bin/dash")
    assert say("--show-completion")[2].startswith("SHELL='dash': completion is for bash, zsh, fish")


# --- what is imported ---------------------------------------------------------------------------------------------

HEAVY = (
    *(
        "torch",
        "opacus",
        "flwr",
        "ray",
        "hydra",
        "matplotlib",
        "dp_accounting",
        "scipy",
        "scipy.optimize",
        "scipy.signal._signaltools",
        "scipy.stats._stats_py",
        "sklearn",
        "pydantic",
        "sympy",
        "httpx._client",
    ),
    *("rich", "numpy", "typer"),
)
UNUSED_BY_A_RUN = {
    *("opacus", "sympy", "ray", "sklearn", "httpx._client"),
    *("scipy.optimize", "scipy.signal._signaltools", "scipy.stats._stats_py"),
}
ACCOUNTING = {name for name in HEAVY if name.startswith("scipy")} | {"dp_accounting"}


def imported(*argv: str, folder: Path) -> set[str]:
    """Return which of the heavy modules a command has imported when it is over."""
    script = (
        "import sys; from fedveil.__main__ import main; sys.argv[0] = 'fedveil'; main();"
        f"print('IMPORTED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    command, at_home = [sys.executable, "-c", script, *argv], {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=at_home, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    ("argv", "allowed"),
    [
        (("--version",), set[str]()),
        (("--help",), {"typer"}),
        (("ledger", "show"), {"typer"}),
        (("ledger", "show", "--help"), {"typer"}),
        (("simulat",), {"typer"}),
        (("client", "status", "nowhere"), {"typer", "flwr", "rich", "numpy", "pydantic", "httpx._client"}),
        (("audit", "claim", "--epsilon", "x", "--delta", "0"), ACCOUNTING | {"typer", "numpy"}),
        (("budget", "show"), {"typer", "numpy", "rich"}),
        (("simulate", "--cfg", "job"), {"typer", "hydra", "numpy", "pydantic"}),
        (("simulate", "num_rounds=0"), {"typer", "hydra", "numpy", "pydantic"}),
        (("simulate", "num_rounds=1"), set(HEAVY) - UNUSED_BY_A_RUN),
        # What a record loses by sums of whole clients is dp_accounting's own, under replace-one.
        (("plan",), ACCOUNTING | {"typer", "hydra", "numpy", "pydantic", "rich"}),
    ],
)
def test_verb_imports_only_its_needs(argv: tuple[str, ...], allowed: set[str], tmp_path: Path) -> None:
    assert imported(*argv, folder=tmp_path) <= allowed


def test_a_deferred_package_is_the_one_that_is_installed() -> None:
    script = """
import sys
import gc
from fedveil.cli.deferred import HEAVY, defer, importing
defer(*HEAVY)
looked = []
for _ in range(2):
    with importing():
        looked.append(gc.isenabled())
        sys.modules["torch"] = sys
del sys.modules["torch"]
assert looked == [False, True] and gc.isenabled() and gc.get_freeze_count() == 0
from dp_accounting.pld import PLDAccountant
assert "scipy.optimize" not in sys.modules and "scipy.stats._stats_py" not in sys.modules
import dp_accounting, scipy.stats
assert "norm" in scipy.stats.__all__
from dp_accounting import GaussianDpEvent, get_epsilon_gaussian
from scipy.signal import fftconvolve
from scipy.stats import norm
assert GaussianDpEvent is dp_accounting.dp_event.GaussianDpEvent and dp_accounting.pld.PLDAccountant is PLDAccountant
assert norm is scipy.stats.norm and norm.cdf(0) == 0.5 and list(fftconvolve([1], [2])) == [2]
print(round(get_epsilon_gaussian(1.0, 1e-5), 3), hasattr(dp_accounting, "nothing"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "4.377 False\n"


def test_a_plan_says_the_same_whether_or_not_data_are_read() -> None:
    for overrides in (["task=digits"], ["task=digits", "privacy=record"]):
        settings = settings_from_overrides([*overrides, "num_rounds=2"])
        assert unit_plans(build(settings, announced=True)) == unit_plans(build(settings))
