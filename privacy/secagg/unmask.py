"""Masks that are left on a sum of survivors, from the seeds and the keys that they revealed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .bindings import Agreement, mask_sign, pair_mask_info, private_mask_key
from .dealings import Dealings
from .hybrid import Offered, fits_commitment, fits_keys, mask_secret
from .refusal import Fault, Reason, Refused
from .suite import KEY_BYTES, agree, derive, key_from_seed

ByPair = dict[int, dict[int, bytes]]


@dataclass(frozen=True)
class Opening:
    """Computation of the masks that are left on a sum, from what the survivors revealed.

    Attributes:
      dealings: of the cohort.
      context: of the round, 32 bytes.
      alive: survivors, ascending.
      dead: nodes that shared and are not in the sum, ascending.
      seeds: by node, the private seed of a survivor and the mask seed of a dropout, if enough shares arrived.
      mask_keys: by dropout and surviving neighbour, the `Revealed.mask_keys` that the survivor claims.
      offered: hybrid blocks by sender and receiver.
      blamed: by node, its fault as shown by the masks; filled while they are computed.
      about: by the same nodes, the dropout whose masks show it.
    """

    dealings: Dealings
    context: bytes
    alive: Sequence[int]
    dead: Sequence[int]
    seeds: Mapping[int, bytes]
    mask_keys: ByPair
    offered: Offered
    blamed: dict[int, Fault] = field(default_factory=dict[int, Fault])
    about: dict[int, int] = field(default_factory=dict[int, int])

    def remaining_masks(self) -> Iterator[tuple[bytes, int]]:
        """Yield key and sign of every mask whose addition unmasks the survivors' sum; blame nodes on the way.

        Raises:
          Refused: TOO_FEW shares of a seed, and not all of their replacements.
        """
        for node in self.alive:
            yield private_mask_key(self._seed(node), self.context), -1
        living = set(self.alive)
        for node in self.dead:
            peers = [p for p in self.agreed.neighbours(node, living) if self.dealings.masked(node, p)]
            keys = self._keys(node, peers)
            yield from ((keys[peer], mask_sign(node, peer)) for peer in peers)

    @property
    def agreed(self) -> Agreement:
        """The cohort."""
        return self.dealings.agreed

    def _seed(self, node: int) -> bytes:
        if node not in self.seeds:
            raise Refused(Reason.TOO_FEW, "too few shares of a seed")
        return self.seeds[node]

    def _keys(self, node: int, peers: Sequence[int]) -> dict[int, bytes]:
        """Return the keys of a dropout's masks, by surviving neighbour.

        The neighbours' claims replace keys that the seed does not give. Those of a hybrid suite count only if they are
        what the pair's deal committed to; a false claim without ML-KEM corrupts no more than a false vector could.
        """
        claims = {peer: key for peer, key in self.mask_keys.get(node, {}).items() if key != bytes(KEY_BYTES)}
        computed = self._computed(node, peers)
        if self.agreed.suite.hybrid:
            claims = self._committed(node, claims, from_seed=False)
            computed = self._committed(node, computed, from_seed=True)
        missing = [peer for peer in peers if peer not in claims and peer not in computed]
        if missing:
            raise Refused(Reason.TOO_FEW, f"{len(missing)} masks of a node that nobody can take off")
        for peer in peers:
            if peer in claims and computed.get(peer, claims[peer]) != claims[peer]:
                self._blame(peer, Fault.WRONG_MASK, node)
        keys = claims | computed
        if not self.agreed.suite.hybrid:
            return keys
        return {peer: derive(key, self._info) for peer, key in keys.items()}

    def _committed(self, node: int, secrets: Mapping[int, bytes], from_seed: bool) -> dict[int, bytes]:
        """Return those secrets of a dropout's masks that fit their commitments, and blame a node for each other one.

        A neighbour that claims a wrong secret made the commitment, or accepted it. If the dropout's seed gives a wrong
        secret, the lower node of the pair sealed it, whose deal then contradicts itself.
        """
        right = {
            peer: key
            for peer, key in secrets.items()
            if fits_commitment(self.agreed, node, peer, key, self.offered)
        }
        for peer in secrets.keys() - right.keys():
            liar, fault = (min(node, peer), Fault.WRONG_SECRET) if from_seed else (peer, Fault.WRONG_MASK)
            self._blame(liar, fault, node)
        return right

    def _blame(self, node: int, fault: Fault, dead: int) -> None:
        self.blamed[node], self.about[node] = fault, dead

    @property
    def _info(self) -> bytes:
        return pair_mask_info(self.context)

    def _computed(self, node: int, peers: Sequence[int]) -> dict[int, bytes]:
        """Return the keys, or hybrid secrets, from the dropout's mask seed; blame the dropout for a wrong one."""
        agreed = self.agreed
        if node not in self.seeds:
            return {}
        mask_seed, advert = self.seeds[node], agreed.by_node[node]
        if not fits_keys(mask_seed, advert.mask_key, advert.kem_keys):
            self._blame(node, Fault.WRONG_SEED, node)
            return {}
        if not agreed.suite.hybrid:
            secret = key_from_seed(mask_seed)
            return {peer: agree(secret, agreed.by_node[peer].mask_key, self._info) for peer in peers}
        keys: dict[int, bytes] = {}
        for peer in peers:
            try:
                keys[peer] = mask_secret(agreed, mask_seed, node, peer, self.offered)
            except Refused:  # of its own escrow
                self._blame(node, Fault.WRONG_SECRET, node)
        return keys
