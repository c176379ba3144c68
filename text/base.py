"""Base of a task of texts: a pretrained language model that stays as it is, from a folder of Hugging Face or a GGUF file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import nn

from ..base.refusal import Refusal
from .gguf import is_gguf, unpacked
from .loading import CONFIG, PACKED, WEIGHTS, load_model, read_json

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Base:
    """Pretrained causal language model in a folder of Hugging Face.

    Attributes:
      folder: with config.json, model.safetensors or its parts, and tokenizer.json; packed.safetensors from a GGUF file.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's configuration."""
        return read_json(self.folder / CONFIG)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return Tokenizer.from_file(str(self.folder / TOKENIZER))

    @cached_property
    def end(self) -> int:
        """The token that ends a text."""
        end = self.config.get("eos_token_id") or 0
        return int(np.ravel(end)[0])  # a list may name several, the first being that of a text

    @cached_property
    def digest(self) -> str:
        """SHA-256 of configuration, tokenizer and weights, in hexadecimal; equal at all clients of a run."""
        return _digest(self.folder)

    def model(self, bits: int) -> nn.Module:
        """Return the frozen model in evaluation mode, which this process loads once.

        Args:
          bits: of a weight: 32, 16 (bfloat16), or 8 or 4: the decoder's linear layers are then packed, all else is in
            bfloat16.

        Raises:
          Refusal: a layer cannot be packed.
        """
        return load_model(self.folder, bits)


def open_base(path: str) -> Base:
    """Return the base in a folder or a GGUF file, which is unpacked once into the cache.

    Raises:
      Refusal: the folder lacks a file, or the GGUF file is damaged or of another architecture.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        if not is_gguf(folder):
            raise Refusal("task.base", path, "is no GGUF file; name a folder of Hugging Face, or a GGUF file")
        folder = unpacked(folder)
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not any(folder.glob(name))]
    if missing:
        remedy = f"has no {', '.join(missing)}; name a folder of Hugging Face, or a GGUF file"
        raise Refusal("task.base", path, remedy)
    return Base(folder.resolve())


@lru_cache(maxsize=8)
def _digest(folder: Path) -> str:
    """Return the SHA-256 of the files of a base; a process computes it once."""
    digest = hashlib.sha256()
    for pattern in (CONFIG, TOKENIZER, WEIGHTS, PACKED):
        for path in sorted(folder.glob(pattern)):
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
