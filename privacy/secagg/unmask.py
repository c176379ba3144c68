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
    """What survivors revealed of a round.

    Attributes:
      agreed: the cohort.
      context: of the round, 32 bytes.
      alive: survivors, ascending.
      dead: nodes that shared and are not in the sum, ascending.
      seeds: by node, the private seed of the living and the mask seed of the dead, where enough shares of it came.
      mask_keys: by dead node and living neighbour, the key of the mask that the two have, as the latter says.
      offered: hybrid blocks by sender and receiver.
      blamed: by node, what the masks showed that it did; filled as they are made.
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
        """Yield key and sign of every mask to add so that the sum of the living is bare.

        Raises:
          Refused: TOO_FEW shares of a seed, and not all that could stand in for them.
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

        What the neighbours said stands where the seed does not tell: one that lies spoils what it could spoil by its
        vector, and no more.
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
        """Return the keys that the dead node's mask seed gives; none where it is not known, or another key's."""
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
