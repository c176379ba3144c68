"""Loader of a frozen language model from a folder of Hugging Face, with weights of 32, 16, 8 or 4 bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..base.refusal import Refusal
from .llama import Llama, is_plain, sizes
from .packed import BITS, BLOCK, PackedLinear, pack

CONFIG = "config.json"
WEIGHTS = "model*.safetensors"  # one file, or its parts
PACKED = "packed.safetensors"  # blocks of the linear layers that a GGUF file has packed, by the names of their weights
TYPES = {32: torch.float32, 16: torch.bfloat16, 8: torch.bfloat16, 4: torch.bfloat16}
MAPPED = 1 << 26  # bytes of a file that may be in memory while weights are converted
COPY = "copy the model again"


@lru_cache(maxsize=2)
def load_model(folder: Path, bits: int) -> nn.Module:
    """Return the frozen model of a folder in evaluation mode; a process loads it once.

    Args:
      folder: of Hugging Face.
      bits: of a weight: 32, 16, 8 or 4.

    Raises:
      Refusal: the weights are damaged, or a layer cannot be packed.
    """
    config = read_json(folder / CONFIG)
    try:
        if is_plain(config):
            model: nn.Module = _llama(folder, config, bits)
        else:
            model = _of_transformers(folder, bits)
    except (SafetensorError, RuntimeError, OSError, ValueError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise Refusal("task.base", str(folder), f"cannot be loaded ({reason}); {COPY}") from error
    return model.eval().requires_grad_(False)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model; raise Refusal if there is none."""
    try:
        content: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Refusal("task.base", str(path), f"cannot be read as JSON; {COPY}") from error
    if not isinstance(content, dict):
        raise Refusal("task.base", str(path), f"is no object of JSON; {COPY}")
    return content


def _llama(folder: Path, config: Mapping[str, Any], bits: int) -> Llama:
    """Return the Llama of a folder; float weights that the folder also has packed in these bits are not read."""
    with torch.device("meta"):
        model = Llama(sizes(config))
    layers = _layers_to_pack(model, bits)
    packed = {
        name: blocks
        for name, blocks in _tensors(folder, PACKED)
        if name in layers and BITS[blocks.shape[-1]] == bits
    }
    floats: dict[str, Tensor] = {}
    for name, tensor in _tensors(folder, WEIGHTS):
        if name in layers.keys() - packed.keys():
            packed[name] = _blocks(name, tensor, bits)
        elif name not in layers:
            floats[name] = tensor.to(TYPES[bits])
    for name, blocks in packed.items():
        _replace(model, layers[name], blocks)
    model.load_state_dict(floats, strict=False, assign=True)
    model.tie_weights()
    missing = sorted(name for name, value in model.named_parameters() if value.is_meta)
    if missing:
        raise Refusal("task.base", str(folder), f"has no weights {', '.join(missing[:3])}; {COPY}")
    return model


def _of_transformers(folder: Path, bits: int) -> nn.Module:
    """Return the model of an architecture that only transformers computes; it is whole in memory before it is packed."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=TYPES[bits]
    )
    model.config.use_cache = False
    for name, layer in _layers_to_pack(model, bits).items():
        _replace(model, layer, _blocks(name, model.get_parameter(name).detach(), bits))
    return model


def _layers_to_pack(model: Any, bits: int) -> dict[str, str]:
    """Return the names of the linear layers to pack, all but the head, by the names of their weights; refuse if none."""
    if bits not in BITS.values():
        return {}
    head = model.get_output_embeddings()
    linear = [
        name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head
    ]
    if not linear:
        raise Refusal("task.base_bits", bits, "the model has no linear layer; choose 16")
    return {f"{name}.weight": name for name in linear}


def _blocks(name: str, weight: Tensor, bits: int) -> Tensor:
    """Return a packed weight; refuse a width that is no whole number of blocks."""
    if weight.shape[1] % BLOCK:
        remedy = f"{name} has {weight.shape[1]} inputs, which is not a multiple of {BLOCK}; choose 16"
        raise Refusal("task.base_bits", bits, remedy)
    return pack(weight, bits)


def _replace(model: nn.Module, name: str, blocks: Tensor) -> None:
    """Replace a linear layer of the model by one with a packed weight; the bias stays."""
    parent, _, child = name.rpartition(".")
    bias = model.get_submodule(name).state_dict().get("bias", torch.zeros(()))
    setattr(model.get_submodule(parent), child, PackedLinear(blocks, bias))


def _tensors(folder: Path, pattern: str) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of safetensors files, which are mapped into memory.

    A file is mapped anew after each MAPPED bytes: what was read of it then counts no longer, unless a tensor needs it.
    """
    for path in sorted(folder.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            names: list[str] = sorted(file.keys())
        while names:
            size = 0
            with safe_open(path, framework="pt") as file:
                while names and size < MAPPED:
                    name = names.pop()
                    tensor = file.get_tensor(name)
                    size += tensor.nbytes
                    yield name, tensor
