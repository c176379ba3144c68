"""Transformers task: a Hugging Face model trained by its own loss, with or without PEFT adapters."""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ...base.refusal import Refusal
from ..arrays import copy_with_base
from ..data import Data, as_data, run_on, with_targets
from . import made_once

IGNORED = -100  # label of a token that has no loss
NATS, TOKENS = "nats", "tokens"  # metrics: an example's loss summed over its tokens, and their number
MOST_NATS = 700.0  # loss of a token above which the perplexity exceeds double precision


class TransformersTask:
    """Task from a Hugging Face model.

    The labels are in the batch, and the loss is the model's own. For token labels it is the mean over examples of the
    mean over each example's tokens, so that an example's weight does not depend on the length of others. Frozen
    parameters, such as all but PEFT's adapters, are not sent.

    Args:
      model: returns the model.
      clients: the data of each client, in any form that `Task.client_data` may return: dictionaries of the model's
        inputs and the labels.
      held_out: data on which the model is evaluated.
      metrics: function of logits and labels that returns means over the examples, by name; None for `accuracy`, of
        classes or of an example's tokens, and with token labels the `perplexity` of all tokens.
      simulated: whether the data are public or synthetic.

    Raises:
      Refusal: the model has no loss, or no trainable parameter.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        clients: Sequence[Any],
        held_out: Any,
        *,
        metrics: Callable[[Tensor, Tensor], dict[str, float]] | None = None,
        simulated: bool = False,
    ) -> None:
        self.simulated, self.num_clients = simulated, len(clients)
        self._model: Any = made_once(model)
        self._clients, self._held_out = clients, held_out
        self._metrics = metrics or _default_metrics
        self._shift = _predicts_next(self._model)  # whether the label of a token's logits is the next token
        self.name = type(_base_of(self._model)).__name__
        if hasattr(self._model.config, "use_cache"):
            self._model.config.use_cache = False
        if not any(p.requires_grad for p in self._model.parameters()):
            raise Refusal("model", self.name, "every parameter is frozen; add a trainable adapter or head")
        self._check_loss()

    def _check_loss(self) -> None:
        """Refuse a model that returns no loss and logits for a batch of held-out data."""
        if not len(data := self.held_out()):
            return
        inputs, _ = data.batch(torch.arange(min(2, len(data))))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            outputs = run_on(self._model, inputs)
        if getattr(outputs, "loss", None) is None or getattr(outputs, "logits", None) is None:
            remedy = "it returns no loss and logits for inputs with labels; use a model with a head"
            raise Refusal("model", self.name, remedy)

    def model(self) -> nn.Module:
        """Return a new copy of the model, with the memory of its base."""
        return copy_with_base(self._model)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the mean over examples: the model's own loss or, with token labels, of each example's mean by token.

        Args:
          outputs: outputs of the model, with `loss` and `logits`.
          targets: the labels, shape (n,), or (n, tokens).
        """
        if not _has_token_labels(outputs, targets):
            return outputs.loss
        logits, labels = self._aligned(outputs, targets)
        losses = nn.functional.cross_entropy(
            logits.transpose(1, -1), labels, ignore_index=IGNORED, reduction="none"
        )
        return (losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)).mean()

    def metrics(self, outputs: Any, targets: Tensor) -> dict[str, float]:
        """Return the metrics of the logits and the labels that they predict, means over the examples by name.

        Args:
          outputs: outputs of the model, with `logits`.
          targets: the labels, shape (n,), or (n, tokens).
        """
        if _has_token_labels(outputs, targets):
            return self._metrics(*self._aligned(outputs, targets))
        return self._metrics(outputs.logits, targets)

    def _aligned(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the labels that they predict: the next token's of a causal model, else its own."""
        return (outputs.logits[:, :-1], labels[:, 1:]) if self._shift else (outputs.logits, labels)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return a run's metrics from their means over all held-out examples: with token labels, the perplexity."""
        metrics = dict(means)
        nats, tokens = metrics.pop(NATS, None), metrics.pop(TOKENS, None)
        if nats is not None and tokens:
            metrics["perplexity"] = math.exp(min(nats / tokens, MOST_NATS))
        return metrics

    def client_data(self, client: int) -> Data:
        """Return the data of one client, with the labels in the batch."""
        return with_targets(as_data(self._clients[client]), "labels")

    def held_out(self) -> Data:
        """Return the held-out data, with the labels in the batch."""
        return with_targets(as_data(self._held_out), "labels")


def _default_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return means over examples: accuracy and, with token labels, what `derived` needs; none for numeric labels."""
    if labels.is_floating_point():
        return {}
    labelled = (labels != IGNORED).reshape(len(labels), -1)
    correct = (logits.argmax(-1) == labels).reshape(labelled.shape) & labelled
    metrics = {"accuracy": (correct.sum(1) / labelled.sum(1).clamp(min=1)).mean().item()}
    if labels.dim() > 1:
        nats = nn.functional.cross_entropy(
            logits.transpose(1, -1), labels, ignore_index=IGNORED, reduction="sum"
        )
        metrics |= {NATS: nats.item() / len(labels), TOKENS: labelled.sum().item() / len(labels)}
    return metrics


def _base_of(model: Any) -> Any:
    """Return the model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _predicts_next(model: Any) -> bool:
    """Return whether the model's logits at a token predict the next one."""
    causal = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name = type(_base_of(model)).__name__
    is_listed_for_both = name.endswith(("ForMaskedLM", "ForConditionalGeneration"))
    return name in set(causal.values()) and not is_listed_for_both


def _has_token_labels(outputs: Any, labels: Tensor) -> bool:
    """Return whether labels are classes of tokens, shape (n, tokens), for logits of shape (n, tokens, classes)."""
    return labels.dim() == 2 and not labels.is_floating_point() and outputs.logits.dim() == 3
