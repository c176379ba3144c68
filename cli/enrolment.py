"""Enrolment as a server's operator and a device's owner see it."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from ..base.core_dumps import without_core_dumps
from ..base.refusal import Refusal
from ..configs.bundle_files import read_secret
from ..deployment.device.enrol import enrol
from ..links.enrolment.server_end import EnrolmentPort
from ..links.enrolment.token import SCHEME, read_token
from ..links.server_bundle import read_server_bundle

NOT_YET = 1


def serve_enrolments(folder: Path) -> int:
    """Open the port of a server's bundle while tokens are open; return the exit code.

    Raises:
      Refusal: the bundle has no such port, or it is taken.
    """
    without_core_dumps()
    bundle = read_server_bundle(folder)
    if bundle.enrolment is None:
        remedy = "has no port for enrolments; give server.enrolment in federation.yaml, and provision again"
        raise Refusal("folder", str(folder), remedy)
    try:
        EnrolmentPort(bundle).serve(threading.Event(), _say)
    except KeyboardInterrupt:
        _say("stopped")
    return 0


def enrol_device(text: str, folder: Path, wait: float | None) -> int:
    """Enrol this device by a token; return 1 if nobody has answered in time.

    Arguments as of `fedveil client enrol`.

    Raises:
      Refusal: the token opens nothing, its file can be read by others, or somebody stands in between.
    """
    without_core_dumps()
    token = read_token(_token_in(text))
    if enrol(token, folder, wait=float("inf") if wait is None else wait, notify=_say):
        print(f"enrolled; start it with: fedveil client start {folder}")
        return 0
    _say("not admitted yet; repeat the command to continue")
    return NOT_YET


def _token_in(text: str) -> str:
    """Return the line of a token: of standard input, of a file, or as it is."""
    if text == "-":
        return sys.stdin.readline()
    if os.path.isfile(text):
        return read_secret(Path(text)).decode(errors="replace")
    if not text.startswith(f"{SCHEME}:"):  # it may be a token all the same, and is not repeated
        remedy = f"is no file, and no token, which begins with {SCHEME}:; give the token's file, or -"
        raise Refusal("token", "what was given", remedy)
    print("warning: the process list shows the token to all users; give its file, or -", file=sys.stderr)
    return text


def _say(text: str) -> None:
    print(text, flush=True)
