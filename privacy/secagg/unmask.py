"""Masks that are left on a sum of survivors, from the seeds and the keys that they revealed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .bindings import Agreement, mask_sign, own_mask_key, pair_mask_info
from .hybrid import Offered, mask_secret, mixed
from .refusal import Fault, Reason, Refused
from .suite import agree, key_from_seed, public_of

ByPair = dict[int, dict[int, bytes]]


@dataclass(frozen=True)
class Opening:
    """Reveals of a round's survivors.

    Attributes:
      agreed: the cohort.
      context: of the round, 32 bytes.
      alive: survivors, ascending.
      dead: nodes that shared and are not in the sum, ascending.
      seeds: by node, the private seed of a survivor and the mask seed of a dropout, if enough shares arrived.
      mask_keys: by dropout and surviving neighbour, the key of their mask, as the survivor claims.
      offered: hybrid blocks by sender and receiver.
      blamed: by node, its fault as shown by the masks; filled while they are computed.
    """

    agreed: Agreement
    context: bytes
    alive: Sequence[int]
    dead: Sequence[int]
    seeds: Mapping[int, bytes]
    mask_keys: ByPair
    offered: Offered
    blamed: dict[int, Fault] = field(default_factory=dict[int, Fault])

    def remaining_masks(self) -> Iterator[tuple[bytes, int]]:
        """Yield key and sign of every mask to add in order to unmask the survivors' sum.

        Raises:
          Refused: TOO_FEW shares of a seed, and not all of their replacements.
        """
        for node in self.alive:
            yield own_mask_key(self._seed(node), self.context), -1
        living = set(self.alive)
        for node in self.dead:
            peers = self.agreed.neighbours(node, living)
            keys = self._keys(node, peers)
            yield from ((keys[peer], mask_sign(node, peer)) for peer in peers)

    def _seed(self, node: int) -> bytes:
        if node not in self.seeds:
            raise Refused(Reason.TOO_FEW, "too few shares of a seed")
        return self.seeds[node]

    def _keys(self, node: int, peers: Sequence[int]) -> dict[int, bytes]:
        """Return the keys of a dead node's masks, by living neighbour.

        The neighbours' claims replace keys that the seed does not give: a false claim corrupts no more than a false
        vector could.
        """
        said = self.mask_keys.get(node, {})
        computed = self._computed(node, peers)
        missing = [peer for peer in peers if peer not in said and peer not in computed]
        if missing:
            raise Refused(Reason.TOO_FEW, f"{len(missing)} masks of a node that nobody can take off")
        for peer in peers:
            if peer in said and computed.get(peer, said[peer]) != said[peer] and not self.agreed.suite.hybrid:
                self.blamed[peer] = Fault.WRONG_MASK
        # A hybrid secret is of one of the two alone, and a dead node may have sealed another one for itself.
        return computed | said if self.agreed.suite.hybrid else said | computed

    def _computed(self, node: int, peers: Sequence[int]) -> dict[int, bytes]:
        """Return the keys from the dropout's mask seed; none if it is unknown, or belongs to another key."""
        agreed, info = self.agreed, pair_mask_info(self.context)
        try:
            mask_seed = self._seed(node)
        except Refused:
            return {}
        secret = key_from_seed(mask_seed)
        if public_of(secret) != agreed.by_node[node].mask_key:
            self.blamed[node] = Fault.WRONG_SEED
            return {}
        keys = {peer: agree(secret, agreed.by_node[peer].mask_key, info) for peer in peers}
        if not agreed.suite.hybrid:
            return keys
        try:
            secrets = {peer: mask_secret(agreed, mask_seed, node, peer, self.offered) for peer in peers}
        except Refused:
            return {}
        return {peer: mixed(key, secrets[peer], info) for peer, key in keys.items()}
