"""Verbs of `fedveil client`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from .grammar import GROUP, Bundle, Json, Reason, argument, option, own_modules, verb

client = typer.Typer(**GROUP)
Ledgers = Annotated[
    bool, Option("--ledgers", help="Remove the ledgers too: the record of the spent budget is then lost.")
]


@verb(client, "enrol", "Enrol this device by token.", needs="client")
def client_enrol(
    token: Annotated[
        str,
        argument(
            "TOKEN", "File of the operator's token; - for standard input. Others can see a token itself."
        ),
    ],
    folder: Annotated[Path, argument("FOLDER", "Folder of the new bundle.", file_okay=False)],
    wait: Annotated[
        float | None, option("SECONDS", "Time to wait for the authority; no limit by default.")
    ] = None,
) -> int:
    """Make this device's keys, get them admitted, and complete its bundle. Exit code 1 if no answer has come yet.

    Example:
      fedveil client enrol cleveland.token hearts-cleveland
    """
    from .enrolment import enrol_device

    return enrol_device(token, folder, wait)


@verb(client, "request", "Make a device's keys.", needs="client")
def client_request(
    folder: Annotated[Path, argument("FOLDER", "Folder for the keys.", file_okay=False)],
    name: Annotated[str, option("NAME", "Name of the client in federation.yaml.")],
    as_json: Json = False,
) -> int:
    """Make a device's keys on the device, and a request to admit them.

    Example:
      fedveil client request harbour --name harbour
    """
    from ..deployment.device.commands import request

    return request(folder, name, as_json=as_json)


@verb(client, "start", "Run the client until SIGTERM.", needs="client")
def client_start(
    folder: Bundle, once: Annotated[bool, Option("--once", help="Exit when a run ends.")] = False
) -> int:
    """Run the client until SIGTERM. The final model of a run is saved in the bundle's state folder.

    Example:
      fedveil client start hearts/clients/cleveland
    """
    from ..deployment.device import agent

    return agent.start(folder, once=once)


@verb(client, "status", "Show the state of the device.", needs="client")
def client_status(folder: Bundle, as_json: Json = False) -> int:
    """Show the state of the device and the changes of its roster. Exit code 1 if its agent does not run.

    Example:
      fedveil client status hearts/clients/cleveland
    """
    from ..deployment.device.commands import status

    return status(folder, as_json)


@verb(client, "roster", "Show the roster of the device.", needs="client")
def client_roster(
    folder: Bundle,
    approve: Annotated[int | None, option("VERSION", "Approve the pending roster of this version.")] = None,
    sign: Annotated[
        Path | None, option("FILE", "Sign the roster in this file, for owners who require cosignatures.")
    ] = None,
    reason: Reason = None,
    as_json: Json = False,
) -> int:
    """Show the members of the device's roster with their key fingerprints, and its changes.

    Example:
      fedveil client roster hearts/clients/cleveland
      fedveil client roster hearts/clients/cleveland --sign roster.bin
    """
    from ..deployment.device.commands import roster

    return roster(folder, approve, sign, reason, as_json=as_json)


@verb(client, "authority", "Show or replace the authority.", needs="client")
def client_authority(
    folder: Bundle,
    rollover: Annotated[
        Path | None,
        option("FILE", "rollovers.json of the authority's holder, for a device that was offline."),
    ] = None,
    approve: Annotated[
        str | None, option("FINGERPRINT", "Fingerprint of the new authority, compared with its holder.")
    ] = None,
    reason: Reason = None,
    as_json: Json = False,
) -> int:
    """Show the authority that the device trusts, or follow the rollover of its keys. A running agent needs no restart.

    Example:
      fedveil client authority hearts/clients/cleveland
      fedveil client authority hearts/clients/cleveland --rollover rollovers.json
    """
    from .authority import authority

    return authority(folder, rollover, approve, reason, as_json=as_json)


@verb(client, "log", "Show the server's log.", needs="client")
def client_log(
    folder: Bundle,
    against: Annotated[
        Path | None, option("FILE", "Export or proof of another client or of the server, to compare with.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show what the device has seen of the server's log, or compare it offline with another's. --json exports it.

    Exit code 1 if the server has forked its log.

    Example:
      fedveil client log hearts/clients/cleveland --json > cleveland.json
      fedveil client log hearts/clients/hungary --against cleveland.json
    """
    from .log import of_client

    return of_client(folder, against, as_json=as_json)


@verb(client, "witness", "Co-sign a head of a server's log.", needs="client")
def client_witness(
    log: Annotated[
        Path, argument("LOG", "Export of the log, or proof of its consistency; - for standard input.")
    ],
    key: Annotated[Path, option("F", "Private key of the witness, as fedveil report key makes it.", "--key")],
    ca: Annotated[Path, option("FILE", "The authority's certificate, ca.pem of any bundle.", "--ca")],
) -> int:
    """Print a co-signature of a log's head, if it extends the last head that this key has co-signed.

    Exit code 1 if the log was cut or forked; then nothing is signed. F.heads.json beside the key keeps what it signed.

    Example:
      fedveil client witness server.json --key w.key --ca ca.pem > signed.json
    """
    from .witness import cosign

    return cosign(log, key, ca)


@verb(client, "explain", "Explain one prediction.", needs="client")
def client_explain(
    folder: Bundle,
    data: Annotated[Path, argument("DATA", "A table or a .npy file of inputs, of the owner.")],
    row: Annotated[int, option("N", "Row to explain, counted from 1.")] = 1,
    explain: Annotated[
        str, option("METHOD", "Method of attribution: integrated_gradients.", "--method")
    ] = "integrated_gradients",
    as_json: Json = False,
) -> int:
    """Show, on the device, what each column adds to one prediction of its model. Nothing is sent or charged.

    Example:
      fedveil client explain hearts/clients/cleveland patients.csv --row 2
    """
    from .explain import explain_row

    own_modules()
    return explain_row(folder, data, row, explain, as_json=as_json)


@verb(client, "forget", "Remove the device's state.", needs="client")
def client_forget(
    folder: Bundle,
    ledgers: Ledgers = False,
    restored: Annotated[
        bool,
        Option("--restored", help="Go on after a restore or a copy: charge all of the budget as missed."),
    ] = False,
) -> int:
    """Remove the device's state, except its ledgers and rosters.

    Example:
      fedveil client forget hearts/clients/cleveland
    """
    from ..deployment.device.commands import forget

    return forget(folder, ledgers, restored)


@verb(client, "uninstall", "Remove the client from the device.", needs="client")
def client_uninstall(
    folder: Bundle,
    yes: Annotated[bool, Option("--yes", help="Confirm; without it nothing is removed.")] = False,
    ledgers: Ledgers = False,
) -> int:
    """Stop the agent; remove its unit, its bundle and its state.

    Example:
      fedveil client uninstall hearts/clients/cleveland --yes
    """
    from ..deployment.device.commands import uninstall

    return uninstall(folder, yes, ledgers)
