"""Later heads of a server's log, which its devices have seen: proof that the server was restored from an older copy.

A head is signed with the server's own key, so that no device can make one up.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..base.durable_files import PUBLIC, replace_file
from ..base.refusal import Refusal
from ..privacy.merkle import root_of
from .server_log import LOG, ServerLog
from .tree_head import TreeHead, check_head, read_head

FILE = "log.later.json"  # in the server's bundle
LOST = "log.lost.json"  # the same, renamed by an operator who cannot restore what it proves
LOG_LOSS = (
    "a device holds a later head of this server's log, of {} entries: the server was restored from an older copy, or keeps two "
    "logs; restore its newest copy (docs/backups.md)"
)


class LaterHeads:
    """Comparison of a server's log with the heads that devices report.

    Args:
      folder: of the server's bundle.
      log: of the server, which grows.
      ca: certificates of the authority, former ones too, in PEM.
      federation: its name.

    Raises:
      Refusal: the file of a lost head holds none.
    """

    def __init__(self, folder: Path, log: ServerLog, ca: bytes, federation: str) -> None:
        self._path, self._log, self._ca, self._federation = folder / FILE, log, ca, federation
        self._checked = set[str]()  # heads, as text, that need no second look
        lost = folder / LOST
        self._lost_size = read_head(lost.read_text("utf-8", "replace")).size if lost.exists() else 0

    def refuse(self) -> None:
        """Check that the log extends the later head that an earlier process stored, if any; delete its file then.

        Raises:
          Refusal: it does not.
        """
        if not self._path.exists():
            return
        head = read_head(self._path.read_text("utf-8", "replace"))
        if self._lacks(head):
            raise Refusal("file", str(self._path.with_name(LOG)), LOG_LOSS.format(head.size))
        self._path.unlink()

    def log_loss(self, heads: Iterable[str]) -> str | None:
        """Return a sentence if the log does not extend one of these heads, as text, and store that one; None if it does.

        The heads are unverified: one that this server has not signed is ignored. The file makes `refuse` stop the next start.
        """
        for text in set(heads) - self._checked - {""}:
            self._checked.add(text)
            with suppress(Refusal):
                head = read_head(text)
                check_head(head, self._ca, self._federation)
                if self._lacks(head):
                    with suppress(OSError):
                        replace_file(self._path, text.encode(), PUBLIC)
                    self._checked.discard(text)  # each later call says it again
                    return LOG_LOSS.format(head.size)
        return None

    def _lacks(self, head: TreeHead) -> bool:
        """Return whether the log does not extend a head; one no longer than the head that the operator gave up does not count."""
        leaves = self._log.leaves
        if head.size <= self._lost_size:
            return False
        return head.size > len(leaves) or root_of(leaves[: head.size]).hex() != head.root
