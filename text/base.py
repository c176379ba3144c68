"""Base of a task of texts: a pretrained language model that stays as it is, from a folder of Hugging Face or a GGUF file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from ..base.refusal import Refusal

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
BLOCK = 1 << 20  # bytes of a file that are hashed at a time


@dataclass(frozen=True)
class Base:
    """Pretrained causal language model in a folder of Hugging Face.

    Attributes:
      folder: with config.json, model.safetensors and tokenizer.json.
    """

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's configuration."""
        return json.loads((self.folder / CONFIG).read_bytes())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return Tokenizer.from_file(str(self.folder / TOKENIZER))

    @cached_property
    def end(self) -> int:
        """The token that ends a text."""
        end = self.config.get("eos_token_id")
        return int(end[0] if isinstance(end, list) else end or 0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of configuration, weights and tokenizer, in hexadecimal; equal at all clients of a run."""
        digest = hashlib.sha256()
        for name in (CONFIG, WEIGHTS, TOKENIZER):
            with (self.folder / name).open("rb") as file:
                digest.update(name.encode())
                while block := file.read(BLOCK):
                    digest.update(block)
        return digest.hexdigest()

    def model(self, bits: int) -> nn.Module:
        """Return the frozen model in evaluation mode, which this process loads once; `bits` of a weight, 16 or 32."""
        return _loaded(self.folder, bits)


@lru_cache(maxsize=2)
def _loaded(folder: Path, bits: int) -> nn.Module:
    """Return the frozen model of a folder."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if bits == 16 else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=dtype
    )
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def open_base(path: str) -> Base:
    """Return the base in a folder; refuse a folder without its files."""
    folder = Path(path).expanduser()
    missing = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        remedy = f"has no {', '.join(missing)}; name a folder of Hugging Face, or a GGUF file"
        raise Refusal("task.base", path, remedy)
    return Base(folder.resolve())
