"""Agent of a device: the long-running process that follows the server, answers it, and reports its state on disk.

Model and data are loaded once. On a signal it finishes the current message before it ends. After a kill at any moment
its commitments and charges are on disk.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType

from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Error, Message

from ...base.bounded_decoding import read_json_file
from ...base.core_dumps import without_core_dumps
from ...base.durable_files import PUBLIC, replace_file
from ...base.extensions import extension
from ...base.open_files import raise_limit
from ...base.refusal import Refusal, disk_remedy
from ...client.private_update import NotTrained
from ...configs.bundle_files import (
    CERTIFICATE,
    Credentials,
    certificate_ends,
    check_certificate,
    issued_by,
    load_certificate,
    read_credentials,
)
from ...links.device_answers import AWAY, COPIED, Handle, Longest, usual_wait
from ...messages.flower_adapter import claim_identity, quiet_flower
from ...messages.notices import (
    DeviceFacts,
    RunOver,
    facts_reply,
    read_over,
    read_renewal,
    reply_with,
    rollovers_in,
)
from ...messages.wire import DROP_REASONS, NOT_READY, SPEC_RECORD, read_round
from ...privacy.ledger import hash_chain
from ..probe import AGENT_LOCK
from .authority import adopt_rollovers
from .client_bundle import ClientBundle, read_client_bundle, take_shipped
from .device import Device, clock_fault, read_device
from .ledger_heads import LedgerHeads
from .log_copy import text_of_head
from .receipts import receipt_for
from .run_end import forget_end, read_ended, record_end

logger = logging.getLogger("fedveil.client")

HEALTH, JOURNAL = "health.json", "journal"
RUN_ID = 1  # Flower's number; a run's name is in its instructions
WAIT_SECONDS = 10.0  # between two checks of a wrong clock or a full disk

REST_SECONDS = 120.0  # the longest wait between two attempts to connect once a run is over
RESTING = "the run is over; polling for another at least every 2 minutes"

# Follows a server until the event is set. It takes the handler of messages, the file of its journal, the event, the
# display of its current activity, and the longest wait between two attempts to connect.
Follow = Callable[[Handle, Path, threading.Event, Callable[[str], None], Longest], None]


@dataclass(frozen=True)
class Health:
    """State of the agent in its health file; none of it is computed from data.

    Attributes:
      name, federation, node: the device's identity.
      pid: of the process.
      state: its current activity, in a few words.
      run, round: of the last message that it answered.
      outcome, at: result and time (UTC) of that answer.
      answered: number of messages since the process began.
    """

    name: str
    federation: str
    node: int
    pid: int
    state: str
    run: str = ""
    round: int = 0
    outcome: str = ""
    at: str = ""
    answered: int = 0


class Agent:
    """Agent that answers the link's messages, and keeps the health file and the final model of a run.

    The event `over` is set when a run is over. `device` answers the rounds; it is None until the clock is right.
    """

    def __init__(self, bundle: ClientBundle, over: threading.Event | None = None) -> None:
        settings, self._bundle, self._state = bundle.settings, bundle, bundle.state
        self._health = Health(settings.name, settings.federation, settings.node, os.getpid(), "starting")
        self._lock = threading.Lock()
        self._over = over or threading.Event()
        self.wake: Callable[[], None] = lambda: None  # has an own model made from a new final one
        # Whether the last run is over and no other has begun.
        self._rests = read_ended(bundle.state) is not None
        self.device: Device | None = None

    def say(self, state: str) -> None:
        """Write a new activity to the log and the health file; between runs an absent server counts as `RESTING`."""
        if self._rests and state.startswith(AWAY) and COPIED not in state:
            state = RESTING
        if state == self._health.state:
            return
        logger.info("%s", state)
        self._note(state=state)

    def handle(self, message: Message) -> Message:
        """Answer one message: of a run's end, of a later certificate, or of a round."""
        if (over := read_over(message)) is not None:
            return self._ended(message, over)
        if (certificate := read_renewal(message)) is not None:
            return self._renewed(message, certificate)
        assert self.device is not None  # `start` follows the server only afterwards
        if self._rests:
            forget_end(self._state)
            self._rests = False
        reply = self.device.answer(message)
        outcome = "answered"
        if reply.has_error():
            outcome = DROP_REASONS.get(reply.error.code, "failed")
        if outcome in ("not eligible", "not ready"):
            with suppress(OSError):  # without open files; the device has logged it
                outcome += f": {self.device.ineligibility() or 'a moment ago'}"
        run, number = read_round(message.content) if SPEC_RECORD in message.content else ("", 0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._note(run=run, round=number, outcome=outcome, at=now, answered=self._health.answered + 1)
        return reply

    def longest_wait(self) -> float:
        """Return the longest wait between two attempts to connect, in seconds."""
        return REST_SECONDS if self._rests else usual_wait()

    def _renewed(self, message: Message, certificate: str) -> Message:
        """Follow a rollover if the owner allows it, store a later certificate, and in any case report facts."""
        try:
            if rollovers := rollovers_in(message):
                adopt_rollovers(self._state, self._bundle.policy, rollovers, self._bundle.settings.federation)
        except (Refusal, OSError) as error:
            logger.error("%s", error)
        try:
            if certificate:
                self._bundle = renew_certificate(self._bundle, certificate.encode())
        except (Refusal, OSError) as error:
            logger.error("a certificate was not accepted: %s", error)
        current = self._bundle if self.device is None else self.device.bundle
        ends = certificate_ends(current.folder / CERTIFICATE, self._bundle.credentials.certificate)
        version, suites = current.identity.roster.version, current.policy.suites
        log = text_of_head(self._state)
        facts = DeviceFacts(
            metadata.version("fedveil"), ends, version, suites, log, current.authority.fingerprint
        )
        return facts_reply(message, facts)

    def _ended(self, message: Message, over: RunOver) -> Message:
        """Check the log, store the end of a run and its final model, and reply with a receipt if one can be given."""
        try:
            if self.device is not None:
                self.device.check_log(message.content)
            self.say(str(record_end(self._state, over)))
            receipt = receipt_for(self._bundle, over)
        except NotTrained as refusal:
            return Message(Error(refusal.code, "the client does not accept it"), reply_to=message)
        except OSError as error:
            mend = disk_remedy(error) or "mend it"
            logger.error("the final model is not stored in %s (%s); %s", self._state, error.strerror, mend)
            return Message(Error(NOT_READY, "the client cannot write"), reply_to=message)
        self._rests = True
        self.wake()
        self._over.set()
        return reply_with(receipt, message)

    def _note(self, **changed: str | int) -> None:
        """Change fields of the health, and write its file."""
        with self._lock:
            self._health = replace(self._health, **changed)
            with suppress(OSError):  # on a full disk the file becomes outdated; the log is still current
                text = json.dumps(asdict(self._health), indent=1) + "\n"
                # No flush: several writes a round would wear the flash.
                replace_file(self._state / HEALTH, text.encode(), flush=False)


def start(folder: Path, *, once: bool = False) -> int:
    """Follow a server until SIGTERM or SIGINT; return the exit code.

    Args:
      folder: the device's bundle.
      once: also end when a run is over.

    Raises:
      Refusal: the bundle cannot be used, another process uses it, or its ledgers were deleted or rolled back.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    quiet_flower()
    without_core_dumps()
    raise_limit()
    bundle = read_client_bundle(folder)
    claim_identity(RUN_ID)
    with exclusive_lock(bundle.state), _stopping() as stop:
        LedgerHeads(bundle.state).require()
        agent = Agent(bundle, stop if once else None)
        with suppress(OSError):  # a full disk, which `_follow` reports
            take_shipped(bundle)
        if _wait_for_clock(bundle, agent, stop):
            agent.device = read_device(bundle)
            with _own_models(agent.device) as agent.wake:
                _follow(bundle, agent, stop)
        agent.say("stopped")
    return 0


def _own_models(device: Device) -> AbstractContextManager[Callable[[], None]]:
    """Return a context that makes the owner's own models in a thread, and yields the function that wakes it."""
    if not device.bundle.settings.personal.trains:
        return nullcontext(lambda: None)
    from .own_models import making_own_models  # no device without an own model needs it

    return making_own_models(device.own_models)


def _follow(bundle: ClientBundle, agent: Agent, stop: threading.Event) -> None:
    """Follow the server until `stop` is set; after a failure, try again."""
    follow = _link(bundle)
    while not stop.is_set():
        try:
            follow(agent.handle, bundle.state / JOURNAL, stop, agent.say, agent.longest_wait)
        except OSError as error:  # for example a full disk, which may be freed
            agent.say(f"waiting: {bundle.state} cannot be written ({error.strerror})")
            stop.wait(WAIT_SECONDS)
        except Exception as error:
            logger.exception("the link failed")
            agent.say(f"waiting: the link failed ({type(error).__name__})")
            stop.wait(WAIT_SECONDS)


def _link(bundle: ClientBundle) -> Follow:
    """Return the function that follows the server over the bundle's link; imports only that link."""
    link = bundle.settings.link
    return extension("link", link, "link", link).follow(bundle)


def exclusive_lock(state: Path) -> AbstractContextManager[None]:
    """Return a context that creates the device's state folder and holds its lock, like a running agent.

    Raises:
      Refusal: on entry, if another process holds it.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    return hash_chain.exclusive_lock(state / AGENT_LOCK, "client")


def _wait_for_clock(bundle: ClientBundle, agent: Agent, stop: threading.Event) -> bool:
    """Wait while the clock is wrong, and return whether it became right. A device without a battery boots in 1970."""
    reported = ""
    while not stop.is_set():
        fault = clock_fault(bundle)
        if not fault:
            return True
        if fault != reported:
            agent.say(f"waiting: {fault}")
            reported = fault
        stop.wait(WAIT_SECONDS)
    return False


@contextmanager
def _stopping() -> Generator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_health(state: Path) -> Health | None:
    """Return the last state of an agent, running or not; None if none can be read."""
    return read_json_file(Health, state / HEALTH)


def running(state: Path) -> int | None:
    """Return the id of the running agent's process, or None."""
    return hash_chain.lock_holder(state / AGENT_LOCK)


def renew_certificate(bundle: ClientBundle, pem: bytes) -> ClientBundle:
    """Return the bundle with a newer certificate for its key, which replaces the earlier one on disk.

    Args:
      bundle: returned unchanged if its certificate expires no earlier, unless an authority signed it that was replaced.
      pem: from the server; it needs the authority's signature, and this device's key and name.

    Raises:
      Refusal: it is not a certificate of the authority for this key and name.
      OSError: it cannot be stored.
    """
    authority, settings = bundle.authority, bundle.settings
    current = replace(bundle.credentials, earlier=authority.earlier_ca)
    if pem == current.certificate:
        return bundle
    path = bundle.folder / CERTIFICATE
    check_certificate(path, pem, current, settings.federation, settings.name)
    pem = load_certificate(path, pem).public_bytes(Encoding.PEM)  # without trailing data from the server

    def rank(each: bytes) -> tuple[bool, int]:
        """Return the order of a certificate: by the authority in force above by an earlier one, then by its end."""
        return issued_by(load_certificate(path, each), authority.ca), certificate_ends(path, each)

    if rank(pem) <= rank(current.certificate):
        return bundle
    replace_file(path, pem, PUBLIC)
    logger.info("the certificate was renewed")
    return replace(bundle, credentials=replace(current, certificate=pem))


def newest_credentials(bundle: ClientBundle) -> Credentials:
    """Return the credentials now in the bundle's folder, which a renewal replaces; the bundle's own if unusable."""
    settings = bundle.settings
    try:
        authority = bundle.authority
        stored = read_credentials(bundle.folder, settings.federation, settings.name, authority.earlier_ca)
        return replace(stored, ca=authority.roots(time.time()))
    except Refusal as refusal:
        logger.warning("%s", refusal)
        return bundle.credentials
