"""Grid that logs what it sends: each instruction carries the signed head of the log, on any link."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..configs.bundle_files import Credentials
from ..messages.flower_adapter import records_of
from ..messages.grids import PassingGrid
from ..messages.secure_wire import OURS, model_hash, roster_of
from ..messages.wire import FAILED, LOG_RECORD, OVER, SPEC_RECORD
from ..privacy.secagg.roster import roster_in
from ..privacy.witness import HeadCosignature
from .log_wire import NOWHERE, LogStatement, log_record
from .roster_watch import SignedRoster
from .server_bundle import ServerBundle
from .server_log import ServerLog, final_entry, manifest_entry, model_entry, roster_entry
from .tree_head import TreeHead, sign_head


class Places(NamedTuple):
    """Places in the log of an instruction's model and roster."""

    model: int = NOWHERE
    roster: int = NOWHERE


class LoggedGrid(PassingGrid):
    """Grid whose instructions are logged before they are sent.

    `cosigned` returns the co-signatures of witnesses under a new head.
    """

    def __init__(
        self,
        grid: Grid,
        log: ServerLog,
        bundle: ServerBundle,
        credentials: Callable[[], Credentials],
        rosters: Callable[[], SignedRoster],
        cosigned: Callable[[TreeHead], Sequence[HeadCosignature]] = lambda _: (),
    ) -> None:
        super().__init__(grid)
        self._log, self._cosigned = log, cosigned
        self._bundle, self._credentials, self._rosters = bundle, credentials, rosters
        self._cosignatures: tuple[str, ...] = ()
        self._known_sizes = dict[int, int]()  # by node, how many leaves it has shown to know
        self._head: TreeHead | None = None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Log the content of the messages, send them with the log's head, and yield the replies.

        Arguments as of Flower's `Grid`; at most one message goes to each node.

        Raises:
          OSError: the log cannot be written; nothing is sent.
        """
        asked = list(messages)
        hashes = dict[tuple[int, ...], bytes]()
        places = [self._places(message.content, hashes) for message in asked]
        size = len(self._log.leaves)
        written = dict[tuple[int, int], RecordDict]()  # by content, and the first leaf that goes with it
        sent = [
            message if each is None else self._with_log(message, each, written)
            for message, each in zip(asked, places, strict=True)
        ]
        for reply in self._grid.send_and_receive(sent, timeout=timeout):
            node = reply.metadata.src_node_id
            if not reply.has_error():
                self._known_sizes[node] = size
            elif reply.error.code == FAILED:  # perhaps for want of leaves: one that forgot gets all of them
                self._known_sizes.pop(node, None)
            yield reply

    def keep_unsent(self, content: RecordDict) -> None:
        """Log the instruction of an empty cohort, which a gap in the log would reveal."""
        self._places(content, {})

    def _places(self, content: RecordDict, hashes: dict[tuple[int, ...], bytes]) -> Places | None:
        """Return the places of an instruction; None for one outside a run."""
        records = records_of(content, ConfigRecord)
        named = records.get(SPEC_RECORD) or records.get(OVER)
        if named is None:
            return None
        self._log.place_of(roster_entry(self._rosters()[0]))
        model = roster = NOWHERE
        if records_of(content, ArrayRecord):
            key = tuple(id(record) for name, record in content.items() if name not in OURS)
            if key not in hashes:  # one for all nodes of a round
                hashes[key] = model_hash(content)
            run, found = str(named["run"]), hashes[key]
            of_round = SPEC_RECORD in records
            entry = model_entry(run, int(str(named["round"])), found) if of_round else final_entry(run, found)
            model = self._log.place_of(entry)
            if not of_round and (manifest := named.get("manifest")):
                self._log.place_of(manifest_entry(run, str(manifest)))
        if (signed := roster_of(content)) is not None:
            roster = self._log.place_of(roster_entry(_read(signed)))
        return Places(model, roster)

    def _with_log(
        self, message: Message, places: Places, written: dict[tuple[int, int], RecordDict]
    ) -> Message:
        """Return the message with the log's record; content shared by several messages stays shared."""
        node, head = message.metadata.dst_node_id, self._signed()
        start = min(self._known_sizes.get(node, 0), head.size)
        key = (id(message.content), start)
        if key not in written:
            leaves, cosignatures = tuple(self._log.leaves[start:]), self._cosignatures
            told = LogStatement(head.to_json(), start, leaves, places.model, places.roster, cosignatures)
            written[key] = RecordDict({**dict(message.content.items()), LOG_RECORD: log_record(told)})
        meta = message.metadata
        return Message(written[key], node, meta.message_type, ttl=meta.ttl, group_id=meta.group_id)

    def _signed(self) -> TreeHead:
        own, size = self._credentials(), len(self._log.leaves)
        head = self._head
        if head is None or head.size != size or head.certificate != own.certificate.decode():
            head = self._head = sign_head(self._bundle.federation, size, self._log.root, own)
            self._cosignatures = tuple(each.to_json() for each in self._cosigned(head))
        return head


_read = lru_cache(maxsize=2)(roster_in)  # the server checked its own; each node of a round is sent the same
