"""Verbs of `fedveil server`: serve a federation, show its state and its log, accept enrolments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..base.refusal import Refusal
from .grammar import (
    GROUP,
    AcceptVacuous,
    Bundle,
    Json,
    Page,
    PagePort,
    Probe,
    Reason,
    acts,
    allow_local_modules,
    flag,
    option,
    port_of,
    verb,
)
from .verbs import ServerVerb

group = typer.Typer(**GROUP)


@verb(group, "FOLDER", "Serve a federation of real clients.", ServerVerb, hidden=True, needs="server")
def serve(
    ctx: typer.Context,
    folder: Bundle,
    as_json: Json = False,
    accept_vacuous: AcceptVacuous = False,
    despite_alarm: Annotated[
        bool, flag("--despite-alarm", "Resume a run that an alarm of its audit has paused.")
    ] = False,
    reason: Reason = None,
    page: Page = False,
    page_port: PagePort = None,
) -> int:
    """Serve the federation of this folder until the run is over.

    The same command resumes a run that was stopped or killed. It does nothing if the run is finished.

    Example:
      fedveil server hearts/server task=heart
      fedveil server hearts/server task=heart run=second num_rounds=50
    """
    from ..deployment.serve import serve as body
    from ..evidence.live_page import live_page

    allow_local_modules()
    overrides = [*ctx.args, *acts(accept_vacuous, reason)]
    with live_page(port_of(page, page_port)) as callbacks:
        return body(folder, overrides, as_json=as_json, despite_alarm=despite_alarm, callbacks=callbacks)


@verb(group, "status", "Show connections and spent epsilon.", needs="server")
def status(folder: Bundle, as_json: Json = False, probe: Probe = False) -> int:
    """Show connected clients, the round and the spent epsilon. Exit code 1 if no server runs and its run is not over.

    Example:
      fedveil server status hearts/server
    """
    if probe:
        from ..deployment.probe import server_is_well

        return int(not server_is_well(folder))
    from ..deployment.status import show

    return show(folder, as_json=as_json)


@verb(group, "log", "Show the transparency log.", needs="server")
def log(
    folder: Bundle,
    inclusion: Annotated[
        int | None, option("ENTRY", "Print a proof, as JSON, that the log holds this entry.")
    ] = None,
    consistency: Annotated[
        int | None, option("SIZE", "Print a proof, as JSON, that the log extends its first SIZE entries.")
    ] = None,
    cosigned: Annotated[
        list[Path] | None, option("FILE", "Take a co-signature of a witness.", "--cosigned")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show the server's log: rosters, the model of each round, final models, manifests. --json exports it.

    Example:
      fedveil server log hearts/server
      fedveil server log hearts/server --json > log.json
    """
    from .log import of_server

    return of_server(folder, inclusion, consistency, cosigned or (), as_json=as_json)


@verb(group, "enrol", "Accept enrolments by token.", needs="client")
def enrol(folder: Bundle) -> int:
    """Accept enrolments until no token is open. It may run beside the server, and needs no run.

    Example:
      fedveil server enrol hearts/server
    """
    import threading
    from functools import partial

    from ..base.core_dumps import without_core_dumps
    from ..links.enrolment.server_end import EnrolmentPort
    from ..links.server_bundle import read_server_bundle

    without_core_dumps()
    bundle, say = read_server_bundle(folder), partial(print, flush=True)
    if bundle.enrolment is None:
        remedy = "has no port for enrolments; give server.enrolment in federation.yaml, and provision again"
        raise Refusal("folder", str(folder), remedy)
    try:
        EnrolmentPort(bundle).serve(threading.Event(), say)
    except KeyboardInterrupt:
        say("stopped")
    return 0
