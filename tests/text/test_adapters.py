from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedveil.base.refusal import Refusal
from fedveil.client.dp_sgd.book_keeping import obstacle
from fedveil.text.adapters import MODULES, Adapter, AdapterKeys, adapt, factors
from fedveil.text.base import open_base
from fedveil.text.model import TextModel, shared_copy

LORA = AdapterKeys("lora", rank=3, layers=2, scale=2.0)


def adapted(base: Path, keys: AdapterKeys) -> tuple[Any, int]:
    """Return a decoder with adapters, and the number of its first layer with one."""
    whole: Any = open_base(str(base)).model(32)
    decoder = shared_copy(whole.get_decoder())
    return decoder, adapt(decoder, keys)


def drawn(decoder: Any) -> None:
    """Give every trainable parameter a value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)


def states(decoder: Any, tokens: torch.Tensor) -> torch.Tensor:
    return decoder(input_ids=tokens, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", ["lora", "ffa", "rxr"])
def test_adapters_change_nothing_at_their_start(tiny_base: Path, name: str) -> None:
    decoder, first = adapted(tiny_base, replace(LORA, name=name))
    whole: Any = open_base(str(tiny_base)).model(32)
    tokens = torch.arange(24).view(2, 12)
    assert first == 0
    assert torch.equal(states(decoder, tokens), states(whole.get_decoder(), tokens))
    drawn(decoder)
    assert not torch.allclose(states(decoder, tokens), states(whole.get_decoder(), tokens), atol=1e-2)


@pytest.mark.parametrize(("name", "parts"), [("lora", "down up"), ("ffa", "up"), ("rxr", "square")])
def test_each_kind_trains_its_factors_alone(tiny_base: Path, name: str, parts: str) -> None:
    decoder, first = adapted(tiny_base, AdapterKeys(name, rank=3, modules=("q_proj", "down_proj")))
    trained = {path for path, each in decoder.named_parameters() if each.requires_grad}
    paths = [f"layers.1.{path}" for path in ("self_attn.q_proj", "mlp.down_proj")]
    assert first == 1
    assert trained == {f"{path}.{part}.weight" for path in paths for part in parts.split()}


@pytest.mark.parametrize("name", ["lora", "ffa", "rxr"])
def test_the_fast_engine_trains_every_kind(tiny_base: Path, name: str) -> None:
    decoder, first = adapted(tiny_base, AdapterKeys(name, rank=3, layers=2))
    whole: Any = open_base(str(tiny_base)).model(32)
    for classes, inputs in ((0, torch.arange(24).view(2, 12)), (3, torch.randn(2, 12, 32))):
        model = TextModel(decoder, whole.get_output_embeddings(), first, end=0, classes=classes)
        assert obstacle(model, inputs) is None


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_outputs_are_those_of_peft(tiny_base: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    decoder, _ = adapted(tiny_base, LORA)
    drawn(decoder)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(MODULES), lora_dropout=0.0)
    other: Any = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_base), config)
    values = {path: each for path, each in decoder.named_parameters() if each.requires_grad}
    names = {"down": "lora_A.default", "up": "lora_B.default"}
    with torch.no_grad():
        for path, value in values.items():
            module, part, _ = path.rsplit(".", 2)
            other.get_parameter(f"base_model.model.model.{module}.{names[part]}.weight").copy_(value)
    tokens = torch.arange(24).view(2, 12)
    expected = other(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    assert len(values) == 2 * 2 * len(MODULES)
    torch.testing.assert_close(states(decoder, tokens), expected, rtol=1e-4, atol=1e-4)


def test_frozen_factors_follow_from_a_public_seed(tiny_base: Path) -> None:
    for name in ("ffa", "rxr"):
        one, other = (adapted(tiny_base, replace(LORA, name=name))[0] for _ in range(2))
        torch.manual_seed(len(name))  # the global state has no effect
        downs = [each.down.weight for each in one.modules() if isinstance(each, Adapter)]
        others = [each.down.weight for each in other.modules() if isinstance(each, Adapter)]
        assert all(torch.equal(a, b) for a, b in zip(downs, others, strict=True))
        assert len({float(each[0, 0]) for each in downs}) == len(downs), "each layer has its own"


def test_square_lies_between_the_singular_vectors() -> None:
    weight = torch.randn(20, 12)
    right, left = factors(weight, 5)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(left @ right, u[:, :5] * s[:5] @ v[:5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right @ right.t(), torch.eye(5), rtol=1e-4, atol=1e-5)
    assert (right.gather(1, right.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(left.norm(dim=0), s[:5])


def test_a_change_is_scaled() -> None:
    layer = nn.Linear(8, 6)
    inputs = torch.randn(4, 8)
    adapter = Adapter(layer, AdapterKeys("lora", rank=2, scale=0.5), 0)
    with torch.no_grad():
        adapter.up.weight.normal_()
    change = inputs @ adapter.down.weight.t() @ adapter.up.weight.t()
    torch.testing.assert_close(adapter(inputs), layer(inputs) + 0.5 * change)
    half = Adapter(nn.Linear(8, 6, dtype=torch.bfloat16), AdapterKeys("ffa", rank=2), 0)
    assert half(inputs.bfloat16()).dtype == torch.bfloat16
    assert half.up.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (AdapterKeys(layers=3), "task.adapter.layers=3: the model has 2 layers; use fewer"),
        (
            AdapterKeys(rank=17),
            "task.adapter.rank=17: is above the smaller size of a layer of 32 x 16; lower it",
        ),
        (
            AdapterKeys(modules=("q_proj", "c_attn")),
            "task.adapter.modules=['c_attn']: are no linear layers of this model, which has "
            + ", ".join(sorted(MODULES)),
        ),
    ],
)
def test_keys_that_do_not_fit_the_model_are_refused(
    tiny_base: Path, keys: AdapterKeys, sentence: str
) -> None:
    with pytest.raises(Refusal) as refusal:
        adapted(tiny_base, keys)
    assert str(refusal.value) == sentence


def test_a_decoder_of_other_names_is_refused() -> None:
    decoder = nn.Module()
    decoder.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
    with pytest.raises(Refusal, match="no linear layer of this model has such a name"):
        adapt(decoder, AdapterKeys(rank=1))
