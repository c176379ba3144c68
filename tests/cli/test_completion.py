"""Completion in bash, zsh and fish: what the shells offer, and how the script is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedveil.cli.new import COMMANDS
from fedveil.tasks.exported import FILES

SHELLS = ("bash", "zsh")


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
    process = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert process.stderr == ""
    return [word for word in process.stdout.splitlines() if word]


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
    assert offered("fedveil export runs/first --to ") == [*FILES, "peft", "merged"]


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
