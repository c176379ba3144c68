"""Receipts of the devices of a run, as in the file RECEIPTS of its folder: with the roster that holds their keys.

They arrive after the run is closed, so the closing entry does not bind them; the signature over the bundle does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...base.durable_files import replace_file
from ...base.refusal import Refusal
from ...privacy.ledger.hash_chain import canonical
from ...privacy.ledger.ledger_state import read_entries
from ...privacy.ledger.receipt import (
    COMPARED,
    UNCOMPARED,
    Receipt,
    RunDescription,
    commitment_of,
    holds,
    read_opening,
)
from ...privacy.secagg.graph import colluders
from ...privacy.secagg.refusal import Refused
from ...privacy.secagg.rollover import Rollover, read_chain, write_chain
from ...privacy.secagg.roster import Roster, read_roster
from ...run.files import RECEIPTS
from ...run.manifest import PRIVATE_MODE, PUBLIC_MODE, reveals_counts
from .signatures import UNREADABLE

FORMAT = "fedveil receipts 1"
COLLUSION = 0.1  # share of the members that is assumed to collude, as `secagg.collusion` has it by default


@dataclass(frozen=True)
class Receipts:
    """Receipts of one run.

    Attributes:
      description: the run's description that every device received.
      authority: Ed25519 public key that signed the roster.
      roster: its bytes, as the authority signed them.
      signed: the receipts, by ascending node.
      rollovers: by which earlier authorities handed over, the first one's first, up to `authority`.
    """

    description: RunDescription
    authority: bytes
    roster: bytes
    signed: Sequence[Receipt]
    rollovers: tuple[Rollover, ...] = ()

    @property
    def text(self) -> bytes:
        """The receipts as canonical JSON."""
        signed = [
            {"node": each.node, "commitment": each.commitment.hex(), "signature": each.signature.hex()}
            for each in self.signed
        ]
        keys = {"authority": self.authority.hex(), "roster": self.roster.hex()}
        if self.rollovers:
            keys["rollovers"] = write_chain(self.rollovers)
        return canonical({"format": FORMAT, **asdict(self.description), **keys, "receipts": signed}).encode()


def write_receipts(folder: Path, receipts: Receipts) -> None:
    """Write receipts into a run folder; with a trusted server only its operator may read the membership."""
    replace_file(folder / RECEIPTS, receipts.text, PRIVATE_MODE if reveals_counts(folder) else PUBLIC_MODE)


def read_receipts(folder: Path) -> Receipts:
    """Return the receipts in a folder, unchecked; refuse an unreadable file."""
    path = folder / RECEIPTS
    try:
        text = path.read_bytes()
        fields: dict[str, Any] = json.loads(text)
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}")
        description = RunDescription(*(str(fields[name]) for name in ("federation", "run", "manifest")))
        signed = [
            Receipt(int(each["node"]), bytes.fromhex(each["commitment"]), bytes.fromhex(each["signature"]))
            for each in fields["receipts"]
        ]
        authority, roster = bytes.fromhex(fields["authority"]), bytes.fromhex(fields["roster"])
        chain = read_chain(str(fields["rollovers"]), description.federation) if "rollovers" in fields else ()
        receipts = Receipts(description, authority, roster, signed, chain)
        if receipts.text != text:
            raise ValueError("it is not in canonical form")
    except (*UNREADABLE, Refused) as problem:
        raise Refusal("receipts", str(path), f"cannot be read ({problem}); ask for a true copy") from problem
    return receipts


def verify_roster(receipts: Receipts) -> Roster:
    """Return the roster of receipts, after verifying each member's signature.

    Raises:
      Refusal: the authority did not sign the roster, there is no receipt, or one is not signed by its member.
    """
    try:
        roster = read_roster(receipts.roster, receipts.authority)
    except Refused as refused:
        raise Refusal("receipts", "roster", f"is not signed by the authority ({refused})") from None
    keys = {member.node: member.public for member in roster.members}
    nodes = [each.node for each in receipts.signed]
    if not nodes or nodes != sorted(set(nodes)):
        raise Refusal("receipts", nodes, "must be one for each node, in ascending order, at least one")
    for receipt in receipts.signed:
        tags = (COMPARED, UNCOMPARED) if receipt.node in keys else ()
        if not any(holds(receipt, receipts.description, keys[receipt.node], tag) for tag in tags):
            raise Refusal("receipts", f"node {receipt.node}", "did not sign this receipt")
    return roster


def signers_in(receipts: Receipts, roster: Roster, now: int) -> frozenset[int]:
    """Return the nodes whose receipts count: of members not ended, that compared the manifest with what they received.

    Args:
      receipts: which `verify_roster` has checked.
      roster: that it returned.
      now: Unix second of the run's end.
    """
    keys = {member.node: member.public for member in roster.members}
    compared = (each.node for each in receipts.signed if holds(each, receipts.description, keys[each.node]))
    return frozenset(compared) - roster.ended(now)


def fewest_receipts(roster: Roster, assumed: int) -> int:
    """Return the number of receipts of which at least one is of a member that does not collude, at least two.

    Args:
      roster: of the receipts.
      assumed: number of colluders that the run states; the files of a run can only raise the number.
    """
    members = len(roster.members)
    return max(2, min(members, 1 + max(assumed, colluders(members, COLLUSION))))


def require_opened(receipts: Receipts, device: Path) -> int:
    """Compare the ledgers of a device with its receipt, and return its node.

    Args:
      receipts: of the run, checked.
      device: the device's state folder, or a copy of its receipts and ledgers.

    Raises:
      Refusal: the device opens none of these receipts, or a ledger does not match its signed head.
    """
    opening = read_opening(device / "receipts" / f"{receipts.description.manifest}.json")
    commitment = commitment_of(opening)
    node = next((each.node for each in receipts.signed if each.commitment == commitment), None)
    if node is None:
        raise Refusal("--device", str(device), "holds no receipt of this run")
    for name, head in opening.heads.items():
        if Path(name).name != name:
            raise Refusal("--device", name, "is not a file name")
        entries = read_entries(device / "ledgers" / name)
        if head.seq < 1 or head.seq > len(entries) or entries[head.seq - 1].head != head:
            remedy = f"lacks entry {head.seq}, whose hash node {node} signed: it was changed afterwards"
            raise Refusal("--device", name, remedy)
    return node
