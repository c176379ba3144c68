"""A tokenizer from a GGUF file's vocabulary cuts and merges as one that the tokenizers library builds from the same merges."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from fedveil.text.gguf_tokenizer import UnsupportedError, special_ids, tokenizer_config, tokenizer_json

MERGES = ["t h", "th e", "Ġ the", "4 2", "Ġ Ġ", "Ċ Ċ", "Ġ 4"]
SPECIAL = ["<end>", "<user>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
FIELDS: dict[str, Any] = {
    "llama.context_length": 64,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 4] + [1] * (len(TOKENS) - 2),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
}
CUTS: dict[str, Any] = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
}
TEXTS = ("the 42 42the", "  4\n\n  42", "Grüße 日本 🙂 ４２ ²³ e\u0301", "isn't\tTHE \r\n", "")


def built(**entries: Any) -> Tokenizer:
    fields = {**FIELDS, **{f"tokenizer.ggml.{name}": value for name, value in entries.items()}}
    return Tokenizer.from_str(json.dumps(tokenizer_json(fields)))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_a_text_has_the_tokens_of_the_library(pre: str) -> None:
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    reference = Tokenizer(BPE(vocabulary, [(first, second) for first, second in map(str.split, MERGES)]))
    reference.pre_tokenizer = CUTS[pre]
    tokenizer = built(pre=pre)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(" 42").tokens == {"gpt-2": ["Ġ", "42"], "smollm": ["Ġ", "4", "2"]}[pre]


def test_special_tokens_are_whole_and_hidden() -> None:
    tokenizer = built()
    encoded = tokenizer.encode("the<end> <user>the")
    assert encoded.tokens == ["the", "<end>", "Ġ", "<user>", "the"]
    assert tokenizer.decode(encoded.ids) == "the <user>the"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "the<end> <user>the"


def test_a_model_trained_with_a_first_token_has_it() -> None:
    assert built(add_bos_token=True).encode("the").tokens == ["<end>", "the"]
    assert built(add_bos_token=True).encode("the", "the").tokens == ["<end>", "the", "the"]


@pytest.mark.parametrize(("model", "pre"), [("llama", "default"), ("gpt2", "qwen2"), ("bert", "gpt-2")])
def test_another_tokenizer_is_refused(model: str, pre: str) -> None:
    with pytest.raises(
        UnsupportedError, match=f"its tokenizer is {model}, {pre}, and fedveil reads gpt2 with "
    ):
        built(model=model, pre=pre)


def test_special_tokens_are_in_the_configurations() -> None:
    assert special_ids({**FIELDS, "tokenizer.ggml.padding_token_id": 1}) == {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    config = tokenizer_config({**FIELDS, "tokenizer.chat_template": "{{ text }}"})
    assert config["eos_token"] == "<end>"
    assert config["chat_template"] == "{{ text }}"
    assert config["model_max_length"] == 64
    assert "chat_template" not in tokenizer_config(FIELDS)
