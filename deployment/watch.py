"""Watch over a running server: a status file, a log of JSON lines, numbers for Prometheus.

It reports rounds and connections. About a client's message it reveals nothing beyond the round's sum.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..base.durable_files import PUBLIC, replace_file
from ..base.notice import say
from ..base.refusal import refusing
from ..links.roster_watch import SignedRoster
from ..links.server_bundle import ServerBundle
from ..messages.wire import BUDGET_SPENT, DROP_REASONS
from ..modes.federation import Federation
from ..privacy.budget import Unit
from ..privacy.secagg.roster import Member
from ..run.callbacks import ObserverLine, RoundEnd, RunEnd, RunStart
from ..run.log_file import LogFile, written_by
from ..run.round_lines import drops_in, members_in
from .open_link import Presence
from .probe import STATUS
from .prometheus import serving
from .settings import ServerSettings
from .status import earlier_clients

LOG = "server.log"
LOOK_SECONDS = 1.0  # between two looks at the status
MAX_NAMES = 5  # of absent clients in a sentence
OF_DEVICE = ("roster", "version", "suites", "authority")  # keys of a client's status that its device reports
LOG_BYTES, NUM_LOGS = 10 * 2**20, 3  # of a log before a new one begins, and number of older logs

logger = logging.getLogger("fedveil.server")


def describe_absent(members: Sequence[Member], presence: Presence, seconds: float, what: str) -> str:
    """Return a sentence on the members that are not connected, and how long `what` waits for them; empty if all are."""
    absent = [each.name for each in members if each.node not in presence.connected_since]
    if not absent:
        return ""
    names = ", ".join([*absent[:MAX_NAMES], "..."] if len(absent) > MAX_NAMES else absent)
    sentence = f"{len(absent)} of {len(members)} clients are not connected yet ({names})"
    return f"{sentence}: {what} waits for them, up to {seconds:g} s (link.deadline)"


class Watch:
    """Callback that collects the status of a run, and writes it at most once a second if it has changed.

    `presence` and `rosters` return the present connections and the newest roster; with `quiet` nothing is printed.
    """

    def __init__(
        self,
        bundle: ServerBundle,
        settings: ServerSettings,
        federation: Federation,
        presence: Callable[[], Presence],
        rosters: Callable[[], SignedRoster],
        quiet: bool,
    ) -> None:
        self._rosters, self._version = rosters, bundle.roster.version  # the version that was logged last
        self._quiet = quiet
        self.folder, self._bundle, self._presence = bundle.folder, bundle, presence
        self.settings, self._federation = settings, federation
        self._rows: list[Mapping[str, Any]] = []  # of finished rounds, also of earlier processes
        self._audit: ObserverLine | None = None
        self._state, self._reason = "starting", ""
        self._has_trained = False  # before the first round the absent clients are printed once
        self._started, self._present = time.time(), set[int]()  # nodes that were connected at the last look
        # The last round of this process: the seconds since the one before it, and the released model's figures.
        self._round_began, self._seconds = time.monotonic(), 0.0
        self._figures: Mapping[str, float] = {}
        self._stop = threading.Event()
        self._earlier_clients = earlier_clients(bundle.folder)

    # --- what happens -------------------------------------------------------------------------------------------

    def start(self, run: RunStart) -> None:
        """Handle the start of a run, or its resumption."""
        self._rows, self._round_began = [*run.rows], time.monotonic()
        self._look(run.audit)
        log("begins", run=run.name, after_round=len(run.rows))

    def round(self, end: RoundEnd) -> None:
        """Handle the end of a round."""
        self._rows.append(end.row)
        now = time.monotonic()
        self._round_began, self._seconds, self._figures = now, now - self._round_began, end.metrics
        self._look(end.audit)
        log("round", run=self.settings.run, **{key: end.row[key] for key in LOGGED if key in end.row})

    def _look(self, audit: ObserverLine | None) -> None:
        """Keep the audit's line, set the state to training, and log the alarms that are new in the line."""
        previous, self._audit = self._audit, audit
        self._set_state("training", "")
        num_alarms = len(previous.alarms_in_words()) if previous else 0
        for number, text in audit.alarms_in_words()[num_alarms:] if audit else ():
            log("alarm", run=self.settings.run, round=number, what=text)

    def wait_for(self, clients: int) -> None:
        """Record that the next round waits for so many clients, or with 0 may begin; log and print a wait once."""
        link, members = self.settings.link, self._rosters()[0].members
        if not clients:
            if not (self._quiet or self._has_trained):
                self._has_trained = True
                if absent := describe_absent(members, self._presence(), link.deadline, "a round"):
                    say(absent)
            self._set_state("training", "")
            return
        is_share = clients <= math.ceil(link.clients * len(members))
        reason = f"link.clients={link.clients:g}" if is_share else "an encrypted sum needs them"
        wait = f"for {clients} of {len(members)} clients ({reason}), up to {link.wait:g} s (link.wait)"
        if self._state != "waiting":
            log("waits", run=self.settings.run, clients=clients)
            if not self._quiet:
                say(f"waiting {wait}")
        self._set_state("waiting", wait)

    def end(self, ending: RunEnd) -> None:
        """Handle the end of the run."""
        self._set_state(ending.status, ending.reason)
        log("ends", run=self.settings.run, status=self._state, reason=self._reason)

    def _set_state(self, state: str, reason: str) -> None:
        self._state, self._reason = state, reason

    # --- the status ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the current status, as plain data."""
        presence, federation, roster = self._presence(), self._federation, self._rosters()[0]
        rounds, hides_counts = rounds_of(self._rows), federation.mode.hides_counts
        return {
            "federation": self._bundle.federation,
            "run": self.settings.run,
            "state": self._state,
            "reason": self._reason,
            "pid": os.getpid(),
            "started": _utc(self._started),
            "num_rounds": federation.settings.steps,
            **rounds,
            "privacy": budgets(federation, rounds),
            "roster": roster.version,
            "audit": None if self._audit is None else self._audit.status(),
            "clients": [self._client(member, presence) for member in roster.members],
            "figures": dict(self._figures),
            "round_seconds": None if hides_counts else round(self._seconds, 3),  # longer with more clients
            "bytes": None if hides_counts else presence.traffic.to_json(),
            "turned_away": {} if hides_counts else dict(presence.turned_away),
        }

    def _client(self, member: Member, presence: Presence) -> dict[str, Any]:
        """Return the facts of one client; those of an earlier process until its device reports again."""
        node, earlier = member.node, self._earlier_clients.get(member.node, {})
        ends, device = member.not_after, {key: earlier.get(key) for key in OF_DEVICE}
        if (facts := presence.devices.get(node)) is not None:
            ends = facts.certificate_ends
            device = {key: getattr(facts, key) for key in OF_DEVICE} | {"suites": list(facts.suites)}
        return {
            "node": node,
            "name": member.name,
            "since": _utc(presence.connected_since.get(node)),
            "seen": _utc(presence.disconnected_at.get(node)) or earlier.get("since") or earlier.get("seen"),
            "certificate_ends": _utc(ends),
            **device,
            "restored": _utc(presence.restored.get(node)),
        }

    def follow(self) -> None:
        """Write the status after each change, until `stop`."""
        written = self._write({})
        while not self._stop.wait(LOOK_SECONDS):
            written = self._write(written)
        self._write(written)

    def stop(self) -> None:
        """End `follow` after a last write."""
        if self._state in ("starting", "waiting", "training"):
            self._set_state("stopped", "")
        self._stop.set()

    def _write(self, before: dict[str, Any]) -> dict[str, Any]:
        """Write the status if it differs from `before`, and return it; an error, such as a full disk, does not affect the run."""
        try:
            return self._write_if_changed(before)
        except OSError as error:
            logger.warning("the status cannot be written: %s", error.strerror)
        except Exception:
            logger.exception("the status could not be written")
        return before

    def _write_if_changed(self, before: dict[str, Any]) -> dict[str, Any]:
        status = self.status()
        self._report_roster(status["roster"], len(status["clients"]))
        self._log_arrivals({each["node"] for each in status["clients"] if each["since"]})
        if status != before:
            data = json.dumps({**status, "written": _utc(time.time())}, indent=1) + "\n"
            replace_file(self.folder / STATUS, data.encode(), PUBLIC)
        return status

    def _report_roster(self, version: int, clients: int) -> None:
        if version != self._version:
            self._version = version
            log("roster", version=version, clients=clients)
            if not self._quiet:
                say(f"roster version {version}, of {clients} clients, from the next round on")

    def _log_arrivals(self, here: set[int]) -> None:
        """Log the nodes that have connected or disconnected since the last call."""
        for event, nodes in (("connected", here - self._present), ("disconnected", self._present - here)):
            for node in sorted(nodes):
                log(event, node=node)
        self._present = here


LOGGED = (  # keys of a round's row that its line of the log repeats
    "round",
    "invited",
    "replies",
    "dropped",
    "abandoned",
    "blamed",
    "cause",
    "untrue",
    "suspected",
    "weighed",
    "epsilon_client",
    "epsilon_record",
)


def rounds_of(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return sums over a run's recorded rounds, and epsilon after the last; `replies` is None where secret."""
    has_replies = all(row["replies"] is not None for row in history)
    last = history[-1] if history else {}
    return {
        "round": last.get("round", 0),
        "abandoned": sum(bool(row["abandoned"]) for row in history),
        "invited": sum(row["invited"] for row in history),
        "last_invited": last.get("invited"),
        "last_replies": last.get("replies"),
        "replies": sum(row["replies"] for row in history) if has_replies else None,
        "dropped": drops_in(history),
        "untrue": sum(bool(row.get("untrue")) for row in history),
        "blamed": members_in(history, "blamed"),
        "suspected": members_in(history, "suspected"),
        "epsilon_client": last.get("epsilon_client"),
        "epsilon_record": last.get("epsilon_record"),
        "budgets_spent": (last.get("dropped") or {}).get(DROP_REASONS[BUDGET_SPENT], 0),
    }


def budgets(federation: Federation, rounds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each unit's budget and its spent part; None where the server does not know it, "infinity" without a guarantee.

    What records spend under `privacy=record` is on their clients' own ledgers alone.
    """
    rows: list[dict[str, Any]] = []
    for promise in federation.mode.promises:
        unit, target = promise.unit, promise.target_epsilon
        spent = rounds["epsilon_client" if unit == Unit.CLIENT else "epsilon_record"]
        remaining = None
        if target is not None and isinstance(spent, float | int):
            remaining = max(0.0, target - spent)
        row = {"unit": str(unit), "spent": spent, "target": target, "left": remaining}
        rows.append({**row, "delta": promise.target_delta, "own_ledgers": promise.per_client})
    return rows


def log(event: str, **fields: Any) -> None:
    """Write one line of the log."""
    logger.info("%s", event, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return time, level, event and the event's fields."""
        time, level, event = _utc(record.created), record.levelname.lower(), record.getMessage()
        fields = {"time": time, "level": level, "event": event, **getattr(record, "fields", {})}
        return json.dumps(fields, allow_nan=False, default=dict)


@contextmanager
def watching(watch: Watch) -> Generator[Watch]:
    """Write status and log of a run, and serve its numbers to Prometheus, within the context.

    Raises:
      Refusal: the log cannot be written, or the port for Prometheus is taken.
    """
    settings = watch.settings
    served = serving(settings.metrics_port, watch.status, settings.metrics_address)
    with _logging(watch.folder / LOG), served:
        thread = threading.Thread(target=watch.follow, name="watch", daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            watch.stop()
            thread.join()


@contextmanager
def _logging(path: Path) -> Generator[None]:
    """Write the server's log to a file within the context."""
    with refusing("log", path, "cannot be written"):
        handler = LogFile(path, maxBytes=LOG_BYTES, backupCount=NUM_LOGS)
    handler.setFormatter(JsonLines())
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with written_by(logger, handler):
            yield
    finally:
        logger.setLevel(level)


def _utc(seconds: float | None) -> str | None:
    """Return a Unix second as text, UTC; None for none, or an infinite one."""
    if seconds is None or not math.isfinite(seconds):
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
