"""GGUF files of tiny models, as llama.cpp's converter writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, folder: Path, kind: str = "F16", **entries: Any) -> Path:
    """Write the Llama of a folder as a GGUF file, matrices in a format, and return its path.

    Args:
      path: file to write.
      folder: of Hugging Face, with tokenizer.json.
      kind: format of the matrices, of GGMLQuantizationType.
      entries: metadata in the stead of that of the model: architecture, model, pre or scaling.
    """
    model = LlamaForCausalLM.from_pretrained(folder)
    config: Any = model.config
    writer = GGUFWriter(path, entries.get("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if scaling := entries.get("scaling"):
        writer.add_string("llama.rope.scaling.type", scaling)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    control = {each["content"] for each in tokenizer["added_tokens"]}
    writer.add_tokenizer_model(entries.get("model", "gpt2"))
    writer.add_tokenizer_pre(entries.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    for name, value in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _add(writer, config, name.removesuffix(".weight"), value.numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, config: Any, name: str, value: NDArray[np.float32], kind: str) -> None:
    """Add a weight; a vector is float32."""
    if name.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
        rows, columns = value.shape  # turned as by LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
        value = value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    if name in NAMES:
        new = NAMES[name]
    else:
        _, _, layer, part = name.split(".", 3)
        new = f"blk.{layer}.{NAMES[part]}"
    form = GGMLQuantizationType["F32" if value.ndim == 1 else kind]
    writer.add_tensor(f"{new}.weight", quantize(value, form), raw_dtype=form)
