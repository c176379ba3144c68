"""Verb `fedveil docs`: the documents as a site, built and served on this machine."""

from __future__ import annotations

import logging
import os
import tempfile
import webbrowser
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from ..base.extras import require_extra
from ..base.refusal import Refusal
from .grammar import PagePort, app, flag, option, verb

PACKAGE = Path(__file__).parents[1]
CONFIG = PACKAGE / "mkdocs.yml"


@verb(app, "docs", "Read the documents in a browser.", panel="Look")
def docs(
    out: Annotated[
        Path | None, option("FOLDER", "Write the site to this folder, and end.", file_okay=False)
    ] = None,
    port: PagePort = None,
    no_browser: Annotated[bool, flag("--no-browser", "Print the address, and open no browser.")] = False,
) -> int:
    """Build the documents of this version as a site, and serve it on this machine until Ctrl-C.

    Example:
      fedveil docs
      fedveil docs --out site
    """
    require_extra("docs", "fedveil docs")
    if out is not None:
        if out.exists() and any(out.iterdir()):
            raise Refusal("--out", str(out), "is not empty; name another folder")
        build_site(out)
        print(out / "index.html")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        build_site(Path(folder))
        _serve(Path(folder), port, not no_browser)
    return 0


def _serve(folder: Path, port: int | None, browser: bool) -> None:
    """Serve a site on this machine until Ctrl-C.

    Args:
      folder: folder of the site.
      port: port to listen on; None takes a free one.
      browser: whether to open it in a browser.

    Raises:
      Refusal: the port cannot be used.
    """
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer  # which no other verb needs

    class Files(SimpleHTTPRequestHandler):
        """Server of a folder's files, which logs nothing."""

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port or 0), partial(Files, directory=folder))
    except OSError as error:
        raise Refusal("--page-port", port, f"cannot be used ({error.strerror}); name another") from error
    with server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"The documents are at {address} until Ctrl-C.", flush=True)
        if browser:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def build_site(folder: Path) -> None:
    """Build the site of the installed documents into a folder.

    Raises:
      Refusal: this installation has no documents, or the folder cannot be written.
    """
    if not CONFIG.exists():
        raise Refusal("docs", str(CONFIG), "is missing; install fedveil again")
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # Material's, about the next version of MkDocs
    logging.getLogger("mkdocs").setLevel(logging.ERROR)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    # Not strict: an installation has no tests, to which some pages link.
    config = load_config(str(CONFIG), site_dir=str(folder.resolve()), strict=False)
    try:
        build(config)
    except OSError as error:
        raise Refusal("--out", str(folder), f"cannot be written ({error.strerror})") from error
