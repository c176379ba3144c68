"""Verbs of `fedveil provision`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .grammar import GROUP, Json, verb

provision = typer.Typer(**GROUP)
Desk = Annotated[Path, Argument(metavar="FOLDER", help="The folder that provisioning made.", file_okay=False)]


@verb(provision, "FILE", "Make the bundles of a federation.", hidden=True, needs="server")
def provision_file(
    file: Annotated[Path, Argument(metavar="FILE", help="federation.yaml: who is in the federation.")],
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where to; a folder of the federation's name by default.")
    ] = None,
    wheels: Annotated[
        Path | None, Option(metavar="FOLDER", help="What a device installs, for requirements with hashes.")
    ] = None,
    lock: Annotated[
        Path | None, Option(metavar="FILE", help="Hashes of what a device installs and --wheels lacks.")
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
    names: Annotated[
        list[str], Argument(metavar="NAME", help="Of clients, 'hospital-*' for many, or server.")
    ],
    request: Annotated[
        Path | None, Option(metavar="FILE", help="Of the device, which made its new keys itself.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Give a client, or the server, new keys; the old ones are admitted no longer.

    Example:
      fedveil provision rotate hearts cleveland
      fedveil provision rotate hearts 'hospital-*' server
    """
    from ..deployment.provision import rotate
    from .provision import show

    return show(rotate(folder, names, request), as_json=as_json)


@verb(provision, "renew", "Give clients later certificates.", needs="server")
def provision_renew(
    folder: Desk,
    names: Annotated[
        list[str] | None, Argument(metavar="NAME", help="Of clients, 'hospital-*' for many; all by default.")
    ] = None,
    within: Annotated[
        float, Option(metavar="DAYS", help="Leave alone what ends later than in so many days.")
    ] = 30.0,
    as_json: Json = False,
) -> int:
    """Give clients later certificates for the keys that they have. The server hands them over.

    Example:
      fedveil provision renew hearts
      fedveil provision renew hearts 'hospital-*' --within 60
    """
    from ..deployment.provision import renew
    from .provision import show

    return show(renew(folder, names or [], within), as_json=as_json)


@verb(provision, "token", "Let a device enrol once.", needs="server")
def provision_token(
    folder: Desk,
    names: Annotated[list[str], Argument(metavar="NAME", help="Of clients, each of one device.")],
    hours: Annotated[float, Option(metavar="N", help="Until they end.")] = 24.0,
    qr: Annotated[bool, Option("--qr", help="As QR codes too.")] = False,
    as_json: Json = False,
) -> int:
    """Print a token for each name, by which one device enrols once: fedveil client enrol TOKEN FOLDER.

    Example:
      fedveil provision token hearts cleveland hungary --hours 2
    """
    from .provision import tokens

    return tokens(folder, names, hours, qr=qr, as_json=as_json)


@verb(provision, "approve", "Admit requests under tokens.", needs="server")
def provision_approve(
    folder: Desk,
    names: Annotated[
        list[str] | None, Argument(metavar="NAME", help="Of clients; all who have asked by default.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Admit the devices that have asked by a token, and sign what they get. Exit code 1 if one was refused.

    Example:
      fedveil provision approve hearts
    """
    from .provision import admit_asked

    return admit_asked(folder, names or [], as_json=as_json)


@verb(provision, "revoke", "Leave a client out.", needs="server")
def provision_revoke(
    folder: Desk,
    names: Annotated[list[str], Argument(metavar="NAME", help="Of clients, 'hospital-*' for many.")],
    as_json: Json = False,
) -> int:
    """Leave clients out, from the next roster on.

    Example:
      fedveil provision revoke hearts cleveland
    """
    from ..deployment.provision import revoke
    from .provision import show

    return show(revoke(folder, names), as_json=as_json)


@verb(provision, "cosign", "Collect members' signatures.", needs="server")
def provision_cosign(
    folder: Desk,
    files: Annotated[
        list[Path], Argument(metavar="FILE", help="Of members: what fedveil client roster --sign wrote.")
    ],
    as_json: Json = False,
) -> int:
    """Collect signatures of members under the newest roster, for owners who ask for them.

    Example:
      fedveil provision cosign hearts cosignature-2.toml
    """
    from ..deployment.provision import cosign
    from .provision import show

    return show(cosign(folder, files), as_json=as_json)
