"""Question to the clients of a real federation, from its server's folder; a run of training and a question exclude each other."""

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from ..base.core_dumps import without_core_dumps
from ..base.notice import say
from ..base.open_files import raise_limit
from ..base.refusal import Refusal
from ..links.roster_watch import followed_roster, nodes_of
from ..links.server_bundle import ServerBundle, read_server_bundle
from ..links.server_log import LOG
from ..messages.flower_adapter import quiet_flower
from ..messages.traffic import Tally
from ..modes.federation import Federation
from ..privacy.ledger.hash_chain import exclusive_lock
from ..privacy.statistics.inquiry import Inquiry
from ..questions.ask import ask, record_path
from ..questions.question_plan import Spend
from ..run.build import build
from ..run.files import QUESTIONS
from ..run.queries import Reach
from ..run.released import released_file
from ..run.run import answers_of
from .allowance import budget_line
from .open_link import open_link
from .pace import pace_of
from .probe import SERVER_LOCK
from .serve import Open, complete_overrides, deployed_in, earlier_runs, refuse_roster, with_log
from .settings import LinkSettings, server_settings
from .watch import describe_absent


def ask_clients(
    folder: Path,
    inquiry: Inquiry,
    spend: Spend,
    overrides: Sequence[str],
    run: Path | None = None,
    *,
    reach: Open = open_link,
) -> dict[str, Any]:
    """Ask the connected clients of a federation, and return the record of the answer.

    Args:
      folder: the server's bundle.
      inquiry: what is asked.
      spend: what it may cost.
      overrides: Hydra's overrides, as of `fedveil server`.
      run: whose model the question is about, as `model_run_of` returns it; None for a question without a model.
      reach: opens the link.

    Raises:
      Refusal: nothing was charged; a run or another question goes on, or too few clients are connected.
      BudgetExhausted: it does not fit; nothing was charged.
    """
    without_core_dumps()
    raise_limit()
    quiet_flower()
    bundle = read_server_bundle(folder)
    with exclusive_lock(folder / SERVER_LOCK, "server"):
        refuse_roster(bundle)
        settings = server_settings([*complete_overrides(bundle, overrides), f"run={inquiry.name}"])
        federation = build(settings.federation, deployed_in(bundle, settings))
        if not record_path(folder / QUESTIONS, inquiry).exists():
            # A question may spend all that is left.
            line = budget_line(federation, bundle.allowed, earlier_runs(folder), min_share_left=0.0)
            if line:
                say(line, failed=True)
        released = released_file(run, inquiry.model, federation.task)
        grid = partial(_open_grid, bundle, federation, settings.link, reach)
        query_reach = Reach(answers_of(federation), settings.link.deadline, released=released)
        return ask(federation, inquiry, spend, folder / QUESTIONS, grid, query_reach)


@contextmanager
def _open_grid(
    bundle: ServerBundle, federation: Federation, settings: LinkSettings, reach: Open
) -> Generator[tuple[Grid, Tally]]:
    """Open the link, and wait for enough clients. Refusal if they stay away, or the server's log lost entries."""
    rosters, announced = followed_roster(bundle), set[int]()

    def wait_for(clients: int) -> None:
        if clients and clients not in announced:
            announced.add(clients)
            say(
                f"waiting up to {settings.wait:g} s (link.wait) for {clients} clients to connect", failed=True
            )

    with reach(settings, bundle, nodes_of(rosters)) as unlogged:
        link = with_log(unlogged, bundle, rosters)
        pace = pace_of(bundle, federation, rosters, settings, link, wait_for)
        reason = pace.ready(threading.Event())
        if reason is not None and reason == link.log_loss():
            raise Refusal("file", str(bundle.folder / LOG), reason)
        if reason is not None:
            raise Refusal("link.clients", settings.clients, reason)
        if away := describe_absent(rosters()[0].members, link.presence(), settings.deadline, "the answer"):
            say(away, failed=True)
        yield link.grid, link.tally
        link.log_loss()  # stores a later head of a device, so that the same command refuses before it charges
