"""Classes of verbs and of their groups: help, completion, --quiet and --verbose, and errors of usage."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, get_args, get_type_hints

import click
from click.shell_completion import CompletionItem
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..configs.help import heading, shipped_text
from ..strategies.hints import option_hint

# Hydra's own flags: (names, value, help). Hydra parses them; here they are listed, completed and known as no mistakes.
HYDRA_FLAGS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("-m", "--multirun"), "", "Run every combination of comma-separated values."),
    (("-c", "--cfg"), "job|hydra|all", "Show the configuration; run nothing."),
    (("-p", "--package"), "KEY", "With --cfg: show only this part."),
    (("--resolve",), "", "With --cfg: resolve interpolations."),
    (("-cd", "--config-dir"), "DIR", "Add options of your own, such as DIR/task/mine.yaml."),
    (("-cn", "--config-name"), "NAME", "Use this file instead of the shipped one."),
    (("-cp", "--config-path"), "DIR", "Search DIR for that file."),
    (("-i", "--info"), "[WHAT]", "Show what Hydra found: defaults, searchpath, plugins."),
    (("--hydra-help",), "", "Show Hydra's own help."),
    (("-r", "--run"), "", "Run one job, as without a flag."),
    (("-sc", "--shell-completion"), "", "Hydra's own completion; prefer --install-completion."),
    (("--experimental-rerun",), "FILE", "Refused: it reads a pickle."),
)
NUM_FLAGS = 9  # the first of these, which the help lists
HELP = ("-h", "--help")
# Headings of the help of the whole command line, in its order; typer's `rich_help_panel` of a verb is one of the first.
PANELS, OTHER = ("Run", "Look", "Own your data", "Serve", "Prove"), "Other"
CONTEXT: dict[str, Any] = {"help_option_names": list(HELP), "max_content_width": 100}
VOLUME = (
    click.Option(["-q", "--quiet"], is_flag=True, help="Print errors, warnings and --json only."),
    click.Option(["-v", "--verbose"], is_flag=True, help="Log to standard error; show tracebacks."),
)


@contextmanager
def _volume(quiet: bool, verbose: bool) -> Generator[None]:
    """Discard standard output in the block if quiet; log to standard error from here on if verbose."""
    if verbose:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


class Verb(TyperCommand):
    """A verb, not a group of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += VOLUME

    def invoke(self, ctx: click.Context) -> Any:
        """Check that the extra is installed that the verb needs, run it at the requested volume, and return its exit code."""
        if needs := getattr(self.callback, "needs", None):
            require_extra(needs, _path(ctx))
        quiet, verbose = ctx.params.pop("quiet"), ctx.params.pop("verbose")
        with _volume(quiet and not ctx.params.get("as_json"), verbose):
            return super().invoke(ctx)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the verb does, an example, and the options."""
        formatter.write(f"usage: {usage(ctx)}\n")
        _write_text(formatter, self.help or "")
        self.format_options(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments and options as two lists."""
        arguments = [each for each in self.params if isinstance(each, click.Argument)]
        _write_rows(formatter, "Arguments", [(_metavar(each), self._help(each)) for each in arguments])
        _write_rows(formatter, "Options", _records(ctx))

    def _help(self, argument: click.Argument) -> str:
        """Return an argument's help from its declaration; click's class loses it since 8.5."""
        assert self.callback is not None
        declared = get_type_hints(inspect.unwrap(self.callback), include_extras=True)[str(argument.name)]
        return next((str(each.help) for each in get_args(declared) if isinstance(each, ArgumentInfo)), "")


class HydraVerb(Verb):
    """A verb whose other words are overrides, and flags of Hydra."""

    config_name = "config"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the verb's own options, and leave Hydra's words in `ctx.args`; with --help print the verb's part of the help.

        The keys follow as they are shipped. Those of other overrides are composed: Hydra's --help then goes to `ctx.args`,
        by which the body prints them. Unknown options are refused, except while a shell completes (`resilient_parsing`).
        """
        asks_help = not ctx.resilient_parsing and bool(set(args) & set(HELP))
        super().parse_args(ctx, [each for each in args if each not in HELP])
        opts = [name for each in self.get_params(ctx) if isinstance(each, click.Option) for name in each.opts]
        flags = [*(name for names, _, _ in HYDRA_FLAGS for name in names), *HELP, *opts]
        for word in ctx.args:
            name = word.partition("=")[0]
            if name.startswith("-") and name not in flags and not ctx.resilient_parsing:
                raise click.NoSuchOption(name, possibilities=flags, ctx=ctx)
        if asks_help:
            click.echo(ctx.get_help())
            if text := shipped_text(self.config_name, ctx.args):
                click.echo(text)
                ctx.exit()
            ctx.args.insert(0, "--help")
        return ctx.args

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verb's own options and Hydra's flags."""
        super().format_options(ctx, formatter)
        rows = [(f"{', '.join(names)} {value}".strip(), text) for names, value, text in HYDRA_FLAGS]
        _write_rows(formatter, "Flags of Hydra", rows[:NUM_FLAGS])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete options, Hydra's flags and the value of one, groups, options of groups and keys."""
        if incomplete.startswith("-"):
            flags = [CompletionItem(names[-1], help=text) for names, _, text in HYDRA_FLAGS]
            return [*super().shell_complete(ctx, incomplete), *_beginning(flags, incomplete)]
        flag_values = {name: value for names, value, _ in HYDRA_FLAGS for name in names}
        previous = "".join(ctx.args[-1:])
        value = flag_values.get(previous, "")
        if value == "DIR":
            return [CompletionItem(incomplete, type="dir")]
        if value:
            words = [CompletionItem(each) for each in value.split("|") if not each.isupper()]
            return _beginning(words, incomplete)
        from .completion import hydra_words

        return hydra_words(self.config_name, ctx.args, incomplete)


class ServerVerb(HydraVerb):
    """A verb of Hydra's whose primary configuration is that of a server."""

    config_name = "server"


class Verbs(TyperGroup):
    """A group of verbs. At most one is hidden: it is called without its name, with words that name no other verb."""

    @property
    def _names(self) -> list[str]:
        return [name for name, each in self.commands.items() if not each.hidden]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the hidden verb's name before a word that names no verb; refuse nearly a verb's name, unless it is a file."""
        words = [*self._names, *HELP]
        default = self._default()
        if default and args and args[0] not in words:
            matches = difflib.get_close_matches(args[0], words, n=1, cutoff=0.75)
            if matches and not os.path.exists(args[0]) and not ctx.resilient_parsing:
                raise _no_such_verb(ctx, args[0], matches)
            args = [str(default.name), *args]
        return super().parse_args(ctx, args)

    def _default(self) -> click.Command | None:
        """Return the hidden verb; None if the group has none."""
        return next((each for each in self.commands.values() if each.hidden), None)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return click's result for the verb that the first word names; refuse another word with the nearest verb."""
        if args[0] not in self.commands and not ctx.resilient_parsing and not args[0].startswith("-"):
            names = self._names
            matches = [name for name in names if name.startswith(args[0])]
            raise _no_such_verb(ctx, args[0], matches[:1] or difflib.get_close_matches(args[0], names, n=1))
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the purpose of the group, and a line for each verb with its arguments."""
        formatter.write("")  # a blank line follows
        _write_text(formatter, self.help or "")
        rows = [(_listed(leaf), leaf.command.get_short_help_str(200)) for leaf in leaves(ctx)]
        _write_rows(formatter, "", rows)
        _write_text(formatter, f"{_path(ctx)} ... --help shows the details.")

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the verbs, and the first argument of the hidden one."""
        items = super().shell_complete(ctx, incomplete)
        default = self._default()
        if default:
            arguments = [each for each in default.params if isinstance(each, click.Argument)]
            items += arguments[0].shell_complete(ctx, incomplete) if arguments else []
        return items


class Root(Verbs):
    """The whole command line, whose help lists verbs and groups by what people do with them, on one screen."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, purpose, a line for each verb and each group under the heading of its panel, and the options."""
        formatter.write("usage: fedveil VERB ...\n")
        _write_text(formatter, self.help or "")
        panels: dict[str, list[tuple[str, str]]] = {}
        width = max(map(len, self.commands))
        for name, each in self.commands.items():
            panel = str(getattr(each, "rich_help_panel", None) or OTHER)
            panels.setdefault(panel, []).append((name.ljust(width), each.get_short_help_str(200)))
        for panel in sorted(panels, key=[*PANELS, OTHER].index):
            _write_rows(formatter, panel, panels[panel])
        _write_rows(formatter, "Options", _records(ctx))
        _write_text(formatter, "fedveil VERB --help shows the verb's own options, keys and an example.")


def _records(ctx: click.Context) -> list[tuple[str, str]]:
    """Return the options of a verb or group with their help. Typer's own method imports Rich, 0.1 s of CPU, and escapes [."""
    options = [each for each in ctx.command.get_params(ctx) if isinstance(each, click.Option)]
    return [*filter(None, (click.Option.get_help_record(each, ctx) for each in options))]


def leaves(ctx: click.Context) -> list[click.Context]:
    """Return the context of each verb of a group and the groups below it, in the order of the list: groups last."""
    command = ctx.command
    if not isinstance(command, click.Group):
        return [ctx]
    ordered = sorted(command.commands.items(), key=lambda item: isinstance(item[1], click.Group))
    inner = (click.Context(each, parent=ctx, info_name=name, **CONTEXT) for name, each in ordered)
    return [leaf for each in inner for leaf in leaves(each)]


def usage(ctx: click.Context) -> str:
    """Return how a verb is called, in one line."""
    words = [_path(ctx)]
    for param in ctx.command.params:
        if isinstance(param, click.Argument):
            words.append(_metavar(param))
        elif isinstance(param, click.Option) and param.required:
            words.append(f"{param.opts[-1]} {_metavar(param)}")
    if isinstance(ctx.command, HydraVerb):
        words.append("[key=value ...]")
    return " ".join(words)


def _listed(ctx: click.Context) -> str:
    """Return a verb with the metavars of its arguments, for a list of verbs."""
    arguments = [_metavar(each) for each in ctx.command.params if isinstance(each, click.Argument)]
    return " ".join([_path(ctx), *arguments])


def describe_error(error: click.UsageError) -> str:
    """Return a usage error as text: the mistake, the nearest name, and the usage line."""
    message = error.format_message().rstrip(".")
    message = message[:1].lower() + message[1:]
    if isinstance(error, click.NoSuchOption):
        suggestion = f"did you mean {error.possibilities[0]!r}?" if error.possibilities else ""
        hint = option_hint(error.option_name) or suggestion
        message = f"there is no option {error.option_name!r}" + (f"; {hint}" if hint else "")
    if error.ctx is None:
        return f"fedveil: {message}"
    path = _path(error.ctx)
    return f"{path}: {message}\nusage: {usage(error.ctx)}\n{path} --help shows the details"


def _no_such_verb(ctx: click.Context, word: str, matches: Sequence[str]) -> Refusal:
    """Return the refusal of a word that is no verb, with the first of the similar verbs."""
    path = _path(ctx)
    matches = ["--version"] if word == "version" else matches
    nearest = f"did you mean '{path} {matches[0]}'?" if matches else f"{path} --help lists them"
    return Refusal("verb", word, f"there is no such verb; {nearest}")


def _path(ctx: click.Context) -> str:
    """Return the words before a verb's arguments, such as `fedveil ledger show`; a hidden verb's name is left out."""
    if ctx.parent is None:
        return "fedveil"
    above = _path(ctx.parent)
    return above if ctx.command.hidden else f"{above} {ctx.info_name}"


def _metavar(param: click.Parameter) -> str:
    """Return the metavar of a parameter; of an argument with ... if it may repeat, and in brackets if it is optional."""
    name = param.metavar or str(param.name).upper()
    if not isinstance(param, click.Argument):
        return name
    name = f"{name} ..." if param.nargs == -1 else name
    return name if param.required else f"[{name}]"


def _write_text(formatter: click.HelpFormatter, text: str) -> None:
    """Write paragraphs; one with indented lines, such as an example, is not wrapped."""
    for paragraph in text.strip("\n").split("\n\n"):
        formatter.write_paragraph()
        if any(line.startswith("  ") for line in paragraph.splitlines()):
            formatter.write(paragraph + "\n")
        else:
            formatter.write_text(paragraph)


def _write_rows(formatter: click.HelpFormatter, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Write (name, help) in two columns under a title, which may be empty; nothing if there are no rows."""
    if not rows:
        return
    formatter.write_paragraph()
    if title:
        formatter.write(heading(f"{title}:") + "\n")
    formatter.indent()
    formatter.write_dl(rows, col_max=40)
    formatter.dedent()


def _beginning(items: Sequence[CompletionItem], incomplete: str) -> list[CompletionItem]:
    """Return the items that begin with the word that is being typed."""
    return [each for each in items if each.value.startswith(incomplete)]
