"""Loss of a language model, from hidden states, in chunks of tokens: the logits of a text are never whole in memory.

One example of 128 tokens and 49 152 words has 25 MB of logits. A token's gradient depends on that token alone, so it is
computed with its loss, and a backward pass needs no logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tasks.data import padded, padded_size

IGNORED = -100  # target of a token that has no loss, as in torch and transformers
LOGIT_BYTES = 16 << 20  # of the logits that are in memory at a time
WORDS = 2048  # rows of the head that are converted to float32 at a time


class Scores(NamedTuple):
    """Scores of texts.

    Attributes:
      nats: sum of the losses of each example's tokens, shape (n,), float32.
      tokens: number of these tokens, shape (n,), int64.
      hits: number of tokens whose likeliest prediction is right, shape (n,), int64.
    """

    nats: Tensor
    tokens: Tensor
    hits: Tensor


def scores(hidden: Tensor, head: Tensor, targets: Tensor) -> Scores:
    """Return the scores of texts, differentiable by the hidden states.

    Args:
      hidden: hidden states after the final norm, shape (n, tokens, width), float32.
      head: frozen weight of the layer to the vocabulary, shape (words, width), any floating type.
      targets: next token of each token, shape (n, tokens), int64; IGNORED has no loss.
    """
    labelled = targets != IGNORED
    nats, hits = token_losses(hidden[labelled], head, targets[labelled])
    by_token = torch.zeros_like(targets, dtype=nats.dtype).masked_scatter(labelled, nats)
    correct = torch.zeros_like(labelled).masked_scatter(labelled, hits)
    return Scores(by_token.sum(1), labelled.sum(1), correct.sum(1))


def mean_loss(each: Scores) -> Tensor:
    """Return the mean over examples of the mean over each example's tokens, in nats."""
    return (each.nats / each.tokens.clamp(min=1)).mean()


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's cross-entropy, shape (m,), and whether the likeliest word is the target.

    Args:
      hidden: shape (m, width), float32.
      head: shape (words, width).
      targets: shape (m,), int64, each a word.
    """
    return _TokenLosses.apply(hidden, head, targets)  # pyright: ignore[reportReturnType]


def log_probabilities(hidden: Tensor, head: Tensor) -> Tensor:
    """Return each word's log-probability after few tokens, shape (m, words), float32.

    Args:
      hidden: shape (m, width), float32.
      head: shape (words, width).
    """
    return products(hidden, head).log_softmax(1)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of tokens by the hidden states alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and hits, and store the gradients of the losses if they are needed."""
        product, weighted_sums = products, _sums
        if ctx.needs_input_grad[0] and multiplies_bfloat16(head):  # metrics are in float32
            product, weighted_sums = _bfloat16_products, _bfloat16_sums
        rows = max(1, LOGIT_BYTES // (4 * len(head)))
        losses, hits = torch.empty_like(hidden[:, 0]), torch.empty_like(targets, dtype=torch.bool)
        gradients = torch.empty_like(hidden[: len(hidden) * ctx.needs_input_grad[0]])
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            size = len(targets[chunk])
            # Few rows are rounded in another way, and an example's loss must not depend on the number of others.
            states, words = padded((hidden[chunk], targets[chunk]), padded_size(size))
            logits = product(states, head)
            highest, likeliest = logits.max(1, keepdim=True)
            own = logits.gather(1, words[:, None])
            total = logits.sub_(highest).exp_().sum(1, keepdim=True)
            losses[chunk] = (total.log() + highest - own).squeeze(1)[:size]
            hits[chunk] = (likeliest.squeeze(1) == words)[:size]
            if len(gradients):
                probabilities = logits.div_(total)
                probabilities[torch.arange(len(words), device=words.device), words] -= 1
                gradients[chunk] = weighted_sums(probabilities, head)[:size]
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the hidden states, shape (m, width)."""
        (gradients,) = ctx.saved_tensors
        return outer[0][:, None] * gradients, None, None


def products(states: Tensor, head: Tensor) -> Tensor:
    """Return the logits, shape (m, words), float32."""
    logits = states.new_empty(len(states), len(head))
    for start in range(0, len(head), WORDS):
        part = head[start : start + WORDS].float()
        torch.mm(states, part.t(), out=logits[:, start : start + WORDS])
    return logits


def _sums(probabilities: Tensor, head: Tensor) -> Tensor:
    """Return each row's sum of the head's rows, weighted by the probabilities, shape (m, width)."""
    total = probabilities.new_zeros(len(probabilities), head.shape[1])
    for start in range(0, len(head), WORDS):
        total.addmm_(probabilities[:, start : start + WORDS], head[start : start + WORDS].float())
    return total


def multiplies_bfloat16(head: Tensor) -> bool:
    """Return whether the weight is bfloat16, and lies on a processor that multiplies such numbers, twice as fast as float32."""
    here = head.dtype is torch.bfloat16 and head.device.type == "cpu"
    return here and torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]


def _bfloat16_products(states: Tensor, head: Tensor) -> Tensor:
    """Return the logits, shape (m, words), float32, each summed in float32 and rounded to bfloat16."""
    return (states.bfloat16() @ head.t()).float()


def _bfloat16_sums(probabilities: Tensor, head: Tensor) -> Tensor:
    """Return what `_sums` returns, from probabilities that are rounded to bfloat16."""
    return (probabilities.bfloat16() @ head).float()
