"""Models with weights of 32 to 4 bits are close to the float model, and damaged weights are refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from shared.gguf_files import write_gguf
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from fedveil.base.refusal import Refusal
from fedveil.text import loading
from fedveil.text.gguf import unpacked
from fedveil.text.llama import Llama
from fedveil.text.loading import load_model
from fedveil.text.packed import PackedLinear

TOKENS = torch.arange(1, 41).view(2, 20)


pytestmark = pytest.mark.usefixtures("cache")


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model(TOKENS).logits.float()


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, each in model.named_modules() if isinstance(each, PackedLinear)]


def test_float_weights_are_those_of_transformers(tiny_base: Path) -> None:
    model: Any = load_model(tiny_base, 32)
    assert isinstance(model, Llama)
    torch.testing.assert_close(model(TOKENS).logits, reference(tiny_base))
    half: Any = load_model(tiny_base, 16)
    torch.testing.assert_close(half(TOKENS).logits.float(), reference(tiny_base, torch.bfloat16))


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_model_is_frozen_and_loaded_once(bits: int, tiny_base: Path) -> None:
    model = load_model(tiny_base, bits)
    assert load_model(tiny_base, bits) is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    embedding, head = (model.get_parameter(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert head is embedding
    assert embedding.dtype == (torch.float32 if bits == 32 else torch.bfloat16)
    assert len(packed_layers(model)) == (14 if bits < 16 else 0)


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_1")])
def test_a_packed_folder_computes_with_the_rounded_weights(bits: int, kind: str, tiny_base: Path) -> None:
    rounded: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    for name, weight in rounded.named_parameters():
        if name.endswith("_proj.weight"):
            form = GGMLQuantizationType[kind]
            weight.data = torch.from_numpy(dequantize(quantize(weight.detach().numpy(), form), form))
    frequencies = rounded.model.rotary_emb.inv_freq
    rounded.to(torch.bfloat16).model.rotary_emb.inv_freq = frequencies  # which transformers loads in float32
    model: Any = load_model(tiny_base, bits)
    torch.testing.assert_close(model(TOKENS).logits, rounded(TOKENS).logits)


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_the_codes_of_a_gguf_file_are_used_as_they_are(
    kind: str, bits: int, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpacked(write_gguf(tmp_path / "tiny.gguf", tiny_base, kind))
    monkeypatch.setattr(loading, "pack", None)  # so that to quantise again would fail
    model = load_model(folder, bits)
    blocks = load_file(folder / "packed.safetensors")
    for name in packed_layers(model):
        assert torch.equal(model.get_buffer(f"{name}.blocks"), blocks[f"{name}.weight"])
    assert len(blocks) == len(packed_layers(model)) == 14


def test_codes_of_other_bits_are_packed_anew(tmp_path: Path, tiny_base: Path) -> None:
    folder = unpacked(write_gguf(tmp_path / "tiny.gguf", tiny_base, "Q8_0"))
    model: Any = load_model(folder, 4)
    assert {layer.blocks.shape[-1] for layer in model.modules() if isinstance(layer, PackedLinear)} == {20}


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_another_architecture_is_loaded_by_transformers(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    source = Qwen2ForCausalLM(config)
    for name, bias in source.named_parameters():
        if name.endswith("bias"):
            bias.data.normal_()
    source.save_pretrained(tmp_path)
    model: Any = load_model(tmp_path, bits)
    exact = reference(tmp_path)
    difference = (model(TOKENS).logits.float() - exact).square().mean().sqrt() / exact.std()
    assert difference < {32: 1e-5, 16: 0.02, 8: 0.02, 4: 0.2}[bits]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(packed_layers(model)) == (7 if bits < 16 else 0)
    assert isinstance(model.lm_head, nn.Linear)


def test_a_model_without_linear_layers_is_not_packed(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=r"^task.base_bits=4: the model has no linear layer; choose 16$"):
        load_model(tmp_path, 4)


def test_a_width_without_whole_blocks_is_refused(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    for name, weight in weights.items():
        if "gate_proj" in name or "up_proj" in name:
            weights[name] = weight[:40].clone()
        elif "down_proj" in name:
            weights[name] = weight[:, :40].clone()
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=r"^task.base_bits=4: .*down_proj.weight has 40 inputs, .*; choose 16$"):
        load_model(copied, 4)
    assert load_model(copied, 16)


def test_weights_in_parts_are_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MAPPED", 1)  # so that a file is mapped anew for each weight
    weights = load_file(copied / "model.safetensors")
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        path = copied / f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path)
    expected: Any = load_model(copied, 32)
    (copied / "model.safetensors").unlink()
    model: Any = load_model.__wrapped__(copied, 32)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_damaged_weights_are_refused(copied: Path) -> None:
    path = copied / "model.safetensors"
    weights = load_file(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Refusal, match=r"^task.base='.*': cannot be loaded"):
        load_model(copied, 32)
    narrow = {name: weight[..., :16].clone() for name, weight in weights.items()}
    save_file(narrow, path)
    with pytest.raises(Refusal, match=r"^task.base='.*': cannot be loaded"):
        load_model(copied, 32)
    save_file({name: weight for name, weight in weights.items() if "v_proj" not in name}, path)
    with pytest.raises(
        Refusal, match=r"^task.base='.*': has no weights model.layers.0.self_attn.v_proj.weight"
    ):
        load_model(copied, 32)


@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_a_damaged_configuration_is_refused(content: str, copied: Path) -> None:
    (copied / "config.json").write_text(content)
    with pytest.raises(Refusal, match=r"^task.base='.*': "):
        load_model(copied, 32)


def test_no_code_of_a_folder_is_run(copied: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (copied / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (copied / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    with pytest.raises(Refusal, match=r"^task.base='.*': cannot be loaded"):
        load_model(copied, 32)
    assert not marker.exists()
