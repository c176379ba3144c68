"""Which masks are left on the sum once its survivors are fixed, from the shares that they revealed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from .bindings import Agreement, commitment, mask_sign, own_mask_key, pair_mask_info
from .hybrid import Offered, mask_secret, mixed
from .messages import SHARE_BYTES
from .refusal import Reason, Refused
from .shamir import combine
from .suite import agree, key_from_seed, public_of

Shares = dict[int, dict[int, bytes]]


def by_owner(agreed: Agreement, sharers: Sequence[int], revealed: Mapping[int, bytes]) -> Shares:
    """Return each sharer's shares by the holder's point, from what every node revealed."""
    owners: Shares = {node: {} for node in sharers}
    for node, shares in revealed.items():
        for place, owner in enumerate(agreed.neighbours(node, owners.keys())):
            owners[owner][agreed.points[node]] = shares[SHARE_BYTES * place : SHARE_BYTES * (place + 1)]
    return owners


def remaining_masks(
    agreed: Agreement,
    alive: Sequence[int],
    dead: Sequence[int],
    shares: Shares,
    context: bytes,
    offered: Offered,
) -> Iterator[tuple[bytes, int]]:
    """Yield key and sign of every mask to add so that the sum of the living is bare.

    Raises:
      Refused: TOO_FEW shares of a seed, or BAD_SHARE where they do not give what its owner committed to.
    """
    revealed = {point for holders in shares.values() for point in holders}

    def seed(node: int, fits: Callable[[bytes], bool]) -> bytes:
        own = agreed.points[node]
        return _seed(shares[node], own if own in revealed else None, agreed.terms.threshold, fits)

    for node in alive:
        bound = agreed.by_node[node].commitment
        own_seed = seed(node, lambda s, n=node, b=bound: commitment(agreed.context, n, s) == b)
        yield own_mask_key(own_seed, context), -1
    info, living = pair_mask_info(context), set(alive)
    for node in dead:
        public = agreed.by_node[node].mask_key
        mask_seed = seed(node, lambda s, p=public: public_of(key_from_seed(s)) == p)
        secret = key_from_seed(mask_seed)
        for peer in agreed.neighbours(node, living):
            key = agree(secret, agreed.by_node[peer].mask_key, info)
            if agreed.suite.hybrid:
                key = mixed(key, mask_secret(agreed, mask_seed, node, peer, offered), info)
            yield key, mask_sign(node, peer)


def _seed(
    shares: Mapping[int, bytes], own: int | None, threshold: int, fits: Callable[[bytes], bool]
) -> bytes:
    """Return the seed that fits its owner's commitment; `own` is the owner's point, if it revealed shares itself."""
    if len(shares) < threshold:
        raise Refused(Reason.TOO_FEW, f"{len(shares)} shares of a seed, of the {threshold} needed")
    for window in _windows(sorted(shares), own, threshold):
        try:
            seed = combine({point: shares[point] for point in window}, threshold)
        except Refused:  # a share that is no number
            continue
        if fits(seed):
            return seed
    raise Refused(Reason.BAD_SHARE, "the shares do not give what their owner committed to")


def _windows(points: Sequence[int], own: int | None, threshold: int) -> Iterator[Sequence[int]]:
    """Yield choices of `threshold` points, the first such that few choices serve all the owners of a complete graph.

    Nobody holds a share of itself: from the circle of everybody who revealed, its owner's block is left out. Any
    single wrong share is left out by one of the windows that follow.
    """
    circle = points if own is None else sorted([*points, own])
    spare = len(circle) - threshold
    first = circle.index(own) // spare * spare if own is not None else 0
    yield [*circle[:first], *circle[first + spare :]][:threshold]
    for start in range(0, len(points), max(1, len(points) - threshold)):
        yield [*points[start:], *points[:start]][:threshold]
