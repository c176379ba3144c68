"""Model of texts: a frozen decoder with adapters that train, from tokens or from the outputs of its first layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .loss import IGNORED, scores


class Skipped(nn.Module):
    """Layer of a decoder that returns its inputs."""

    def forward(self, states: Tensor, *args: Any, **options: Any) -> Tensor:
        return states


class TextModel(nn.Module):
    """Causal language model with adapters.

    Inputs are one of
    - tokens, int64, shape (n, tokens), padded on the right with the end token;
    - outputs of the first frozen layers, floating, shape (n, tokens, width), padded with zeros;
    - tokens and their targets, int64, shape (n, 2, tokens).

    Outputs are hidden states after the final norm, shape (n, tokens, width), float32. For tokens with targets they are
    nats and number of tokens, shape (n, 2); with classes always the scores of the classes, shape (n, classes).

    No mask is needed: attention is causal, so that padding on the right changes nothing before it.

    Attributes:
      decoder: frozen, with adapters.
      words: frozen layer from hidden states to the vocabulary.
      head: trained layer from the last token's `features` to classes, without a bias, as transformers has it; an identity
        without classes.
      axis: unit vector, shape (width,), of the mean of texts' last hidden states; zeros before `balance`.
      along, across: factors of a hidden state's parts along the axis and across it.
    """

    def __init__(self, decoder: Any, words: nn.Module, first: int, end: int, classes: int = 0) -> None:
        super().__init__()
        self.decoder, self.words, self.end, self.classes = decoder, words, end, classes
        self.head = nn.Identity()
        self.axis, self.along, self.across = torch.zeros(words.get_parameter("weight").shape[1]), 1.0, 1.0
        if classes:
            width = words.get_parameter("weight").shape[1]
            with torch.random.fork_rng(devices=[]):  # the values are set below
                self.head = nn.Linear(width, classes, bias=False)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        # The same modules without the first layers; in a tuple, so that they do not count twice.
        self.last_layers = (part_of(decoder, first, len(decoder.layers)),)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 3 and not inputs.is_floating_point():
            states = self.states(inputs[:, 0])
            each = scores(states, self.words.get_parameter("weight"), inputs[:, 1])
            return torch.stack([each.nats, each.tokens.to(each.nats.dtype)], 1)
        states = self.states(inputs)
        if self.classes:
            last = states[torch.arange(len(states), device=states.device), self.last(inputs)]
            return self.head(self.features(last))
        return states

    def features(self, states: Tensor) -> Tensor:
        """Return a fixed linear map of hidden states whose parts along the axis and across it are about one long.

        The last hidden states of all texts are nearly the same vector. Unbalanced, the layer to classes would learn little
        but its offset. The map is symmetric: a weight of the head times it is the weight of a layer from hidden states.

        Args:
          states: shape (n, width).
        """
        axis = self.axis.to(states.device)
        part = (states @ axis)[:, None] * axis
        return self.along * part + self.across * (states - part)

    def balance(self, states: Tensor) -> None:
        """Set `features` by the last hidden states of some public texts, shape (texts, width)."""
        mean = states.mean(0)
        self.axis, self.along = mean / mean.norm(), 1 / float(mean.norm())
        part = (states @ self.axis)[:, None] * self.axis
        self.across = 1 / float((states - part).norm(dim=1).mean())

    def states(self, inputs: Tensor) -> Tensor:
        """Return hidden states after the final norm, shape (n, tokens, width), float32."""
        if not len(inputs):  # attention of transformers takes no empty batch
            width = self.words.get_parameter("weight").shape[1]
            return torch.zeros(0, inputs.shape[1], width, device=inputs.device)
        if inputs.is_floating_point():
            states = inputs.to(self.words.get_parameter("weight").dtype)
            return self.last_layers[0](inputs_embeds=states, use_cache=False).last_hidden_state.float()
        return self.decoder(input_ids=inputs, use_cache=False).last_hidden_state.float()

    def last(self, inputs: Tensor) -> Tensor:
        """Return the position of each text's last token before its padding, shape (n,)."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        if inputs.is_floating_point():
            return ((inputs != 0).any(-1) * positions).amax(1)
        # The first end token belongs to the text.
        return ((inputs != self.end) * positions).amax(1).add(1).clamp(max=len(positions) - 1)


def part_of(decoder: Any, first: int, last: int) -> Any:
    """Return a decoder of the same modules that skips its other layers, and the final norm unless the last one is there.

    Args:
      decoder: has `layers` and `norm`.
      first: number of the first layer that is not skipped.
      last: number after that of the last one.
    """
    part = copy.copy(decoder)
    part._modules = dict(decoder._modules)  # pyright: ignore[reportPrivateUsage]
    before, after = ([Skipped() for _ in each] for each in (decoder.layers[:first], decoder.layers[last:]))
    part.layers = nn.ModuleList([*before, *decoder.layers[first:last], *after])
    if last < len(decoder.layers):
        part.norm = nn.Identity()
    return part


def shared_copy(model: Any) -> Any:
    """Return a copy of a model whose frozen parameters and buffers lie in the memory of the model's own.

    They are tensors of their own, so that a copy that moves to another device leaves the model where it is.
    """
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    memo: dict[int, Tensor] = {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in frozen}
    return copy.deepcopy(model, memo | {id(each): each.detach() for each in model.buffers()})


def targets_of(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the next token of each token, shape (n, tokens), IGNORED at the last one and in the padding.

    Args:
      tokens: shape (n, tokens), int64.
      lengths: number of each text's tokens without padding, shape (n,).
    """
    following = tokens.roll(-1, 1)
    positions = torch.arange(tokens.shape[1])
    return following.masked_fill(positions >= lengths[:, None] - 1, IGNORED)
