"""Entry point of the command line: it runs a verb, prints refusals and returns the exit code."""

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

# Set before anything imports Flower, Ray or gRPC. No telemetry is sent and no update is looked for; gRPC prints nothing,
# since the link itself reports a handshake that fails.
for _name, _value in (
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("GRPC_VERBOSITY", "NONE"),
):
    os.environ.setdefault(_name, _value)

FAILED, REFUSED = 1, 2  # exit codes; systemd restarts a service that failed, and not one that was refused
INTERRUPTED = 130


class _Output(io.FileIO):
    """Standard output or error. After a write fails, it goes to /dev/null, so that the verb still does its work."""

    error: OSError | None = None  # the first that a write raised

    def write(self, data: Any) -> int | None:
        """Write bytes; return their number. An error is kept for `main`, and the bytes go to /dev/null."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def main() -> int:
    """Entry point of ``fedveil`` and ``python -m fedveil``; the return value is the exit code."""
    argv = sys.argv[1:]
    output, _ = _replace_stream("stdout"), _replace_stream("stderr")
    try:
        code = _version() if argv == ["--version"] else run(argv)
        print(end="", flush=True)
    except KeyboardInterrupt:  # before a run began; a run in progress ends in its own order
        return INTERRUPTED
    error = output and output.error
    if not error or isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, has ended
        return code
    print(f"standard output: cannot be written ({error.strerror})", file=sys.stderr)
    return code or FAILED


def _replace_stream(name: str) -> _Output | None:
    """Replace a standard stream by one over an `_Output`, and return that; leave a closed or replaced one, and return None."""
    stream = getattr(sys, name)
    if stream is None or stream is not getattr(sys, f"__{name}__"):
        return None
    raw = _Output(stream.fileno(), "wb", closefd=False)
    buffer = io.BufferedWriter(raw)
    setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, None, stream.line_buffering))
    return raw


def _version() -> int:
    """Print the version; without the imports of a verb it takes no time."""
    from . import __version__

    print(f"fedveil {__version__}")
    return 0


def run(argv: Sequence[str]) -> int:
    """Run the verb of a command line, print a user's mistakes on standard error, and return the exit code."""
    import click
    from click.exceptions import Exit, NoArgsIsHelpError
    from typer.main import get_command

    from .base.refusal import Refusal, disk_failed
    from .cli.app import app
    from .cli.completion import VARIABLE, complete
    from .cli.verbs import describe_error

    command = get_command(app)
    # `fedveil help plan`: fedveil plan --help.
    words = [*argv[1:], "--help"] if argv[:1] == ["help"] else [*argv]
    try:
        if VARIABLE in os.environ:
            return complete(command, os.environ[VARIABLE])
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

        # A disk that failed is no mistake of the user; later the same command may succeed.
        refused = _refuse(str(hinted(refusal)), argv)
        return FAILED if disk_failed(refusal) else refused
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(f"{__package__}."):
            raise  # what is missing is no extension of fedveil
        return _refuse(f"{words[0]}: needs {error.name}, which is missing here: install all of fedveil", argv)


def _refuse(sentence: str, argv: Sequence[str]) -> int:
    """Print why a command line is refused, with --verbose also the traceback; return the exit code of a refusal."""
    if {"-v", "--verbose"} & set(argv):
        import traceback

        traceback.print_exc()
    print(sentence, file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
