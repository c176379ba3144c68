"""Decoder of the Llama family, with the parameter names of transformers, whose import alone takes 150 MiB and 2.4 seconds.

It computes what `transformers.LlamaForCausalLM` computes without padding on the left. With a cache, the tokens after the
first call come one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

# Keys and values of the tokens before, of one layer, shape (n, groups, tokens, head); empty before the first.
Past = list[Tensor]
ROTARY_BASE = 10_000.0  # of a configuration without one, as in transformers


@dataclass(frozen=True)
class LlamaSizes:
    """Sizes and constants of a Llama.

    Attributes:
      vocabulary: tokens.
      width: of a hidden state.
      inner: width inside a layer's perceptron.
      layers: number of layers.
      heads: attention heads of the queries.
      groups: attention heads of keys and values; divides `heads`.
      head: width of a head, even.
      epsilon: added to the mean square in a norm.
      rotary: base of the rotary positions.
      tied: whether the head's weight is that of the embedding.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    groups: int
    head: int
    epsilon: float
    rotary: float
    tied: bool


def sizes(config: Mapping[str, Any]) -> LlamaSizes:
    """Return the sizes in a configuration of transformers."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return LlamaSizes(
        vocabulary=config["vocab_size"],
        width=width,
        inner=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head=config.get("head_dim") or width // heads,
        epsilon=config.get("rms_norm_eps", 1e-6),
        rotary=_rotary(config).get("rope_theta", config.get("rope_theta", ROTARY_BASE)),
        tied=config.get("tie_word_embeddings", False),
    )


def _rotary(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the entries about rotary positions: `rope_parameters`, or `rope_scaling` before transformers 5."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def is_plain(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration is a Llama without scaled positions, biases or another activation."""
    rotary = _rotary(config)
    return (
        config.get("model_type") == "llama"
        and config.get("hidden_act", "silu") == "silu"
        and rotary.get("rope_type", rotary.get("type", "default")) == "default"
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
    )


@dataclass
class States:
    """Outputs of the decoder, named as in transformers, and open to hooks too.

    Attributes:
      last_hidden_state: after the final norm, shape (n, tokens, width).
      past_key_values: of each layer, with which the decoder goes on; empty without a cache.
    """

    last_hidden_state: Tensor
    past_key_values: Sequence[Past] = ()


@dataclass
class Logits:
    """Logits of the next token, shape (n, tokens, vocabulary); named as in transformers, and open to hooks too."""

    logits: Tensor


class Linear(nn.Linear):
    """Linear layer without bias, whose weight is loaded and not drawn: to draw on the meta device imports 76 MiB."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class Norm(nn.Module):
    """Division by the root of the mean square, in float32, then a weight for each coordinate."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, states: Tensor) -> Tensor:
        """Return the normalised states."""
        wide = states.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * scaled.to(states.dtype)


class Rotary(nn.Module):
    """Cosines and sines of the rotary positions; it has no tensor, so that no copy of the model differs."""

    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.head, self.base = sizes.head, sizes.rotary

    def forward(self, states: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each of shape (tokens, head) and of the states' type.

        Args:
          states: shape (n, tokens, width).
          start: position of their first token.
        """
        end = start + states.shape[1]
        positions = torch.arange(start, end, dtype=torch.float32, device=states.device)
        powers = torch.arange(0, self.head, 2, dtype=torch.float32, device=states.device) / self.head
        angles = torch.outer(positions, 1.0 / self.base**powers).repeat(1, 2)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)


def _rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return queries or keys, shape (n, heads, tokens, head), turned by the angles of their positions."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat((-second, first), dim=-1) * sines


class Attention(nn.Module):
    """Causal attention in which groups of queries share keys and values."""

    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.heads, self.groups, self.head = sizes.heads, sizes.groups, sizes.head
        queries, keys = sizes.heads * sizes.head, sizes.groups * sizes.head
        self.q_proj = Linear(sizes.width, queries)
        self.k_proj = Linear(sizes.width, keys)
        self.v_proj = Linear(sizes.width, keys)
        self.o_proj = Linear(queries, sizes.width)

    def forward(self, states: Tensor, cosines: Tensor, sines: Tensor, past: Past) -> Tensor:
        """Return the attention's output, shape of `states`, and add their keys and values to the past.

        Args:
          states: shape (n, tokens, width); one token if there is a past.
          cosines: shape (tokens, head).
          sines: likewise.
          past: of this layer, changed in place.
        """
        queries = _rotate(self._split(self.q_proj(states), self.heads), cosines, sines)
        keys = _rotate(self._split(self.k_proj(states), self.groups), cosines, sines)
        values = self._split(self.v_proj(states), self.groups)
        if past:
            keys, values = (torch.cat(each, dim=2) for each in zip(past, (keys, values), strict=True))
        past[:] = keys, values
        is_first = keys.shape[2] == queries.shape[2]
        repeats = self.heads // self.groups
        keys, values = (each.repeat_interleave(repeats, dim=1) for each in (keys, values))
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=is_first)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, states: Tensor, heads: int) -> Tensor:
        """Return states, shape (n, tokens, heads x head), as shape (n, heads, tokens, head); n may be 0."""
        return states.unflatten(-1, (heads, self.head)).transpose(1, 2)


class Perceptron(nn.Module):
    """Gated perceptron of a layer."""

    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.gate_proj = Linear(sizes.width, sizes.inner)
        self.up_proj = Linear(sizes.width, sizes.inner)
        self.down_proj = Linear(sizes.inner, sizes.width)

    def forward(self, states: Tensor) -> Tensor:
        """Return the perceptron's output, shape of `states`."""
        return self.down_proj(silu(self.gate_proj(states)) * self.up_proj(states))


class DecoderLayer(nn.Module):
    """Layer of the decoder: attention, then a perceptron, each added to its input."""

    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.self_attn = Attention(sizes)
        self.mlp = Perceptron(sizes)
        self.input_layernorm = Norm(sizes.width, sizes.epsilon)
        self.post_attention_layernorm = Norm(sizes.width, sizes.epsilon)

    def forward(self, states: Tensor, cosines: Tensor, sines: Tensor, past: Past) -> Tensor:
        """Return the layer's output, shape of `states`; arguments as of `Attention.forward`."""
        states = states + self.self_attn(self.input_layernorm(states), cosines, sines, past)
        return states + self.mlp(self.post_attention_layernorm(states))


class Decoder(nn.Module):
    """Embedding, layers and final norm; `layers` may be cut, and `norm` replaced by `nn.Identity()`."""

    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(sizes.vocabulary, sizes.width))
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(sizes.layers))
        self.norm = Norm(sizes.width, sizes.epsilon)
        self.rotary_emb = Rotary(sizes)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        past_key_values: Sequence[Past] = (),
    ) -> States:
        """Return the hidden states of texts.

        Args:
          input_ids: tokens, int64, shape (n, tokens); padding on the right, which changes nothing before it.
          inputs_embeds: in their stead what enters the first layer, shape (n, tokens, width).
          use_cache: whether to return the past of each layer.
          past_key_values: of an earlier call with a cache, after which one token comes; changed in place.
        """
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        angles = self.rotary_emb(states, sum(past[0].shape[2] for past in past_key_values[:1]))
        pasts: list[Past] = []
        for number, layer in enumerate(self.layers):
            past = next(iter(past_key_values[number:]), [])
            states = layer(states, *angles, past)
            pasts += [past] * use_cache
        return States(self.norm(states), pasts)


class Llama(nn.Module):
    """Causal language model: a decoder and a head.

    Attributes:
      model: the decoder.
      lm_head: linear layer from a hidden state to the logits, without bias.
    """

    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.model = Decoder(sizes)
        self.lm_head = Linear(sizes.width, sizes.vocabulary)
        self.tied = sizes.tied
        self.tie_weights()

    def tie_weights(self) -> None:
        """Give the head the embedding's weight, if the configuration says so."""
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of tokens."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.lm_head

    def get_decoder(self) -> Decoder:
        """Return the model without its head."""
        return self.model

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, use_cache: bool = False
    ) -> Logits:
        """Return the logits of the next token; arguments as of `Decoder.forward`."""
        return Logits(self.lm_head(self.model(input_ids, inputs_embeds, use_cache).last_hidden_state))
