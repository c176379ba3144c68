"""Verbs of `fedveil client`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .grammar import GROUP, Bundle, Json, Reason, own_modules, verb

client = typer.Typer(**GROUP)
Ledgers = Annotated[
    bool,
    Option("--ledgers", help="Remove the ledgers too: the spent budget is then forgotten for good."),
]


@verb(client, "enrol", "Enrol this device by a token.", needs="client")
def client_enrol(
    token: Annotated[str, Argument(metavar="TOKEN", help="Of the operator; - reads it from the terminal.")],
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Of the bundle.", file_okay=False)],
    wait: Annotated[
        float | None, Option(metavar="SECONDS", help="For the authority's answer; without end by default.")
    ] = None,
) -> int:
    """Make this device's keys, have them admitted, and complete its bundle. Exit code 1 if nobody has answered yet.

    Example:
      fedveil client enrol TOKEN hearts-cleveland
    """
    from .enrolment import enrol_device

    return enrol_device(token, folder, wait)


@verb(client, "request", "Make a device's keys.", needs="client")
def client_request(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Where the keys shall be.", file_okay=False)],
    name: Annotated[str, Option(metavar="NAME", help="Of the client, as federation.yaml has it.")],
    as_json: Json = False,
) -> int:
    """Make a device's keys there; only a request to admit them leaves it.

    Example:
      fedveil client request harbour --name harbour
    """
    from .client import request

    return request(folder, name, as_json=as_json)


@verb(client, "start", "Follow the server until SIGTERM.", needs="client")
def client_start(
    folder: Bundle, once: Annotated[bool, Option("--once", help="End when a run is over.")] = False
) -> int:
    """Follow the server until SIGTERM; after a run its final model is in the bundle's state folder.

    Example:
      fedveil client start hearts/clients/cleveland
    """
    from ..client.device import agent

    return agent.start(folder, once=once)


@verb(client, "status", "Say how the device is.", needs="client")
def client_status(folder: Bundle, as_json: Json = False) -> int:
    """Say how the device is, and how its roster has changed. Exit code 1 if its agent does not run.

    Example:
      fedveil client status hearts/clients/cleveland
    """
    from .client import status

    return status(folder, as_json)


@verb(client, "roster", "Show the members of its sums.", needs="client")
def client_roster(
    folder: Bundle,
    approve: Annotated[
        int | None, Option(metavar="VERSION", help="Approve of the change that waits, by its version.")
    ] = None,
    sign: Annotated[
        Path | None,
        Option(
            metavar="FILE", help="Sign the roster in this file, for owners who ask for others' signatures."
        ),
    ] = None,
    reason: Reason = None,
    as_json: Json = False,
) -> int:
    """Say with whom the device may be summed, by fingerprints of keys, and how that has changed.

    Example:
      fedveil client roster hearts/clients/cleveland
      fedveil client roster hearts/clients/cleveland --sign roster.bin
    """
    from .client import roster

    return roster(folder, approve, sign, reason, as_json=as_json)


@verb(client, "log", "Show the server's log.", needs="client")
def client_log(
    folder: Bundle,
    against: Annotated[
        Path | None,
        Option(
            metavar="FILE", help="Compare with this export of another client or of the server, or a proof."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Say what the device has seen of its server's log, or compare it with another's, offline. --json exports it.

    Exit code 1 if the server has told two stories.

    Example:
      fedveil client log hearts/clients/cleveland --json > cleveland.json
      fedveil client log hearts/clients/hungary --against cleveland.json
    """
    from .log import of_client

    return of_client(folder, against, as_json=as_json)


@verb(client, "explain", "Say why the model says it.", needs="client")
def client_explain(
    folder: Bundle,
    data: Annotated[Path, Argument(metavar="DATA", help="A table, or .npy of inputs, of the owner.")],
    row: Annotated[int, Option(metavar="N", help="Which row is explained, from 1.")] = 1,
    explain: Annotated[
        str, Option("--method", metavar="METHOD", help="How: integrated_gradients.")
    ] = "integrated_gradients",
    as_json: Json = False,
) -> int:
    """Say on the device what each column adds to one prediction of the model that it keeps. Nothing leaves; it costs nothing.

    Example:
      fedveil client explain hearts/clients/cleveland patients.csv --row 2
    """
    from .explain import explain_row

    own_modules()
    return explain_row(folder, data, row, explain, as_json=as_json)


@verb(client, "forget", "Remove the device's memory.", needs="client")
def client_forget(folder: Bundle, ledgers: Ledgers = False) -> int:
    """Remove the device's memory.

    Example:
      fedveil client forget hearts/clients/cleveland
    """
    from .client import forget

    return forget(folder, ledgers)


@verb(client, "uninstall", "Remove all of it.", needs="client")
def client_uninstall(
    folder: Bundle,
    yes: Annotated[bool, Option("--yes", help="Really; without it nothing is removed.")] = False,
    ledgers: Ledgers = False,
) -> int:
    """Stop the agent; remove its unit, its bundle and what it remembers.

    Example:
      fedveil client uninstall hearts/clients/cleveland --yes
    """
    from .client import uninstall

    return uninstall(folder, yes, ledgers)
