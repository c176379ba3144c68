"""Outputs of a decoder's frozen first layers, computed once for each text of a process and stored in memory as float16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.refusal import Refusal

TEXTS = 32  # that pass the frozen layers at a time

# Function from texts, each an int64 tensor of shape (length,), to hidden states of shape (n, tokens, width), float32.
States = Callable[[Sequence[Tensor]], Tensor]


def prefix_states(first_layers: Any, tokens: int, width: int) -> States:
    """Return the function that computes the hidden states of texts, which are zeros after a text's end.

    The function remembers the hidden states of each text, by its tokens, so that each is computed once.

    Args:
      first_layers: decoder of the layers without adapters, without a final norm.
      tokens: length of a row.
      width: of a hidden state.
    """
    stored: dict[bytes, Tensor] = {}

    def compute(texts: Sequence[Tensor]) -> None:
        rows = padded_rows(texts, max(map(len, texts)))
        with torch.no_grad():
            states = first_layers(input_ids=rows, use_cache=False).last_hidden_state.half()
        if not bool(states.isfinite().all()):
            remedy = "some hidden states of this model exceed float16; use task.cache=none"
            raise Refusal("task.cache", "prefix", remedy)
        for text, each in zip(texts, states, strict=True):
            stored[_key(text)] = each[: len(text)].clone()

    def states_of(texts: Sequence[Tensor]) -> Tensor:
        new = list({_key(text): text for text in texts if _key(text) not in stored}.values())
        new.sort(key=len)  # so that little is padded
        for start in range(0, len(new), TEXTS):
            compute(new[start : start + TEXTS])
        states = [stored[_key(text)] for text in texts]
        inputs = torch.zeros(len(texts), tokens, width)
        for row, each in zip(inputs, states, strict=True):
            row[: len(each)] = each
        return inputs

    return states_of


def padded_rows(texts: Sequence[Tensor], tokens: int, end: int = 0) -> Tensor:
    """Return texts as rows padded with the end token, shape (n, tokens), int64.

    Args:
      texts: int64, of shape (length,) each, with at most `tokens`.
      tokens: length of a row.
      end: token of the padding.
    """
    rows = torch.full((len(texts), tokens), end)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return rows


def _key(text: Tensor) -> bytes:
    return text.numpy().tobytes()
