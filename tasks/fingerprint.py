"""Fingerprint of a data set: the name of its ledger, a hash over its content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np

from .data import BATCH, Data, Examples, LazyExamples, leaves

SAMPLED = 32  # items read twice; if each has a coin, all agree by chance in one of 4 billion data sets


def fingerprint(data: Data) -> str:
    """Return the name of a data set on its ledger: SHA-256 over its content, in hexadecimal.

    A data set whose content cannot be hashed is identified by its class and its length.
    """
    if (digest := content_of(data)) is not None:
        return digest
    kind = type(data.dataset if isinstance(data, LazyExamples) else data)
    return hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {len(data)}".encode()).hexdigest()


def content_of(data: Data) -> str | None:
    """Return the SHA-256 over the content of a data set, in hexadecimal; None if it cannot be hashed.

    Lazily read items are hashed before `transform`, those of Hugging Face as they are stored. There is no hash if items
    differ between two readings, or have unknown types.
    """
    digest = hashlib.sha256()
    if isinstance(data, Examples):
        for tree in (data.inputs, data.targets):
            if isinstance(tree, dict):
                digest.update(" ".join(cast(dict[str, Any], tree)).encode())
            for tensor in leaves(tree):
                feed(digest, tensor)
        return digest.hexdigest()
    try:
        for item in _stored_items(data):
            feed(digest, item)
    except TypeError:
        return None
    return digest.hexdigest()


def _stored_items(data: LazyExamples) -> Iterator[Any]:
    """Yield all items in stored form, one by one or in blocks; TypeError if two readings of a sampled item differ."""
    rows = list(range(len(data)))
    if hasattr(data.dataset, "with_format"):
        table = data.dataset.with_format("arrow")
        for start in range(0, len(rows), BATCH):
            yield table[rows[start : start + BATCH]].to_pydict()
        return
    for row in rows[:: max(1, len(rows) // SAMPLED)]:
        one, other = hashlib.sha256(), hashlib.sha256()
        for digest in (one, other):
            feed(digest, data.raw_items([row])[0])
        if one.digest() != other.digest():
            raise TypeError("random items")
    for row in rows:
        yield data.raw_items([row])[0]


def feed(digest: Any, value: Any) -> None:
    """Update a hash with a value and all that it contains.

    Args:
      digest: a hash object of hashlib.
      value: an array, a tensor, text, a number, or mappings and sequences of them.

    Raises:
      TypeError: its content includes an unknown type.
    """
    if hasattr(value, "detach"):
        value = value.detach().contiguous().numpy()
    if hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    elif isinstance(value, Mapping):
        for key, each in sorted(cast(Mapping[str, Any], value).items()):
            feed(digest, key)
            feed(digest, each)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(cast(list[Any], value))}:".encode())
        for each in cast(list[Any], value):
            feed(digest, each)
    elif isinstance(value, bytes | str | int | float | None):
        text = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(f"{len(text)}:".encode() + text)
    else:
        raise TypeError(type(value).__name__)
