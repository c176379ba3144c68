"""Merkle tree over a growing list, in the form of RFC 9162, section 2.1: roots, and proofs that an auditor checks.

Leaves and inner nodes are hashed with different prefixes, so that an entry cannot pass for a node. A proof of inclusion
shows that a tree contains an entry, a proof of consistency that a tree is a prefix of a later one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256().digest()


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of one entry, 32 bytes."""
    return hashlib.sha256(b"\x00" + entry).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node, 32 bytes, from those of its children."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass
class Frontier:
    """Right edge of a tree, from which its root and every larger tree's root follow.

    Attributes:
      size: number of leaves.
      peaks: hashes of its perfect subtrees, the largest first; one for each bit of the size.
    """

    size: int = 0
    peaks: list[bytes] = field(default_factory=list[bytes])

    def add(self, leaves: Iterable[bytes]) -> None:
        """Append leaves by their hashes."""
        for leaf in leaves:
            self.size += 1
            self.peaks.append(leaf)
            subtrees = self.size  # how many perfect subtrees of the last peak's height the leaves fill
            while subtrees % 2 == 0:  # the last two peaks have one height: they become one
                right = self.peaks.pop()
                self.peaks[-1] = _node_hash(self.peaks[-1], right)
                subtrees //= 2

    def copy(self) -> Frontier:
        """Return another frontier of the same tree."""
        return Frontier(self.size, list(self.peaks))

    @property
    def root(self) -> bytes:
        """The hash of the whole tree, 32 bytes."""
        if not self.peaks:
            return EMPTY_ROOT
        root = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            root = _node_hash(peak, root)
        return root


def root_of(leaves: Sequence[bytes]) -> bytes:
    """Return the root of a tree, 32 bytes, from the hashes of its leaves."""
    frontier = Frontier()
    frontier.add(leaves)
    return frontier.root


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Return PATH(index, leaves) of RFC 9162, section 2.1.3.1: the hashes beside the way up from a leaf, the lowest first.

    Args:
      leaves: hashes of all leaves.
      index: index of the leaf, from 0.

    Raises:
      ValueError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise ValueError(f"place {index} of {len(leaves)} leaves")
    proof: list[bytes] = []
    while len(leaves) > 1:
        split = _split(len(leaves))
        left, right = leaves[:split], leaves[split:]
        if index < split:
            proof.append(root_of(right))
            leaves = left
        else:
            proof.append(root_of(left))
            leaves, index = right, index - split
    return proof[::-1]


def consistency_proof(leaves: Sequence[bytes], size: int) -> list[bytes]:
    """Return PROOF(size, leaves) of RFC 9162, section 2.1.4.1, by which `extends` checks that nothing was rewritten.

    Args:
      leaves: hashes of all leaves of the larger tree.
      size: number of leaves of the smaller tree, from 1.

    Raises:
      ValueError: there is no such smaller tree.
    """
    if not 0 < size <= len(leaves):
        raise ValueError(f"size {size} of {len(leaves)} leaves")
    proof: list[bytes] = []
    whole = True  # whether `leaves` still begins with the whole smaller tree, whose root the auditor has
    while size < len(leaves):
        split = _split(len(leaves))
        left, right = leaves[:split], leaves[split:]
        if size <= split:
            proof.append(root_of(right))
            leaves = left
        else:
            proof.append(root_of(left))
            leaves, size, whole = right, size - split, False
    return [*([] if whole else [root_of(leaves)]), *proof[::-1]]


def includes(root: bytes, size: int, leaf: bytes, index: int, proof: Sequence[bytes]) -> bool:
    """Return whether a proof shows a leaf in a tree: RFC 9162, section 2.1.3.2, where `number` is fn and `last` is sn.

    Args:
      root: root of the tree, 32 bytes.
      size: number of leaves of the tree.
      leaf: hash of the leaf.
      index: index of the leaf, from 0.
      proof: as `inclusion_proof` returns it.
    """
    if not 0 <= index < size:
        return False
    number, last, node_hash = index, size - 1, leaf
    for each in proof:
        if last == 0:
            return False
        if number & 1 or number == last:
            node_hash = _node_hash(each, node_hash)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            node_hash = _node_hash(node_hash, each)
        number, last = number >> 1, last >> 1
    return last == 0 and node_hash == root


def extends(first: bytes, first_size: int, second: bytes, second_size: int, proof: Sequence[bytes]) -> bool:
    """Return whether a proof shows that a tree begins with a smaller one: RFC 9162, section 2.1.4.2.

    `number`, `last`, `old` and `new` are fn, sn, fr and sr of the RFC.

    Args:
      first: root of the smaller tree.
      first_size: number of its leaves, from 1.
      second: root of the larger tree.
      second_size: number of its leaves.
      proof: as `consistency_proof` returns it.
    """
    if not 0 < first_size <= second_size:
        return False
    if first_size == second_size:
        return not proof and first == second
    is_power_of_two = first_size & (first_size - 1) == 0  # the proof then leaves out the smaller root
    path = [first, *proof] if is_power_of_two else list(proof)
    if not path:
        return False
    number, last = first_size - 1, second_size - 1
    while number & 1:
        number, last = number >> 1, last >> 1
    old = new = path[0]
    for each in path[1:]:
        if last == 0:
            return False
        if number & 1 or number == last:
            old, new = _node_hash(each, old), _node_hash(each, new)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            new = _node_hash(new, each)
        number, last = number >> 1, last >> 1
    return last == 0 and old == first and new == second


def _split(size: int) -> int:
    """Return the largest power of two below a size of at least 2."""
    return 1 << (size - 1).bit_length() - 1
