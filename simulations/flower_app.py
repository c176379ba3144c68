"""Flower app of the main job, for ``flwr run``: both sides compose the same settings from one run-config string.

``simulations/quickstart`` is the app folder that points here.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp import Grid, ServerApp

from ..base.refusal import Refusal
from ..client.app import make_client_app
from ..configs.schema import LedgerSettings, SimulationSettings
from ..configs.settings import settings_from_overrides
from ..messages.flower_adapter import report_in_sentences
from ..modes.federation import Federation
from ..privacy.ledger.caps import default_folder
from ..run.build import build
from ..run.client_instructions import client_settings
from ..run.prepare import settle_records
from ..server.rounds import Status
from .engines import client_mods
from .flower_grid import FlowerGrid
from .simulate import simulate

RUNS = Path.home() / ".local" / "share" / "fedveil" / "runs"


def settings_of(context: Context) -> SimulationSettings:
    """Return the settings in ``-c "overrides='...'"``."""
    return settings_from_overrides(shlex.split(str(context.run_config["overrides"])))


def folder_of(context: Context) -> Path:
    """Return the run folder, outside the runtime's own working directory, where nobody would look for results."""
    folder = Path(str(context.run_config["folder"]) or RUNS / str(context.run_id))
    if not folder.is_absolute():
        remedy = "give an absolute path: the runtime works in a folder of its own"
        raise Refusal("folder", str(folder), remedy)
    return folder


def _text_of(context: Context) -> str:
    # The data's owner decides where ledgers lie, and so which caps apply; the run's configuration does not.
    ledgers = str(context.node_config.get("ledger-dir", default_folder()))
    return _client_settings(str(context.run_config["overrides"]), folder_of(context), ledgers)


@lru_cache(maxsize=1)
def _federation(overrides: str) -> Federation:
    return build(settings_from_overrides(shlex.split(overrides)), announced=True)


@lru_cache(maxsize=1)
def _client_settings(overrides: str, folder: Path, ledgers: str) -> str:
    federation = _federation(overrides)
    own = federation.settings.model_copy(update={"ledger": LedgerSettings(dir=ledgers)})
    federation = replace(federation, settings=own)
    settings = client_settings(federation, folder, own.num_rounds)
    settle_records(federation, settings)
    return settings.to_json()


def conditions(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Apply the settings' mods to a client, once the run's context gives the settings."""
    for mod in reversed(client_mods(_federation(str(context.run_config["overrides"])))):
        call_next = _around(mod, call_next)
    return call_next(message, context)


def _around(mod: Mod, call_next: ClientAppCallable) -> ClientAppCallable:
    return lambda message, context: mod(message, context, call_next)


# Flower looks for plain assignments in this module's text.
server = ServerApp()
client = make_client_app(_text_of, (conditions,))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation on the runtime's grid.

    Raises:
      RuntimeError: the run failed, so that Flower reports it as failed.
    """
    report_in_sentences(Refusal)
    settings, folder = settings_of(context), folder_of(context)
    if settings.resume:
        raise Refusal("resume", settings.resume, "flwr run starts runs; fedveil simulate resumes them")
    clients = build(settings, announced=True).task.num_clients
    outcome = simulate(settings, folder, grid=FlowerGrid(grid, clients, settings.engine.deadline))
    if outcome.result["status"] == Status.FAILED:
        raise RuntimeError(outcome.result["reason"])
