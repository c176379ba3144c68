"""Server of one run of a real federation, new or resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from ..base.core_dumps import without_core_dumps
from ..base.notice import warn
from ..base.open_files import raise_limit
from ..base.refusal import Refusal
from ..client.workbench import check_engine
from ..configs.bundle_files import SCHEMA
from ..configs.compose import SHIPPED_CONFIGS, VERSION_BASE, compose_jobs, parse_arguments
from ..configs.preflight import SHOW_ONLY
from ..configs.reference import help_text
from ..configs.settings import differing
from ..configs.yaml_guard import check_file
from ..evidence.binding.receipts import Receipts, write_receipts
from ..evidence.binding.time_stamp import TSA, stamp
from ..evidence.binding.witnesses import note_witnesses
from ..links.attestation import QUOTE, AttestedGrid
from ..links.cosigned_heads import WITNESSES, CosignedHeads, read_cosigned
from ..links.late_answers import LateAnswers
from ..links.later_heads import LaterHeads
from ..links.logged_grid import LoggedGrid
from ..links.roster_watch import Nodes, followed_credentials, followed_roster, nodes_of
from ..links.server_bundle import ServerBundle, read_authority, read_server_bundle
from ..links.server_log import LOG, ServerLog
from ..links.tree_head import sign_head
from ..messages.difference_grid import DifferenceGrid
from ..messages.grids import PassingGrid
from ..messages.notices import RunOver, message_to, read_receipt
from ..modes.federation import Federation
from ..populations.deployed import Deployed, last_questions
from ..privacy.ledger.hash_chain import Head, exclusive_lock
from ..privacy.ledger.receipt import COMPARED, UNCOMPARED, Receipt, RunDescription, holds
from ..privacy.secagg.rollover import Rollover
from ..privacy.secagg.suite import KEY_BYTES
from ..questions.scaling import apply_answer
from ..run.build import build, with_members
from ..run.callbacks import Callback, RoundEnd, RunEnd, RunStart
from ..run.client_instructions import order_of
from ..run.files import CONFIG, MANIFEST, QUESTIONS, RESULT
from ..run.manifest import read_manifest
from ..run.result import close_again, note_farewell
from ..run.run import Environment, RunResult, exit_code_of, run_federation
from ..run.run_files import read_object
from ..server.checkpoint import head_in
from ..server.rounds import FORKED
from ..server.run_status import Status
from ..tasks.arrays import agreement_of
from ..tasks.data import held_out_of
from .allowance import allowed_targets, budget_line, records_line
from .open_link import Link, open_link
from .pace import HEADS_SECONDS, POLL_SECONDS, Rosters, pace_of
from .probe import SERVER_LOCK
from .settings import SERVER, LinkSettings, ServerSettings, server_from_config, server_settings
from .status import served_roster
from .watch import Watch, watching

logger = logging.getLogger("fedveil.server")

RUNS, LEDGERS = "runs", "ledgers"
FINISHED = (Status.COMPLETED, Status.EXHAUSTED, Status.ALARMED)  # such a run is not served again
FAREWELL_SECONDS = 30.0  # for clients to take the final model
# Keys of `link` that a resumed run may change: neither noise nor accounting depends on them.
WAITS = ("clients", "deadline", "patience", "wait")
Open = Callable[[LinkSettings, ServerBundle, Nodes], AbstractContextManager[Link]]  # as `open_link`


def serve(
    folder: Path,
    overrides: Sequence[str],
    *,
    as_json: bool = False,
    despite_alarm: bool = False,
    callbacks: Sequence[Callback] = (),
    reach: Open = open_link,
) -> int:
    """Serve the run of the command line, or the unfinished one; return the exit code. If it is over, only print it.

    Args:
      folder: the server's bundle.
      overrides: Hydra's flags and overrides; without any, the last unfinished run is resumed.
      as_json: print the result as JSON, and nothing else.
      despite_alarm: resume a run that an alarm has paused. By default it stays paused, because systemd may start the
        same command again and again.
      callbacks: watch the run beside those that its settings name.
      reach: opens the link.

    Raises:
      Refusal: before anything is spent.
    """
    if is_show_command(overrides):
        return _show(overrides)
    without_core_dumps()
    raise_limit()
    bundle = read_server_bundle(folder)
    with exclusive_lock(folder / SERVER_LOCK, "server"):
        refuse_roster(bundle)
        if not overrides:
            _close_finished(folder)
        settings = settings_for(bundle, overrides)
        where = folder / RUNS / settings.run
        result = _result(where)
        over = FINISHED if despite_alarm else (*FINISHED, Status.PAUSED)
        if result.get("status") in over:
            close_again(where)
            return _print_over(settings.run, where, result, as_json)
        if result.get("status") == Status.PAUSED:
            (where / RESULT).unlink()  # a server that is killed from here on goes on by the same command
        outcome = _run(bundle, settings, where, as_json, callbacks, reach)
    if as_json:
        print(json.dumps(outcome.result))
    return outcome.exit_code


def refuse_roster(bundle: ServerBundle) -> None:
    """Refuse an empty roster, and one older than this server has served: it may readmit members excluded since."""
    if not bundle.roster.members:
        remedy = "has no members: admit clients, or let devices enrol first (fedveil server enrol)"
        raise Refusal("roster", f"version {bundle.roster.version}", remedy)
    served = served_roster(bundle.folder)
    if bundle.roster.version < served:
        remedy = f"this server has served version {served}; copy the newest server folder of the desk"
        raise Refusal("roster", f"version {bundle.roster.version}", remedy)


def is_show_command(argv: Sequence[str]) -> bool:
    """Return whether the flags only ask Hydra to show something."""
    args = parse_arguments(argv)
    return args.cfg is not None or any(getattr(args, flag) for flag in SHOW_ONLY)


def _show(argv: Sequence[str]) -> int:
    """Print what a show command asks for; return the exit code."""
    args = parse_arguments(["--config-name", SERVER, *argv])
    if args.help:
        print(help_text(compose_jobs(args)[0].config, ServerSettings))
        return 0
    sys.argv = ["fedveil server", *argv]
    try:
        hydra.main(config_path=SHIPPED_CONFIGS, config_name=SERVER, version_base=VERSION_BASE)(_nothing)()
    except SystemExit as stop:  # Hydra's end after it has printed something, or failed to
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return 0


def _nothing(config: DictConfig) -> None:
    del config


def settings_for(bundle: ServerBundle, overrides: Sequence[str]) -> ServerSettings:
    """Return the settings of the requested run; if it has begun, `resume` names its folder.

    Without overrides it is the last unfinished run. The link is that of the bundles unless another is named, which is
    refused when it is opened.

    Raises:
      Refusal: a mistake, or a run of this name was begun with other settings.
    """
    unfinished = None if overrides else _unfinished(bundle.folder)
    if unfinished is None:
        settings = server_settings(complete_overrides(bundle, overrides))
    else:
        settings = _stored_settings(unfinished)
    where = bundle.folder / RUNS / settings.run
    if not (where / CONFIG).exists():
        return settings
    earlier = _stored_settings(where)
    if unfinished is None:  # again, with the targets of the run's beginning where the command has none
        settings = server_settings(complete_overrides(bundle, overrides, earlier))
    changed = differing(_lasting(earlier), _lasting(settings))
    if changed is not None:
        remedy = "repeat its command, name the folder alone, or name a new run with run="
        raise Refusal("run", settings.run, f"was started with another {changed}; {remedy}")
    return settings.model_copy(update={"resume": str(where)})


def _lasting(settings: ServerSettings) -> dict[str, Any]:
    """Return the settings that a resumed run must repeat, as plain data: all but reason, where metrics are served, and `WAITS`.

    They are compared as they were read: a key that an earlier release did not know has its default, which keeps what
    that release did.
    """
    passing: dict[str, Any] = {
        "reason": True,
        "metrics_port": True,
        "metrics_address": True,
        "link": set(WAITS),
    }
    read = settings.model_dump(by_alias=True, exclude=passing)
    return {**read, **read.pop("training")}  # its keys are on the same level as the others


def _runs_in(folder: Path) -> list[Path]:
    """Return the folders of the runs that have begun on a server, by name."""
    return [config.parent for config in sorted((folder / RUNS).glob(f"*/{CONFIG}"))]


def _close_finished(folder: Path) -> None:
    """Close each finished run whose server was killed after it wrote the result and before it closed the run."""
    for where in _runs_in(folder):
        if _result(where).get("status") in FINISHED:
            close_again(where)


def complete_overrides(
    bundle: ServerBundle, overrides: Sequence[str], resumed: ServerSettings | None = None
) -> list[str]:
    """Return overrides with the bundle's link and schema, and the targets that owners allow or that a run began with."""
    added = allowed_targets(bundle, overrides, resumed)
    if not any(each.startswith("link=") for each in overrides):
        added = [f"link={bundle.link}", *added]
    needs_schema = "task=csv" in overrides and not any(each.startswith("task.schema=") for each in overrides)
    if needs_schema and (bundle.folder / SCHEMA).is_file():
        added = [*added, f"task.schema={bundle.folder / SCHEMA}"]
    return [*overrides, *added]


def _unfinished(folder: Path) -> Path | None:
    """Return the folder of the last begun run that has not finished, paused ones included; None if all have."""
    newest_first = sorted(_runs_in(folder), key=lambda where: (where / CONFIG).stat().st_mtime, reverse=True)
    return next((where for where in newest_first if _result(where).get("status") not in FINISHED), None)


def earlier_runs(folder: Path) -> Iterator[tuple[str, ServerSettings]]:
    """Yield name and settings of each run on this server that has released something and is over."""
    for where in _runs_in(folder):
        result = _result(where)
        released = result.get("rounds_completed", 0) > result.get("rounds_abandoned", 0)
        with suppress(Refusal):  # settings of a release that this one cannot read
            if released and result.get("status") in FINISHED:
                yield where.name, _stored_settings(where)


def newest_heads(folder: Path, ledgers: str | None) -> dict[str, Head]:
    """Return the newest ledger head that each run, and the last question, on this server left in a folder of ledgers.

    A run is refused if no ledger there holds them. If none was left in this folder, those of all folders are returned:
    otherwise a new, empty folder would let the spending start at zero.

    Args:
      folder: of the server's bundle.
      ledgers: the setting `ledger.dir`.

    Returns:
      The heads, by "run NAME" or "question NAME".
    """
    answers = last_questions(folder / QUESTIONS).items()
    newest = {(ledger_dir, f"question {name}"): head for ledger_dir, (name, head) in answers}
    for where in sorted((folder / RUNS).glob("*")):
        # A run has a head in its checkpoint, and once it has ended another in its result.
        stored: tuple[Any, ...] = (head_in(where), _result(where).get("ledger_head"))
        if heads := [Head(*each) for each in stored if each]:
            newest[_ledger_dir_of(where), f"run {where.name}"] = max(heads)
    matching = {name: head for (ledger_dir, name), head in newest.items() if ledger_dir == (ledgers or "")}
    return matching or {name: head for (_, name), head in newest.items()}


def _ledger_dir_of(where: Path) -> str:
    """Return the setting `ledger.dir` of a run; empty for the server's own folder of ledgers."""
    with suppress(Refusal, OSError):  # settings of a release that this one cannot read
        return _stored_settings(where).ledger.dir or ""
    return ""


def _stored_settings(where: Path) -> ServerSettings:
    """Return the settings with which a run began."""
    check_file(where / CONFIG)
    config: Any = OmegaConf.load(where / CONFIG)
    return server_from_config(config)


def _result(where: Path) -> dict[str, Any]:
    """Return a run's result; empty before it has one."""
    with suppress(Refusal):
        return dict(read_object(where / RESULT))
    return {}


def _print_over(run: str, where: Path, result: dict[str, Any], as_json: bool) -> int:
    """Print that a run is over and is not served again; return the exit code of its result."""
    status = Status(result["status"])
    state, remedy = "finished", "name a new one with run="
    if status is Status.PAUSED:
        state, remedy = "not over", "find the cause first"
    line = f"run {run} is {state} ({status}: {result['reason']}); results: {where}; {remedy}"
    print(json.dumps(result) if as_json else line)
    return exit_code_of(result)


# --- the run ----------------------------------------------------------------------------------------------------


def _run(
    bundle: ServerBundle,
    settings: ServerSettings,
    where: Path,
    quiet: bool,
    callbacks: Sequence[Callback],
    reach: Open,
) -> RunResult:
    """Serve the run of a folder to its end, and return its result; the other arguments are those of `serve`."""
    federation, rosters = build(settings.federation, deployed_in(bundle, settings)), followed_roster(bundle)
    lines = [f"{bundle.federation}: listening on {bundle.listen}"]
    if not settings.resume:
        earlier = tuple(earlier_runs(bundle.folder))
        lines.append(budget_line(federation, bundle.allowed, earlier))
        lines.append(records_line(federation, bundle.allowed, earlier))
    check_engine(federation.mode.gradients, federation.task, partial(held_out_of, federation.task))
    with (
        reach(settings.link, bundle, nodes_of(rosters)) as unlogged,
        watching(Watch(bundle, settings, federation, unlogged.presence, rosters, quiet)) as watch,
    ):
        link = unlogged
        if federation.sends_differences:
            link = replace(link, grid=DifferenceGrid(link.grid))
        link = with_log(link, bundle, rosters)
        if federation.turns.staleness:
            link = replace(link, grid=LateAnswers(link.grid))
        if not quiet:
            print("\n".join(filter(None, lines)), flush=True)
        around = Environment(
            grid=lambda _: nullcontext(link.grid),
            order=order_of,
            pace=pace_of(bundle, federation, rosters, settings.link, link, watch.wait_for),
            callbacks=(watch,),
            objects=(Farewell(link, federation, bundle, rosters), *callbacks),
            renew=partial(renew_roster, rosters),
            tally=link.tally,
        )
        outcome = run_federation(federation, where, around, quiet)
        end = time.monotonic() + HEADS_SECONDS
        # Wait until a device reports its later head: `log_loss` stores it, so that a restart refuses before it charges.
        while link.log_loss() is None and outcome.result["reason"] == FORKED and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
    if outcome.result["status"] in FINISHED:
        carried = link.tally.total().minus(outcome.carried)
        note_farewell(where, carried, secret=federation.mode.hides_counts)
        _note_outside(bundle, where)
    return outcome


def _note_outside(bundle: ServerBundle, where: Path) -> None:
    """Note in the folder of a finished run its witnesses, and a time stamp if an authority is configured.

    The run is valid without them, so a failure is only a warning.
    """
    with _warning():
        leaves = ServerLog(bundle.folder / LOG).leaves
        note_witnesses(bundle.folder / RUNS, leaves, read_cosigned(bundle.folder))
    with _warning():
        if url := os.environ.get(TSA):
            stamp(where, url)


@contextmanager
def _warning() -> Generator[None]:
    """End the block at a failure, which is printed as a warning."""
    try:
        yield
    except (Refusal, OSError) as problem:
        warn(str(problem))


def with_log(link: Link, bundle: ServerBundle, rosters: Rosters) -> Link:
    """Return the link whose grid logs each instruction, and adds quotes of the server if it has a command for them.

    Raises:
      Refusal: the log cannot be read, lacks entries that a device has seen, or is not co-signed by its witnesses.
    """
    try:
        log = ServerLog(bundle.folder / LOG)
    except OSError as error:
        remedy = f"the log cannot be read ({error.strerror})"
        raise Refusal("file", str(bundle.folder / LOG), remedy) from error
    credentials = followed_credentials(bundle)
    cosigned = CosignedHeads(bundle.folder, bundle.federation, log, os.environ.get(WITNESSES, ""))
    grid = LoggedGrid(link.grid, log, bundle, credentials, rosters, cosigned.of)
    command = os.environ.get(QUOTE)
    ca = bundle.credentials.ca + b"\n" + bundle.credentials.earlier  # of heads from before a rollover, too
    later_heads = LaterHeads(bundle.folder, log, ca, bundle.federation)
    later_heads.refuse()
    cosigned.require(sign_head(bundle.federation, len(log.leaves), log.root, credentials()))
    outer_grid = AttestedGrid(grid, command, credentials) if command else grid
    return replace(link, grid=outer_grid, log_loss=partial(_log_loss, later_heads, link))


def _log_loss(later_heads: LaterHeads, link: Link) -> str | None:
    """Return a sentence if a connected device has seen entries that the log lacks, and store its head; else None."""
    return later_heads.log_loss(each.log for each in link.presence().devices.values())


@dataclass
class Farewell:
    """Callback that sends the end of the run and its final model to connected clients, and collects their receipts."""

    link: Link
    federation: Federation
    bundle: ServerBundle
    rosters: Rosters  # returns the newest roster
    run: str = ""  # set by `start`

    def start(self, run: RunStart) -> None:
        """Note the run's name."""
        self.run = run.name

    def round(self, end: RoundEnd) -> None:
        """Do nothing: the run continues."""

    def end(self, ending: RunEnd) -> None:
        """Send the end of the run, unless the same command can resume it, and store the receipts of devices.

        A run that an alarm has ended, or whose rounds were all abandoned, leaves no model.
        """
        if ending.status not in FINISHED:
            return
        rounds = ending.result["rounds_completed"]
        learned = ending.status != Status.ALARMED and rounds > ending.result["rounds_abandoned"]
        model = ending.model if learned else {}
        manifest_hash = manifest_text = ""
        if closed := (ending.folder / MANIFEST).exists():
            manifest = read_manifest(ending.folder)
            manifest_hash, manifest_text = manifest.hash, manifest.text
        federation = apply_answer(self.federation, ending.folder)
        moments = json.dumps(federation.moments) if federation.moments else ""
        agreement = agreement_of(federation.task) or ""
        run_over = RunOver(
            self.run, ending.status, rounds, model, agreement, manifest_hash, moments, manifest_text
        )
        messages = [message_to(node, run_over) for node in self.link.presence().connected_since]
        if not messages and isinstance(self.link.grid, PassingGrid):  # the log holds the manifest in any case
            self.link.grid.keep_unsent(message_to(0, run_over).content)
        replies = self.link.grid.send_and_receive(messages, timeout=FAREWELL_SECONDS)
        receipts: dict[int, Receipt] = {}
        with _interruptible():
            for receipt in filter(None, map(read_receipt, replies)):
                receipts[receipt.node] = receipt
        if closed and len(receipts) < len(messages):
            reason = "they are away, or signed a run of this name before, which a device does once"
            missing, count = len(messages) - len(receipts), len(messages)
            logger.warning("%d of %d devices gave no receipt: %s", missing, count, reason)
        if closed and receipts:
            description = RunDescription(self.bundle.federation, self.run, manifest_hash)
            self._write_receipts(ending.folder, description, receipts)

    def _write_receipts(self, folder: Path, run: RunDescription, by_node: Mapping[int, Receipt]) -> None:
        """Write the receipts that hold, of members whose certificates have not ended; log and drop the others."""
        roster, signed = self.rosters()
        ended = roster.ended(int(time.time()))
        keys = {member.node: member.public for member in roster.members if member.node not in ended}
        tags = (COMPARED, UNCOMPARED)  # devices of earlier releases sign under the second
        genuine = {
            node: each
            for node, each in by_node.items()
            if node in keys and any(holds(each, run, keys[node], tag) for tag in tags)
        }
        for node in sorted(by_node.keys() - genuine.keys()):
            logger.warning("node %s gave a receipt that does not hold", node)
        if genuine:
            receipts = [genuine[node] for node in sorted(genuine)]
            authority, chain = _authority_now(self.bundle)
            write_receipts(folder, Receipts(run, authority, signed, receipts, chain))


@contextmanager
def _interruptible() -> Generator[None]:
    """Let Ctrl-C or SIGTERM end the block, and no more: the run is over, and what devices sent by then counts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _authority_now(bundle: ServerBundle) -> tuple[bytes, tuple[Rollover, ...]]:
    """Return the authority's key and rollovers, newly read: the desk may have replaced them since the start."""
    try:
        return read_authority(bundle.folder, bundle.federation)
    except Refusal as refusal:
        logger.error("%s", refusal)
        return bundle.authority, bundle.rollovers


def deployed_in(bundle: ServerBundle, settings: ServerSettings) -> Deployed:
    """Return the population of a server, which has real clients in the place of data."""
    ledgers = settings.ledger.dir
    return Deployed(
        run=settings.run,
        # By the first authority, so that a rollover keeps the ledgers.
        identity=hashlib.sha256(bundle.first_authority[:KEY_BYTES] + bundle.federation.encode()).hexdigest(),
        roster=bundle.roster,
        signed_roster=bundle.signed_roster,
        ledgers=bundle.folder / LEDGERS if ledgers is None else Path(ledgers),
        quorum=settings.link.quorum or 0.0,
        enough=settings.link.enough,
        heads=newest_heads(bundle.folder, ledgers),
        ledger_dir=ledgers,
    )


def renew_roster(rosters: Rosters, federation: Federation) -> Federation:
    """Return the federation with the clients of the newest roster; the same object if the roster has not changed.

    Raises:
      Refusal: the settings do not suit the new number of clients.
    """
    (roster, signed), deployed = rosters(), federation.population
    assert isinstance(deployed, Deployed)
    if (roster.hash, signed) == (deployed.roster.hash, deployed.signed_roster):
        return federation
    return with_members(federation, replace(deployed, roster=roster, signed_roster=signed))
