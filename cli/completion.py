"""Completion of command lines in bash, zsh and fish: verbs, options, and Hydra's groups and keys."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import click
from click.shell_completion import CompletionItem, FishComplete, ShellComplete, split_arg_string

from ..base.refusal import Refusal, refusing

VARIABLE = "_FEDVEIL_COMPLETE"
# bash breaks words at `=`, so the script removes the part before it from each answer. No blank follows `=`, `.` or `/`.
BASH = """\
%(complete_func)s() {
    local line="${COMP_LINE:0:$COMP_POINT}" kind value prefix=""
    local word="${line##*[[:space:]]}"
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && prefix="${word%%=*}="
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            dir) compopt -o dirnames 2>/dev/null ;;
            file) compopt -o default 2>/dev/null ;;
            plain) COMPREPLY+=("${value#"$prefix"}") ;;
        esac
    done < <(env COMP_LINE="$line" %(complete_var)s=bash_complete "$1")
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F %(complete_func)s %(prog_name)s
"""
ZSH = """\
#compdef %(prog_name)s
%(complete_func)s() {
    local -a open closed
    local line kind value
    for line in "${(@f)$(env COMP_LINE="${(j: :)words[1,CURRENT]}" %(complete_var)s=zsh_complete "${words[1]}")}"; do
        kind="${line%%%%,*}" value="${line#*,}"
        case $kind in
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            plain) [[ $value == *[=./] ]] && open+=("$value") || closed+=("$value") ;;
        esac
    done
    (( ${#open} )) && compadd -Q -S '' -a open
    (( ${#closed} )) && compadd -Q -a closed
    return 0
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then %(complete_func)s "$@"; else compdef %(complete_func)s %(prog_name)s; fi
"""


class _OrFiles(ShellComplete):
    """Completion that offers files if fedveil has no words, as shells do by default."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """Return the words that may follow, else an item by which the shell completes files."""
        return super().get_completions(args, incomplete) or [CompletionItem(incomplete, type="file")]


class _Line(_OrFiles):
    """Completion of the line up to the cursor, which the shell's script passes in COMP_LINE."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the complete words after the program's name, and the one that is being typed."""
        line = os.environ.get("COMP_LINE", "")
        words = split_arg_string(line)[1:]
        return (words, "") if not words or line[-1:].isspace() else (words[:-1], words[-1])

    def format_completion(self, item: CompletionItem) -> str:
        """Return an item as the scripts read it: type, comma, word."""
        return f"{item.type},{item.value}"


class BashLine(_Line):
    """Completion in bash."""

    name = "bash"
    source_template = BASH


class ZshLine(_Line):
    """Completion in zsh."""

    name = "zsh"
    source_template = ZSH


class FishLine(_OrFiles, FishComplete):
    """Completion in fish."""


SHELLS: Mapping[str, type[ShellComplete]] = {"bash": BashLine, "zsh": ZshLine, "fish": FishLine}


def complete(command: click.Command, instruction: str) -> int:
    """Print what a shell requests, its script (bash_source) or the next words (bash_complete); return 1 if it is unknown."""
    shell, _, request = instruction.partition("_")
    shell_class = SHELLS.get(shell)
    if not shell_class:
        return 1
    answer = shell_class(command, {}, "fedveil", VARIABLE)
    print(answer.source() if request == "source" else answer.complete())
    return 0


def script() -> str:
    """Return the script of the user's shell; refuse a shell that is none of `SHELLS`."""
    shell = _shell()
    return SHELLS[shell](click.Command("fedveil"), {}, "fedveil", VARIABLE).source()


def install_script() -> str:
    """Write the script of the user's shell to a file that the shell reads; return a sentence for the user."""
    shell, home = _shell(), Path.home()
    if shell == "fish":
        path = home / ".config" / "fish" / "completions" / "fedveil.fish"
        _write(path, script())
        return f"{path} is written; start a new shell"
    path = home / ".local" / "share" / "fedveil" / f"completion.{shell}"
    _write(path, script())
    start = home / (".bashrc" if shell == "bash" else ".zshrc")
    line = f'source "{path}"'
    text = start.read_text() if start.exists() else ""
    if line not in text:
        loaded = f"autoload -Uz compinit && compinit\n{line}" if shell == "zsh" else line
        _write(start, f"{text.rstrip()}\n\n# completion of fedveil\n{loaded}\n".lstrip())
    return f"{path} is written, and {start} reads it; start a new shell"


def _write(path: Path, text: str) -> None:
    with refusing("completion", path, "cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _shell() -> str:
    """Return the name of the user's shell, from SHELL."""
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in SHELLS:
        raise Refusal("SHELL", shell, f"completion is for {', '.join(SHELLS)}; set SHELL to one of them")
    return shell


def hydra_words(config_name: str, prior: Sequence[str], incomplete: str) -> list[CompletionItem]:
    """Return the overrides that begin with the word that is being typed.

    Args:
      config_name: primary configuration of the verb.
      prior: the words before, which choose groups and may name a folder of options.
      incomplete: the word.

    Returns:
      Groups as ``privacy=``, options of a group as ``privacy=record``, keys as ``privacy.target_epsilon=``, and the
      present value of a key. What cannot be composed completes to nothing.
    """
    plus = "+" if incomplete.startswith("+") else ""
    try:
        with redirect_stderr(StringIO()):  # a parser prints the mistakes of an unfinished line
            words = [
                plus + word for word in _words(config_name, prior, incomplete.removeprefix(plus), bool(plus))
            ]
        return [CompletionItem(word) for word in dict.fromkeys(words) if word.startswith(incomplete)]
    except Exception:  # noqa: BLE001 (a shell would show an error in the middle of the line)
        return []


def _words(config_name: str, prior: Sequence[str], incomplete: str, adds: bool) -> Iterator[str]:
    """Yield overrides, which `hydra_words` filters by the word; `adds`: only groups to add, after a + (+group=option)."""
    from omegaconf import OmegaConf

    from ..configs.compose import compose_jobs, parse_arguments
    from ..configs.strict import leaves

    try:
        args = parse_arguments([*prior, "--config-name", config_name])
        (job,) = compose_jobs(args)
    except (Refusal, ValueError, SystemExit):  # the words before are mistaken or unfinished
        args = parse_arguments(["--config-name", config_name])
        (job,) = compose_jobs(args)
    groups = _groups([Path(__file__).parents[1] / "configs", args.config_dir, args.config_path])
    name, equals, _ = incomplete.partition("=")
    if equals and name in groups:
        yield from (f"{name}={option}" for option in sorted(groups[name]))
        return
    values = dict(leaves(OmegaConf.to_container(job.config, resolve=False)))
    if equals and isinstance(values.get(name), bool):
        yield from (f"{name}=true", f"{name}=false")
    elif equals:
        yield from [] if values.get(name) is None else [f"{name}={values[name]}"]
    else:
        if "." not in incomplete:
            yield from (f"{group}=" for group in sorted(groups) if (group in job.config) != adds)
        yield from (f"{key}=" for key in values if not adds and not key.endswith(".name"))


def _groups(folders: Sequence[object]) -> dict[str, set[str]]:
    """Return the options of each group in folders of a configuration, of which some may be None or missing."""
    groups: dict[str, set[str]] = {}
    for folder in filter(None, folders):
        for file in Path(str(folder)).glob("*/*.yaml"):
            groups.setdefault(file.parent.name, set()).add(file.stem)
    return groups
