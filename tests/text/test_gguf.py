"""GGUF files become the models that they were written from; what cannot be converted is refused and leaves no file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from shared.gguf_files import write_gguf
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedveil.base.refusal import Refusal
from fedveil.text import gguf
from fedveil.text.base import open_base

TOKENS = torch.arange(1, 41).view(2, 20)
TEXT = "Grüße 日本 🙂, dear friend <|endoftext|> 42"


pytestmark = pytest.mark.usefixtures("cache")


def logits(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(TOKENS).logits


def untied(folder: Path, tiny_base: Path) -> Path:
    """Write a model with a head of its own, and heads of another width than width / heads."""
    config = LlamaConfig(
        vocab_size=Tokenizer.from_file(str(tiny_base / "tokenizer.json")).get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-3,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_an_unpacked_file_is_the_model_it_came_from(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    folder = gguf.unpacked(write_gguf(tmp_path / "tiny.gguf", tiny_base, kind))
    assert (logits(folder) - logits(tiny_base)).abs().max() < 2e-2  # float16 has 11 bits
    assert (logits(tiny_base)).abs().max() > 1


def test_heads_norms_and_positions_are_those_of_the_file(tmp_path: Path, tiny_base: Path) -> None:
    source = untied(tmp_path / "source", tiny_base)
    path = tmp_path / "model.gguf"
    write_gguf(path, source, "F32")
    folder = gguf.unpacked(path)
    assert (logits(folder) - logits(source)).abs().max() < 2e-2
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_packed_weights_are_those_of_the_file(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    folder = gguf.unpacked(write_gguf(tmp_path / "tiny.gguf", tiny_base, kind))
    source = load_file(tiny_base / "model.safetensors")
    weights, packed = load_file(folder / "model.safetensors"), load_file(folder / "packed.safetensors")
    assert len(packed) == 2 * 7
    form = GGMLQuantizationType[kind]
    for name, blocks in packed.items():  # a row is quantised alone, so that the order of rows does not matter
        expected = quantize(source[name].numpy(), form)
        assert (blocks.flatten(1).numpy() == expected).all(), name
        assert (weights[name].numpy() == dequantize(expected, form).astype("float16")).all(), name


def test_transformers_loads_the_folder(tmp_path: Path, tiny_base: Path) -> None:
    folder = gguf.unpacked(write_gguf(tmp_path / "tiny.gguf", tiny_base))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer(TEXT)["input_ids"] == open_base(str(folder)).tokenizer.encode(TEXT).ids


def test_a_file_is_unpacked_once(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_base)
    folder = gguf.unpacked(path)
    monkeypatch.setattr(gguf, "_files", None)
    assert gguf.unpacked(path) == folder
    assert sorted(each.name for each in folder.parent.iterdir()) == [folder.name]


def test_a_crash_leaves_no_folder(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    path = write_gguf(tmp_path / "tiny.gguf", tiny_base)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf, "_rename", fail)
        gguf.unpacked(path)
    assert [each.name for each in (cache / "fedveil" / "bases").iterdir()] == []
    assert (logits(gguf.unpacked(path)) - logits(tiny_base)).abs().max() < 2e-2


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, tiny_base: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_base)
    cache.write_text("a file")
    with pytest.raises(Refusal, match="set XDG_CACHE_HOME to a folder with room"):
        gguf.unpacked(path)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"scaling": "linear"}, "its rotary positions are scaled"),
        ({"architecture": "gemma3"}, "its architecture is gemma3"),
        ({"model": "llama"}, "its tokenizer is llama, gpt-2"),
        ({"pre": "qwen2"}, "its tokenizer is gpt2, qwen2"),
    ],
)
def test_another_kind_of_model_is_refused_by_name(
    entries: dict[str, str], reason: str, tmp_path: Path, tiny_base: Path, cache: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_base, **entries)
    with pytest.raises(Refusal, match=f"^task.base='{path}': .*{reason}.*; {gguf.FOLDER}$"):
        open_base(str(path))
    assert not cache.exists()


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(part: float, tmp_path: Path, tiny_base: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_base)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(
        Refusal,
        match=r"^task.base='.*tiny.gguf': is damaged [^\n]*; copy it again, or give the model as a folder",
    ):
        open_base(str(path))
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\3\4 a zip", b"GGUF", b"GGUF" + bytes(100)])
def test_another_file_is_refused(content: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(Refusal, match=r"^task.base='.*model.gguf': "):
        open_base(str(path))
    assert not cache.exists()


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_weights_beyond_float16_are_refused(value: float, tmp_path: Path, tiny_base: Path) -> None:
    source = Path(shutil.copytree(tiny_base, tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    path = write_gguf(tmp_path / "tiny.gguf", source, "F32")
    with pytest.raises(
        Refusal, match=r"blk.1.ffn_up.weight has values beyond float16; give the model as a folder"
    ):
        gguf.unpacked(path)


def test_a_model_that_lacks_a_weight_is_refused(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_base)
    monkeypatch.setattr(gguf, "LAYER", {**gguf.LAYER, "ffn_gate_exps": "mlp.experts"})
    with pytest.raises(Refusal, match=r"lacks model[.]layers[.]0[.]mlp[.]experts"):
        gguf.unpacked(path)
    monkeypatch.setattr(gguf, "LAYER", {"attn_q": "self_attn.q_proj"})
    with pytest.raises(Refusal, match=r"its tensor .* is not of a plain Llama"):
        gguf.unpacked(path)
