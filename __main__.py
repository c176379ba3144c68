"""Entry point of the command line: runs a verb, and turns how it ended into an exit code."""

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

# Before anything imports Flower or Ray: nothing goes over the network unless it is asked for, and of a handshake that
# fails the link itself has something to say, not gRPC.
for _name, _value in (
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("GRPC_VERBOSITY", "NONE"),
):
    os.environ.setdefault(_name, _value)

FAILED, REFUSED = 1, 2  # what failed may work later: a unit tries it again
INTERRUPTED = 130
COMPLETE = "_FEDVEIL_COMPLETE"  # set by a shell that wants to complete a command line


class _Output(io.FileIO):
    """Standard output or error. Once it cannot be written it is discarded, so that the verb still does its work."""

    lost: OSError | None = None

    def write(self, data: Any) -> int | None:
        """Write what the file takes; return how many bytes."""
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def main() -> int:
    """Entry point of ``fedveil`` and ``python -m fedveil``; the return value is the exit code."""
    argv = sys.argv[1:]
    outputs = [_guarded("stdout"), _guarded("stderr")]
    try:
        code = _version() if argv == ["--version"] else run(argv)
        print(end="", flush=True)
    except KeyboardInterrupt:  # before a run began; a run in progress ends in its own order
        return INTERRUPTED
    lost = outputs[0] and outputs[0].lost
    if not lost or isinstance(lost, BrokenPipeError):  # the reader of the output, such as `head`, has ended
        return code
    print(f"standard output: cannot be written ({lost.strerror})", file=sys.stderr)
    return code or FAILED


def _guarded(name: str) -> _Output | None:
    """Put a guard before a standard stream; None if the shell has closed it, or somebody has replaced it."""
    own = getattr(sys, name)
    if own is None or own is not getattr(sys, f"__{name}__"):
        return None
    raw = _Output(own.fileno(), "wb", closefd=False)
    buffer = io.BufferedWriter(raw)
    setattr(sys, name, io.TextIOWrapper(buffer, own.encoding, own.errors, None, own.line_buffering))
    return raw


def _version() -> int:
    from . import __version__

    print(f"fedveil {__version__}")
    return 0


def run(argv: Sequence[str]) -> int:
    """Run the verb; what a user mistook is told on standard error."""
    import click
    from click.exceptions import Exit, NoArgsIsHelpError
    from typer.main import get_command

    from .base.refusal import Refusal, disk_failed
    from .cli.app import app
    from .cli.verbs import describe_error

    command = get_command(app)
    words = [*argv[1:], "--help"] if argv[:1] == ["help"] else [*argv]
    try:
        if COMPLETE in os.environ:
            from .cli.completion import complete

            return complete(command, os.environ[COMPLETE])
        with command.make_context("fedveil", words) as context:
            code: Any = command.invoke(context)
        return int(code or 0)
    except Exit as end:
        return end.exit_code
    except NoArgsIsHelpError as error:
        return _refuse(error.format_message(), argv)
    except click.UsageError as error:
        return _refuse(describe_error(error), argv)
    except Refusal as refusal:
        from .strategies.hints import hinted

        refused = _refuse(str(hinted(refusal)), argv)
        return FAILED if disk_failed(refusal) else refused
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(f"{__package__}."):
            raise
        return _refuse(f"{words[0]}: needs {error.name}, which is missing here: install all of fedveil", argv)


def _refuse(sentence: str, argv: Sequence[str]) -> int:
    if {"-v", "--verbose"} & set(argv):
        import traceback

        traceback.print_exc()
    print(sentence, file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
