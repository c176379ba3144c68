"""Secrets in texts: sentences with a code at simulated clients, and the loss of every code under a model.

The texts of all codes are a tree of tokens. A model predicts each token once for each of the tree's inner nodes, so that
the losses are exact, for any tokenizer: of three digits that are tokens each there are 111 nodes, and not 1 000 texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..base.refusal import Refusal
from ..tasks.planted import Secret, draw_secrets
from .base import Base
from .files import TextRecord
from .loss import log_probabilities

SENTENCE = "The code of {} is "  # before a code, with a name of consonants
DIGITS = 3  # of a code: with four, a secret costs ten times as much, and its exposure has 3.3 bits more


def secrets_of(
    each: int, num_clients: int, seed: int, simulated: bool, labels: Sequence[str]
) -> tuple[Secret, ...]:
    """Return the secrets of a task.

    Args:
      each: number of secrets of each kind.
      num_clients: number of clients.
      seed: of names, codes and clients.
      simulated: whether the texts are public or synthetic.
      labels: classes; empty for a language model.

    Raises:
      Refusal: the texts are real, the model predicts classes, or as `draw_secrets` does.
    """
    if each and not simulated:
        remedy = (
            "nothing is planted in real texts; leave it out, or set task.simulated=true for synthetic ones"
        )
        raise Refusal("task.secrets", each, remedy)
    if each and labels:
        remedy = "a model of classes predicts no code; leave it out, or leave task.label out"
        raise Refusal("task.secrets", each, remedy)
    return draw_secrets(each, num_clients, seed, SENTENCE, DIGITS)


def planted(
    clients: Sequence[Sequence[TextRecord]], secrets: Sequence[Secret], with_persons: bool
) -> list[list[TextRecord]]:
    """Return the texts of all clients, and after a client's own those of its secrets, a text each.

    Args:
      clients: texts of each client.
      secrets: secrets of all clients.
      with_persons: whether texts have persons; a secret is then a person of its own.
    """
    texts = [list(records) for records in clients]
    for secret in secrets:
        record = TextRecord(secret.text, person=with_persons * secret.prefix)
        for client in secret.clients:
            texts[client].append(record)
    return texts


@dataclass(frozen=True)
class CodeTree:
    """Texts of all codes of a secret as a tree of tokens.

    An edge is a token of a code after its node, which is what precedes that token.

    Attributes:
      rows: tokens before the last one of each code, without duplicates; every node is the beginning of one of them.
      places: row of each node, and position there of its last token, shape (nodes, 2), int64.
      edges: code, node and token of each edge, shape (edges, 3), int64.
      candidates: number of codes.
    """

    rows: tuple[Tensor, ...]
    places: Tensor
    edges: Tensor
    candidates: int

    @property
    def length(self) -> int:
        """Number of tokens of the longest row."""
        return max(map(len, self.rows))


def code_tree(base: Base, secret: Secret) -> CodeTree:
    """Return the tree of a secret's codes, without the tokens that all texts begin and end with."""
    texts = _texts_of(base, secret)
    first, last = _equal(texts), _equal([text[::-1] for text in texts])
    rows: dict[tuple[int, ...], int] = {}
    nodes: dict[tuple[int, ...], tuple[int, int, int]] = {}  # number, row and position
    edges: list[tuple[int, int, int]] = []
    for number, text in enumerate(texts):
        end = len(text) - last
        row = rows.setdefault(text[: end - 1], len(rows))
        for at in range(first, end):
            node, *_ = nodes.setdefault(text[:at], (len(nodes), row, at - 1))
            edges.append((number, node, text[at]))
    places = torch.tensor([(row, position) for _, row, position in nodes.values()])
    return CodeTree(tuple(map(torch.tensor, rows)), places, torch.tensor(edges), len(texts))


def _texts_of(base: Base, secret: Secret) -> list[tuple[int, ...]]:
    """Return the tokens of the text with each code, in ascending order of the codes, each with the end token."""
    texts = base.tokenizer.encode_batch([secret.text_of(pin) for pin in range(secret.candidates)])
    return [(*text.ids, base.end) for text in texts]


def _equal(texts: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens with which all texts begin."""
    return len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False))))


def code_losses(tree: CodeTree, states: Tensor, head: Tensor) -> NDArray[np.float64]:
    """Return the loss of each code, the sum over its tokens in nats, shape (candidates,).

    Args:
      tree: of the codes.
      states: hidden states of its rows after the final norm, shape (rows, tokens, width), float32.
      head: weight of the layer to the vocabulary, shape (words, width).
    """
    row, position = tree.places.unbind(1)
    code, node, token = tree.edges.unbind(1)
    losses = -log_probabilities(states[row, position], head)[node, token].double()
    return torch.zeros(tree.candidates, dtype=torch.float64).index_add(0, code, losses).numpy()


def check_lengths(secrets: Sequence[Secret], base: Base, tokens: int) -> None:
    """Refuse a number of tokens at which the text of a secret is cut."""
    longest = max((len(base.tokenizer.encode(secret.text).ids) for secret in secrets), default=0)
    if longest > tokens:
        remedy = f"cuts the text of a secret, which has {longest} tokens; raise it, or leave task.secrets out"
        raise Refusal("task.tokens", tokens, remedy)
