"""GGUF files of llama.cpp as folders of Hugging Face: unpacked once, into the cache of the machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..base.cache import cache_folder
from ..base.durable_files import Content, replace_files, sync_folder
from ..base.refusal import Refusal, refusing
from ..base.tensor_file import safetensors_parts
from .gguf_tokenizer import UnsupportedError, special_ids, tokenizer_config, tokenizer_json
from .llama import ROTARY_BASE
from .packed import FORMATS

VERSION = 1  # of what this module writes; a change of a byte needs another
MAGIC = b"GGUF"
LLAMA = "llama"
FOLDER = "give the model as a folder of Hugging Face"
Array = NDArray[np.generic]
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Rows of queries and keys, in which llama.cpp has the two halves of a rotary pair side by side.
TURNED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does."""
    with (
        refusing("task.base", path, "cannot be read; name a file that this user may read"),
        path.open("rb") as file,
    ):
        return file.read(len(MAGIC)) == MAGIC


def unpacked(path: Path) -> Path:
    """Return the folder of Hugging Face of a GGUF file.

    It is named by the file's SHA-256 and made at first use, beside its final name and then renamed, so that a folder
    in the cache is whole.

    Raises:
      Refusal: the file is damaged, its architecture is not llama, or the cache cannot be written.
    """
    with path.open("rb") as file:
        name = f"{hashlib.file_digest(file, 'sha256').hexdigest()}-{VERSION}"
    folder = cache_folder() / "bases" / name
    if folder.is_dir():
        return folder
    files = _files(path)
    remedy = "the cache cannot be written; set XDG_CACHE_HOME to a folder with room"
    with refusing("task.base", path, remedy):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(mkdtemp(prefix=".unfinished-", dir=folder.parent))
        try:
            replace_files(unfinished, files)
            _rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _rename(unfinished: Path, folder: Path) -> None:
    """Give a folder its final name, unless another process was faster."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    sync_folder(folder.parent)


def _files(path: Path) -> dict[str, Content]:
    """Return the content of the files of a folder, by name; refuse a file that cannot be converted."""
    from gguf import GGUFReader

    try:
        reader: Any = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        architecture = fields["general.architecture"]
        if architecture != LLAMA:
            raise UnsupportedError(f"its architecture is {architecture}, and fedveil reads {LLAMA}")
        config = _config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
        weights, packed = _weights(reader.tensors, config)
        tokenizer = tokenizer_json(fields)
        Tokenizer.from_str(json.dumps(tokenizer))
    except UnsupportedError as error:
        raise Refusal("task.base", str(path), f"cannot be converted: {error}; {FOLDER}") from error
    except Exception as error:  # of gguf and tokenizers: a key, an index, a size, a type, a merge
        reason = f"is damaged ({type(error).__name__}: {error})"
        raise Refusal("task.base", str(path), f"{reason}; copy it again, or {FOLDER}") from error
    return {
        "config.json": _text(config),
        "generation_config.json": _text(special_ids(fields)),
        "tokenizer.json": _text(tokenizer),
        "tokenizer_config.json": _text(tokenizer_config(fields)),
        "model.safetensors": safetensors_parts(weights, {"format": "pt"}),
        "packed.safetensors": safetensors_parts(packed, {"format": "pt"}),
    }


def _text(content: Mapping[str, Any]) -> bytes:
    """Return JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def _config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return the configuration of the model, as transformers names its entries; refuse scaled positions."""
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head = fields.get("llama.attention.key_length", width // heads)
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise UnsupportedError("its rotary positions are scaled")
    if fields.get("llama.rope.dimension_count", head) != head:
        raise UnsupportedError("its rotary positions turn a part of each head only")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _short(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _short(fields.get("llama.rope.freq_base", ROTARY_BASE)),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "dtype": "float16",
        **special_ids(fields),
    }


def _short(number: float) -> float:
    """Return the shortest decimal number that rounds to the same float32."""
    return float(str(np.float32(number)))


def _weights(tensors: Any, config: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return weights in float16, and the blocks of those linear layers that the file has packed, by weights' names."""
    from gguf.quants import dequantize

    weights: dict[str, Array] = {}
    packed: dict[str, Array] = {}
    for tensor in tensors:
        name, part = _name(tensor.name)
        data = tensor.data
        if part in TURNED:
            data = data[_order(len(data), config[TURNED[part]])]
        with np.errstate(over="ignore"):
            weights[name] = dequantize(data, tensor.tensor_type).astype(np.float16)
        if not np.isfinite(weights[name]).all():
            raise UnsupportedError(f"{tensor.name} has values beyond float16")
        if part in LAYER and tensor.tensor_type.name in FORMATS:
            packed[name] = data.reshape(len(data), -1, FORMATS[tensor.tensor_type.name])
    expected = {
        f"{OUTER[part]}.weight" for part in OUTER if part != "output" or not config["tie_word_embeddings"]
    }
    for layer in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{layer}.{part}.weight" for part in LAYER.values()}
    if missing := sorted(expected - weights.keys()):
        raise UnsupportedError(f"it lacks {missing[0]}")
    return weights, packed


def _name(name: str) -> tuple[str, str]:
    """Return a tensor's name in transformers, and its part of the model in llama.cpp."""
    match name.split("."):
        case [part, "weight"] if part in OUTER:
            return f"{OUTER[part]}.weight", part
        case ["blk", layer, part, "weight"] if part in LAYER:
            return f"model.layers.{layer}.{LAYER[part]}.weight", part
        case _:
            raise UnsupportedError(f"its tensor {name} is not of a plain Llama")


def _order(rows: int, heads: int) -> NDArray[np.int64]:
    """Return where the rows of queries or keys of transformers are in llama.cpp's."""
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
