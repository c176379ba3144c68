"""The command line: looks the verb up and imports the room that serves it, nothing else."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

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

USAGE = """\
fedveil: federated learning that keeps count of what it reveals.

  fedveil simulate [--json] [key=value ...]   train, under a privacy budget
  fedveil plan [key=value ...]                no training: what the budget affords
  fedveil ledger show|verify|export PATH      read a ledger, check every entry, hand it to an auditor
  fedveil budget set|show                     cap what may be spent on your data, see what is spent
  fedveil audit RUN                           weigh a run: what was claimed beside what was measured
  fedveil audit claim ...                     weigh a claim of privacy against scores or guesses
  fedveil provision FILE|rotate|revoke ...    from one file to the bundles of a federation on real machines
  fedveil server FOLDER|status FOLDER         serve a federation of real clients; who is here, what is spent
  fedveil client request FOLDER --name NAME   make a device's keys there; only a request to admit them leaves it
  fedveil client start|status FOLDER          follow the server, under the owner's policy; say how the device is
  fedveil client forget|uninstall FOLDER      remove what it remembers, or all of it
  fedveil simulate --help                     every group, key and flag
  fedveil --version
"""
REFUSED = 2
INTERRUPTED = 130
BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


def main() -> int:
    """Entry point of ``fedveil`` and ``python -m fedveil``; the return value is the exit code."""
    from .privacy.refusal import Refusal

    try:
        verb, *rest = sys.argv[1:] or [""]
        code = _served(verb, rest)
        sys.stdout.flush()
        return code
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:  # before a run began; a run in progress ends in its own order
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _served(verb: str, rest: list[str]) -> int:
    from .privacy.refusal import Refusal

    match verb:
        case "simulate" | "plan":
            return _configured(verb, rest)
        case "ledger":
            return _ledger(rest)
        case "budget":
            from .cli.budget import budget

            return budget(rest)
        case "audit":
            from .cli.audit import audit

            return audit(rest)
        case "provision":
            from .extras import require_extra

            require_extra("server", "fedveil provision")
            from .cli.provision import run

            return run(rest)
        case "client":
            return _client(rest)
        case "server":
            return _server(rest)
        case "--version":
            from . import __version__

            print(f"fedveil {__version__}")
            return 0
        case "--help" | "-h" | "help":
            print(USAGE, end="")
            return 0
        case "":
            print(USAGE, end="", file=sys.stderr)
            return REFUSED
        case _:
            raise Refusal("verb", verb, f"there is no such verb; {_nearest(verb)}")


def _configured(verb: str, argv: Sequence[str]) -> int:
    from .extras import require_extra

    require_extra("simulation", f"fedveil {verb}")
    from .cli import simulate as launch

    # A user's own task or strategy lies in the folder of the command; last, so that it shadows nothing.
    sys.path.append(os.getcwd())
    return launch.plan(argv) if verb == "plan" else launch.simulate(argv)


def _ledger(argv: Sequence[str]) -> int:
    match list(argv):
        case ["show", path]:
            from .cli.ledger import show

            return show(path)
        case ["verify", path]:
            from .cli.ledger import verify

            return verify(path)
        case ["verify", path, "--head", seq, digest]:
            from .cli.ledger import verify

            return verify(path, (seq, digest))
        case ["export", path, *form] if form in ([], ["--json"], ["--csv"]):
            from .cli.ledger import export

            return export(path, as_csv=form == ["--csv"])
        case _:
            print(
                "usage: fedveil ledger show PATH | verify PATH [--head SEQ HASH] | export PATH [--json|--csv]",
                file=sys.stderr,
            )
            return 0 if "--help" in argv or "-h" in argv else REFUSED


def _client(argv: Sequence[str]) -> int:
    from .extras import require_extra

    require_extra("client", "fedveil client")
    match list(argv):
        case ["request", folder, "--name", name]:
            from .client.device.enrolment import write_request

            print(f"send {write_request(Path(folder), name)} to the operator; the keys stay where they are")
            return 0
        case _:
            from .cli.client import run

            return run(argv)


def _server(argv: Sequence[str]) -> int:
    from .extras import require_extra

    require_extra("server", "fedveil server")
    match list(argv):
        case ["status", folder, *flags] if set(flags) <= {"--json"}:
            from .deployment.status import show

            return show(Path(folder), as_json=bool(flags))
        case [folder, *rest] if not folder.startswith("-") and "=" not in folder:
            from .deployment.serve import serve

            sys.path.append(os.getcwd())  # as for a simulation: a task or strategy of one's own
            return serve(Path(folder), rest)
        case _:
            print(
                "usage: fedveil server FOLDER [--json] [--despite-alarm] [key=value ...] | server FOLDER --help | "
                "server status FOLDER [--json]",
                file=sys.stderr,
            )
            return 0 if "--help" in argv or "-h" in argv else REFUSED


def _nearest(verb: str) -> str:
    import difflib

    near = difflib.get_close_matches(
        verb, ("simulate", "plan", "ledger", "budget", "audit", "provision", "server", "client"), n=1
    )
    return f"did you mean 'fedveil {near[0]}'?" if near else "fedveil --help lists them"


if __name__ == "__main__":
    sys.exit(main())
