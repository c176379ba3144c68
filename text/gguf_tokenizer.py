"""Tokenizer of a GGUF file, as the tokenizer.json of Hugging Face: byte-level BPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER = 1, 2, 3, 4  # kinds of tokens, of llama.h
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# How a text is cut before merges, by llama.cpp's names: the expression of GPT-2, which ByteLevel has, or digits first.
_CUTS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTES,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES],
    },
}
_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}


class UnsupportedError(Exception):
    """A whole GGUF file of a kind that is not converted."""


def tokenizer_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of tokenizer.json.

    Args:
      fields: metadata of the GGUF file.

    Raises:
      KeyError: the file lacks an entry.
      UnsupportedError: the vocabulary is not byte-level BPE, or it is cut in a way that has no entry here.
    """
    kind, cut = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in _CUTS:
        raise UnsupportedError(
            f"its tokenizer is {kind}, {cut}, and fedveil reads gpt2 with {' or '.join(_CUTS)}"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(index, token, special=kind != USER)
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (UNKNOWN, CONTROL, USER)
        ],
        "normalizer": None,
        "pre_tokenizer": _CUTS[cut],
        "post_processor": _beginning(fields, tokens),
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _added(index: int, token: str, *, special: bool) -> dict[str, Any]:
    """Return the entry of a token that is found in a text before merges."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **flags, "special": special}


def _beginning(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """Return the processor that puts a token before each text, if the model was trained so."""
    if not fields.get("tokenizer.ggml.add_bos_token", False):
        return None
    index = fields["tokenizer.ggml.bos_token_id"]
    first = {"SpecialToken": {"id": tokens[index], "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]}},
    }


def special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    """Return the special tokens of the model, such as eos_token_id, for its configuration."""
    ids = {f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL.items()}
    return {name: index for name, index in ids.items() if isinstance(index, int) and name != "unk_token_id"}


def tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of tokenizer_config.json: special tokens, and how a chat is written."""
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {f"{name}_token": fields.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL.items()}
    template = {"chat_template": fields.get("tokenizer.chat_template", "")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        **{name: tokens[index] for name, index in ids.items() if isinstance(index, int)},
        **{name: text for name, text in template.items() if text},
    }
