"""What a node remembers of one attempt, and how its replies leave: tagged, and the vector masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from .bindings import Agreement, survivors_digest
from .masks import Vector, add_masks
from .messages import Advert
from .suite import seal, suite_of
from .transcript import Terms


class Stage(IntEnum):
    """What a node has done in an attempt."""

    ADVERTISED = 0
    SHARED = 1
    MASKED = 2
    CONFIRMED = 3


# Secret seeds of 32 bytes of noise in the vector, each behind the fewest survivors that it is opened to: of fewer the
# noise must stay.
Openings = tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Work:
    """What the node computes for a round.

    Attributes:
      model_hash: of the model that this node received, computed here.
      vector: called once, when the masks are ready; hands over words of the terms' width, shape (d,), to be
        overwritten, and what the node is to open beside its shares.
    """

    model_hash: bytes
    vector: Callable[[Terms], tuple[Vector, Openings]]


@dataclass
class Attempt:
    """What a node remembers of one attempt between messages; seeds, keys, `held` and `openings` are secret.

    `pair_keys` are those under which shares travel, of 32 bytes, by ascending neighbour; `mask_secrets` the same of those
    that this node made for higher neighbours, where the suite is hybrid.
    """

    terms: Terms
    candidates: tuple[int, ...]
    context: bytes
    mask_seed: bytes
    own_seed: bytes
    share_seed: bytes
    reply_key: bytes
    adverts: tuple[Advert, ...]
    stage: Stage = Stage.ADVERTISED
    held: bytes = b""
    sharers: tuple[int, ...] = ()
    model_hash: bytes = b""
    alive: tuple[int, ...] = ()
    openings: Openings = ()
    pair_keys: bytes = b""
    mask_secrets: bytes = b""

    @cached_property
    def agreed(self) -> Agreement:
        """Only once the cohort's adverts are known."""
        return Agreement(self.terms, self.context, self.candidates, self.adverts)

    @cached_property
    def view(self) -> tuple[bytes, bytes]:
        """The round's context and the digest of its survivors; only once they are known."""
        alive = set(self.alive)
        context = self.agreed.round(self.sharers, self.model_hash)
        return context, survivors_digest(context, self.alive, [n for n in self.sharers if n not in alive])

    def erase(self) -> None:
        """Let go of every secret. Python cannot overwrite bytes; what it freed may stay in memory for a while."""
        self.mask_seed = self.own_seed = self.share_seed = self.reply_key = self.held = b""
        self.pair_keys, self.mask_secrets, self.openings = b"", b"", ()


def tagged(attempt: Attempt, body: bytes) -> bytes:
    """Return a reply with the tag that this node alone can make for this server."""
    return body + seal(suite_of(attempt.terms.suite), attempt.reply_key, b"", body)


def masked(attempt: Attempt, vector: Vector, masks: Sequence[tuple[bytes, int]], context: bytes) -> bytes:
    """Return the vector, masked in place, and behind it the round's context, sealed with the vector.

    Raises:
      ValueError: if the vector is not what `Work` promises.
    """
    width = attempt.terms.bits // 8
    if vector.dtype.itemsize != width or vector.dtype.kind != "u" or vector.ndim != 1:
        raise ValueError(f"the vector is not one row of unsigned {attempt.terms.bits}-bit words")
    words = np.require(vector, f"<u{width}", ["C", "W"])
    suite = suite_of(attempt.terms.suite)
    add_masks(words, masks, suite)
    body = words.data.cast("B")
    return b"".join((body, seal(suite, attempt.reply_key, context, body)))
