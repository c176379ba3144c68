"""Persons of a client's examples, and the bound on the examples of each person.

The selection of a person's examples depends only on these examples, so that a promise per example extends to the
person. It is the same in every round and run, for any order of the data, since a hash of the content selects.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ..base.refusal import Refusal
from ..privacy.statistics.columns import text_of
from .data import Data, LazyExamples, leaves, only
from .fingerprint import feed

KEY = b"examples of a person"  # a secret would hide nothing: any choice that looks at one person alone is as good


def names_of(data: Data, owner: str = "data") -> list[str]:
    """Return the person of each example, as text; 7, 7.0 and "7.0" are the same.

    `owner` names the data in a refusal.

    Raises:
      Refusal: persons are missing, for all or some examples, or their number differs from that of the examples.
    """
    persons = data.persons
    if persons is None:
        if not len(data):
            return []
        remedy = "the examples do not say whose they are; give Examples(..., persons=...), or task.person for tables"
        raise Refusal(f"{owner}: persons", None, remedy)
    if len(persons) != len(data):
        raise Refusal(f"{owner}: persons", len(persons), f"give one for each of the {len(data)} examples")
    listed = persons.tolist() if hasattr(persons, "tolist") else persons  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    names = [text_of(each).strip() for each in listed]
    if not all(names):
        remedy = "some examples have no person; name one for each, a new one for each unknown person"
        raise Refusal(f"{owner}: persons", "missing", remedy)
    return names


@dataclass(frozen=True)
class Owners:
    """Clients that may train on a person: those whose hash with the person is largest (rendezvous hashing).

    Each client computes by itself whether it is one of them; a selected client without examples of the person is not
    replaced.

    Attributes:
      client: number of the client that computes.
      clients: numbers of all clients, the same at each of them.
      most: largest number of clients that train on one person, at least 1.
    """

    client: int
    clients: Collection[int]
    most: int

    def include(self, name: str) -> bool:
        """Return whether this client may train on a person."""
        own = self._weight(name, self.client)
        larger = (each for each in self.clients if self._weight(name, each) > own)
        return sum(1 for _ in islice(larger, self.most)) < self.most  # stops at `most`, to save hashes

    def _weight(self, name: str, client: int) -> bytes:
        return hashlib.blake2b(f"{client} {name}".encode(), key=KEY, digest_size=16).digest()


def limit_per_person(data: Data, most: int | None, owners: Owners | None = None) -> Data:
    """Return a client's data with at most `most` examples of each person, in their order.

    Args:
      data: data of the client.
      most: at least 1; None keeps all examples.
      owners: the clients that may train on a person; None if all may.
    """
    if most is None or not len(data):
        return data
    rows = defaultdict[str, list[int]](list)
    for row, name in enumerate(names_of(data)):
        rows[name].append(row)
    if owners is not None:
        rows = {name: own for name, own in rows.items() if owners.include(name)}
    if sum(map(len, rows.values())) == len(data) and all(len(own) <= most for own in rows.values()):
        return data
    chosen = [row for name, own in rows.items() for row in _select(data, name, own, most)]
    return only(data, np.array(sorted(chosen), np.int64))


def _select(data: Data, name: str, rows: list[int], most: int) -> list[int]:
    """Return the `most` of a person's rows whose hashes are smallest."""
    if len(rows) <= most:
        return rows
    return sorted(rows, key=lambda row: _digest(data, name, row))[:most]


def _digest(data: Data, name: str, row: int) -> bytes:
    """Return a hash of an example's content and its person."""
    digest = hashlib.blake2b(name.encode(), key=KEY)
    if isinstance(data, LazyExamples):
        try:
            feed(digest, data.raw_items([row])[0])
        except TypeError as error:
            text = "such an item cannot be told from others; give at most per_person of a person, or tensors"
            raise Refusal("persons", str(error), text) from None
        return digest.digest()
    for each in leaves((data.inputs, data.targets)):
        if each.dim():
            feed(digest, each[row])
    return digest.digest()
