"""Verbs of `fedveil provision`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from .grammar import GROUP, Json, argument, option, verb

provision = typer.Typer(**GROUP)
Desk = Annotated[Path, argument("FOLDER", "Folder made by fedveil provision.", file_okay=False)]


@verb(provision, "FILE", "Make the bundles of a federation.", hidden=True, needs="server")
def provision_file(
    file: Annotated[Path, argument("FILE", "federation.yaml, which lists the clients.")],
    out: Annotated[
        Path | None, option("FOLDER", "Output folder; named after the federation by default.")
    ] = None,
    wheels: Annotated[
        Path | None, option("FOLDER", "Folder of a device's wheels, for requirements with hashes.")
    ] = None,
    lock: Annotated[
        Path | None, option("FILE", "Lock file with the hashes of packages that --wheels lacks.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Make the bundles of a federation from one file, or complete them.

    Example:
      fedveil provision federation.yaml
    """
    from ..deployment.provision import provision as body
    from .provision import show

    return show(body(file, out, wheels, lock), as_json=as_json)


@verb(provision, "rotate", "Give a client new keys.", needs="server")
def provision_rotate(
    folder: Desk,
    names: Annotated[list[str], argument("NAME", "Clients (or 'hospital-*'), or server.")],
    request: Annotated[Path | None, option("FILE", "Request of a device that made its own new keys.")] = None,
    as_json: Json = False,
) -> int:
    """Give clients or the server new keys. The old keys are no longer admitted.

    Example:
      fedveil provision rotate hearts cleveland
      fedveil provision rotate hearts 'hospital-*' server
    """
    from ..deployment.provision import rotate
    from .provision import show

    return show(rotate(folder, names, request), as_json=as_json)


@verb(provision, "renew", "Renew clients' certificates.", needs="server")
def provision_renew(
    folder: Desk,
    names: Annotated[list[str] | None, argument("NAME", "Clients (or 'hospital-*'); all by default.")] = None,
    within: Annotated[
        float, option("DAYS", "Renew only certificates that expire within this many days.")
    ] = 30.0,
    as_json: Json = False,
) -> int:
    """Renew the certificates of clients' present keys. The server delivers them.

    Example:
      fedveil provision renew hearts
      fedveil provision renew hearts 'hospital-*' --within 60
    """
    from ..deployment.provision import renew
    from .provision import show

    return show(renew(folder, names or [], within), as_json=as_json)


@verb(provision, "rollover", "Replace the authority's keys.", needs="server")
def provision_rollover(
    folder: Desk,
    days: Annotated[float, option("N", "Days in which devices accept the old keys too.")] = 30.0,
    as_json: Json = False,
) -> int:
    """Replace the authority's keys by new ones, which the old key signs. Open tokens end.

    Example:
      fedveil provision rollover hearts
    """
    from ..deployment.rollover import roll_over
    from .provision import rolled_over

    return rolled_over(roll_over(folder, days), as_json=as_json)


@verb(provision, "token", "Print a token to enrol a device.", needs="server")
def provision_token(
    folder: Desk,
    names: Annotated[list[str], argument("NAME", "Clients, one device each.")],
    hours: Annotated[float, option("N", "Hours until the tokens expire.")] = 24.0,
    qr: Annotated[bool, Option("--qr", help="Print the tokens as QR codes too.")] = False,
    as_json: Json = False,
) -> int:
    """Print a token for each name. A token enrols one device once: fedveil client enrol FILE FOLDER.

    Example:
      fedveil provision token hearts cleveland --hours 2 > cleveland.token
    """
    from .provision import tokens

    return tokens(folder, names, hours, qr=qr, as_json=as_json)


@verb(provision, "approve", "Admit devices enrolled by token.", needs="server")
def provision_approve(
    folder: Desk,
    names: Annotated[list[str] | None, argument("NAME", "Clients; all with a request by default.")] = None,
    as_json: Json = False,
) -> int:
    """Admit the devices that requested enrolment by token, and sign their bundles. Exit code 1 if one was refused.

    Example:
      fedveil provision approve hearts
    """
    from .provision import admit_asked

    return admit_asked(folder, names or [], as_json=as_json)


@verb(provision, "revoke", "Revoke a client.", needs="server")
def provision_revoke(
    folder: Desk,
    names: Annotated[list[str], argument("NAME", "Clients, or a pattern such as 'hospital-*'.")],
    as_json: Json = False,
) -> int:
    """Remove clients from the next roster on.

    Example:
      fedveil provision revoke hearts cleveland
    """
    from ..deployment.provision import revoke
    from .provision import show

    return show(revoke(folder, names), as_json=as_json)


@verb(provision, "cosign", "Collect members' signatures.", needs="server")
def provision_cosign(
    folder: Desk,
    files: Annotated[list[Path], argument("FILE", "Signatures written by fedveil client roster --sign.")],
    as_json: Json = False,
) -> int:
    """Collect members' signatures under the newest roster, for owners who require them.

    Example:
      fedveil provision cosign hearts cosignature-2.toml
    """
    from ..deployment.provision import cosign
    from .provision import show

    return show(cosign(folder, files), as_json=as_json)
