"""Adapters: changes of low rank to the linear layers of a frozen decoder, zero at their start.

`lora` trains both factors (Hu et al. 2021, arXiv:2106.09685). `ffa` trains the second factor alone, since noise in both is
multiplied (Sun et al. 2024, arXiv:2403.12313). `rxr` trains a square matrix between frozen factors of the layer's weight
(Balazy et al. 2024, arXiv:2405.17604). Frozen factors follow from a public seed or from the base, so they are a part of
the base, equal at all clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.refusal import Refusal

SEED = 2403_12313  # public, of the first factors
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Factors of the change with which steps of 1.6 and a clip of 0.4 suit SmolLM2 (docs/evidence/accuracy.md#texts).
SCALES = {"ffa": 4.0, "lora": 1.0, "rxr": 0.25}


@dataclass(frozen=True)
class AdapterKeys:
    """Keys of the adapters.

    Attributes:
      name: lora, ffa or rxr.
      rank: width between the factors, at least 1.
      layers: number of the decoder's last layers that have adapters, at least 1.
      modules: names of the linear layers with adapters; empty for all of MODULES.
      scale: factor of the change, above 0.
    """

    name: str = "ffa"
    rank: int = 4
    layers: int = 1
    modules: Sequence[str] = ()
    scale: float = 4.0


class Adapter(nn.Module):
    """Frozen linear layer with a change of low rank: layer(x) + scale * up(square(down(x))), in float32.

    Attributes:
      layer: frozen.
      down: inputs to rank, without bias; trained by `lora` alone.
      square: rank to rank, without bias, trained; an identity but for `rxr`.
      up: rank to outputs, without bias; frozen by `rxr`.
    """

    def __init__(self, layer: Any, keys: AdapterKeys, seed: int) -> None:
        super().__init__()
        inputs, outputs, rank = int(layer.in_features), int(layer.out_features), keys.rank
        if rank > min(inputs, outputs):
            remedy = f"is above the smaller size of a layer of {inputs} x {outputs}; lower it"
            raise Refusal("task.adapter.rank", rank, remedy)
        self.layer, self.scale = layer, keys.scale
        self.down, self.square, self.up = _factor(inputs, rank), nn.Identity(), _factor(rank, outputs)
        with torch.no_grad():
            bound = inputs**-0.5  # as torch and PEFT draw LoRA's first factor
            generator = torch.Generator().manual_seed(seed)
            self.down.weight.uniform_(-bound, bound, generator=generator)
            self.up.weight.zero_()
            if keys.name == "rxr":
                self.square = _factor(rank, rank)
                self.square.weight.zero_()
                for factor, values in zip((self.down, self.up), factors(weight_of(layer), rank), strict=True):
                    factor.weight.copy_(values)
        self.down.requires_grad_(keys.name == "lora")
        self.up.requires_grad_(keys.name != "rxr")

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        change = self.up(self.square(self.down(inputs.float())))
        return (outputs.float() + self.scale * change).to(outputs.dtype)


def _factor(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer without bias, whose weight the caller sets; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):  # `skip_init` would import sympy: 30 MiB
        return nn.Linear(inputs, outputs, bias=False)


def weight_of(layer: Any) -> Tensor:
    """Return the weight of a linear layer, packed or not, shape (outputs, inputs), float32."""
    if hasattr(layer, "weight_in"):
        return layer.weight_in(torch.float32)
    return layer.weight.detach().float()


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of a weight's best approximation of a rank, (rank, inputs) and (outputs, rank).

    A library may turn the signs of a pair of singular vectors. Here the largest entry of each first one is positive, so
    that all clients have the same factors.

    Args:
      weight: shape (outputs, inputs), float32.
      rank: at most the smaller of both.
    """
    outer, values, inner = torch.linalg.svd(weight.double(), full_matrices=False)
    outer, inner = outer[:, :rank] * values[:rank], inner[:rank]
    signs = inner.gather(1, inner.abs().argmax(1, keepdim=True)).sign()
    return (inner * signs).float(), (outer * signs.t()).float()


def adapt(decoder: Any, keys: AdapterKeys) -> int:
    """Put adapters into a frozen decoder, in place, and return the number of its first layer that has one.

    Args:
      decoder: has `layers`, a list of modules.
      keys: which layers, and how.

    Raises:
      Refusal: there are fewer layers, or no such modules in them.
    """
    total = len(decoder.layers)
    if keys.layers > total:
        raise Refusal("task.adapter.layers", keys.layers, f"the model has {total} layers; use fewer")
    names = keys.modules or MODULES
    number = 0
    for layer in decoder.layers[total - keys.layers :]:
        linear = {path.rpartition(".")[2]: path for path in _linear(layer)}
        if missing := sorted(set(keys.modules) - set(linear)):
            remedy = f"are no linear layers of this model, which has {', '.join(sorted(linear))}"
            raise Refusal("task.adapter.modules", missing, remedy)
        for path in (linear[name] for name in names if name in linear):
            parent = layer.get_submodule(path.rpartition(".")[0])
            adapter = Adapter(layer.get_submodule(path), keys, SEED + number)
            setattr(parent, path.rpartition(".")[2], adapter)
            number += 1
    if not number:
        remedy = f"no linear layer of this model has such a name; it needs one of {', '.join(MODULES)}"
        raise Refusal("task.adapter.modules", list(names), remedy)
    return total - keys.layers


def _linear(layer: nn.Module) -> list[str]:
    """Return the paths of the linear layers inside a decoder's layer, packed ones among them."""
    return [path for path, each in layer.named_modules() if hasattr(each, "in_features")]
