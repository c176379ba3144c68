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
from .log_wire import NO_ENTRY, LogStatement, log_record
from .roster_watch import SignedRoster
from .server_bundle import ServerBundle
from .server_log import ServerLog, final_entry, manifest_entry, model_entry, roster_entry
from .tree_head import TreeHead, sign_head


class LogIndices(NamedTuple):
    """Indices in the log of the entries of an instruction's model and roster."""

    model: int = NO_ENTRY
    roster: int = NO_ENTRY


class LoggedGrid(PassingGrid):
    """Grid whose instructions are logged before they are sent.

    `rosters` returns the newest roster, which is logged before each instruction. The key of `credentials` signs the log's
    heads, and `cosigned` returns the co-signatures of witnesses under a new one.
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
        self._cosignatures: tuple[str, ...] = ()  # under `_head`, as text
        self._sizes = dict[int, int]()  # by node, the number of leaves that it has acknowledged
        self._sent = dict[
            int, int
        ]()  # by node, the number it was sent last: its answer may come a round late
        self._head: TreeHead | None = None  # signed last

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Log the content of the messages, send them with the log's head, and yield the replies.

        At most one message goes to each node; `timeout` is in seconds.

        Raises:
          OSError: the log cannot be written; nothing is sent.
        """
        requests = list(messages)
        hashes = dict[tuple[int, ...], bytes]()  # of models, by identity of the records that have the model
        indices = [self._log_one(message.content, hashes) for message in requests]
        size = len(self._log.leaves)
        written = dict[tuple[int, int], RecordDict]()  # by identity of the content, and first leaf with it
        outgoing = [
            message if each is None else self._with_log(message, each, written)
            for message, each in zip(requests, indices, strict=True)
        ]
        self._sent |= {message.metadata.dst_node_id: size for message in outgoing}
        for reply in self._grid.send_and_receive(outgoing, timeout=timeout):
            node = reply.metadata.src_node_id
            if not reply.has_error():
                self._sizes[node] = self._sent[node]
            elif reply.error.code == FAILED:
                # Perhaps the node lost its leaves: the next time it gets all of them.
                self._sizes.pop(node, None)
            yield reply

    def keep_unsent(self, content: RecordDict) -> None:
        """Log content that no node is sent: an empty cohort would otherwise show as a gap, and a run's end be missing."""
        self._log_one(content, {})

    def _log_one(self, content: RecordDict, hashes: dict[tuple[int, ...], bytes]) -> LogIndices | None:
        """Log an instruction, and return the indices of its entries; None for one outside a run."""
        records = records_of(content, ConfigRecord)
        fields = records.get(SPEC_RECORD) or records.get(OVER)
        if fields is None:
            return None
        self._log.index_of(roster_entry(self._rosters()[0]))
        model = roster = NO_ENTRY
        if records_of(content, ArrayRecord):
            key = tuple(id(record) for name, record in content.items() if name not in OURS)
            if key not in hashes:  # one for all nodes of a round
                hashes[key] = model_hash(content)
            run, digest = str(fields["run"]), hashes[key]
            in_round = SPEC_RECORD in records
            number = int(str(fields["round"])) if in_round else 0
            entry = model_entry(run, number, digest) if in_round else final_entry(run, digest)
            model = self._log.index_of(entry)
            if not in_round and (manifest := fields.get("manifest")):
                self._log.index_of(manifest_entry(run, str(manifest)))
        if (signed := roster_of(content)) is not None:
            roster = self._log.index_of(roster_entry(_read(signed)))
        return LogIndices(model, roster)

    def _with_log(
        self, message: Message, indices: LogIndices, written: dict[tuple[int, int], RecordDict]
    ) -> Message:
        """Return the message with the log's record; content shared by several messages stays shared."""
        node, head = message.metadata.dst_node_id, self._current_head()
        start = min(self._sizes.get(node, 0), head.size)
        key = (id(message.content), start)
        if key not in written:
            leaves, (model, roster) = tuple(self._log.leaves[start:]), indices
            statement = LogStatement(head.to_json(), start, leaves, model, roster, self._cosignatures)
            written[key] = RecordDict({**dict(message.content.items()), LOG_RECORD: log_record(statement)})
        meta = message.metadata
        return Message(written[key], node, meta.message_type, ttl=meta.ttl, group_id=meta.group_id)

    def _current_head(self) -> TreeHead:
        """Return the head of the log; after an entry or a renewal of the certificate, sign a new one and have it co-signed."""
        credentials, size = self._credentials(), len(self._log.leaves)
        head = self._head
        if head is None or head.size != size or head.certificate != credentials.certificate.decode():
            head = self._head = sign_head(self._bundle.federation, size, self._log.root, credentials)
            self._cosignatures = tuple(each.to_json() for each in self._cosigned(head))
        return head


_read = lru_cache(maxsize=2)(roster_in)  # the server checked its own; each node of a round is sent the same
