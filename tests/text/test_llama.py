"""The decoder computes what transformers' Llama computes, and says which configurations it does not cover."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedveil.text.llama import Llama, is_plain, sizes

CONFIG: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-3,
}
TOKENS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))


def both(**entries: Any) -> tuple[Llama, Any]:
    """Return our model and transformers' one, with the same weights."""
    torch.manual_seed(0)
    reference: Any = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **entries}))
    for layer in reference.model.layers:
        layer.input_layernorm.weight.data.uniform_(0.5, 2)
    with torch.device("meta"):
        model = Llama(sizes(reference.config.to_dict()))
    model.load_state_dict(reference.state_dict(), assign=True)
    model.tie_weights()
    return model, reference


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"tie_word_embeddings": True},
        {"dtype": "bfloat16"},
    ],
)
def test_logits_and_states_are_those_of_transformers(entries: dict[str, Any]) -> None:
    model, reference = both(**entries)
    if entries.get("dtype"):
        frequencies = reference.model.rotary_emb.inv_freq
        model, reference = model.bfloat16(), reference.bfloat16()
        reference.model.rotary_emb.inv_freq = frequencies  # which transformers loads in float32
    torch.testing.assert_close(model(TOKENS).logits, reference(TOKENS).logits)
    states = model.get_input_embeddings()(TOKENS)
    assert torch.equal(states, reference.get_input_embeddings()(TOKENS))
    hidden = model.get_decoder()(inputs_embeds=states, use_cache=False).last_hidden_state
    torch.testing.assert_close(
        hidden, reference.model(inputs_embeds=states, use_cache=False).last_hidden_state
    )
    torch.testing.assert_close(model.get_output_embeddings()(hidden), reference(TOKENS).logits)


def test_gradients_are_those_of_transformers() -> None:
    model, reference = both()
    for each in (model.requires_grad_(), reference):
        each(TOKENS).logits.square().mean().backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)


def test_padding_on_the_right_changes_nothing() -> None:
    model, _ = both()
    padded = torch.cat((TOKENS, torch.zeros(3, 4, dtype=torch.int64)), dim=1)
    torch.testing.assert_close(model(padded).logits[:, :9], model(TOKENS).logits)


def test_no_text_has_no_logits() -> None:
    model, _ = both()
    assert model(TOKENS[:0]).logits.shape == (0, 9, 50)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention, under vmap
def test_example_gradients_by_vmap_are_those_one_by_one() -> None:
    model, _ = both()
    weights: dict[str, Tensor] = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        output: Any = torch.func.functional_call(model, parameters, (tokens[None],))
        return output.logits.square().mean()

    mapped: Any = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, TOKENS)
    single: Any = torch.func.grad(loss)(weights, TOKENS[1])
    for name, gradient in single.items():
        torch.testing.assert_close(mapped[name][1], gradient, msg=name)


def test_plain_configurations_are_recognised(tiny_base: Path) -> None:
    plain = LlamaConfig(**CONFIG).to_dict()
    assert is_plain(plain)
    assert is_plain({**plain, "rope_parameters": None, "rope_theta": 5.0})
    for entries in (
        {"model_type": "mistral"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ):
        assert not is_plain({**plain, **entries}), entries


def test_both_spellings_of_positions_are_read() -> None:
    new = {**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    old = {**CONFIG, "rope_theta": 7.0}
    assert sizes(new) == sizes(old)
    assert sizes(CONFIG) == replace(sizes(new), rotary=10_000.0)


@torch.no_grad()
def test_tokens_one_by_one_with_a_cache_give_the_same_states() -> None:
    model, _ = both()
    whole = model.get_decoder()(TOKENS).last_hidden_state
    first = model.get_decoder()(TOKENS[:, :5], use_cache=True)
    parts, past = [first.last_hidden_state], first.past_key_values
    for column in range(5, TOKENS.shape[1]):
        step = model.get_decoder()(TOKENS[:, column, None], use_cache=True, past_key_values=past)
        parts, past = [*parts, step.last_hidden_state], step.past_key_values
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert [[each.shape[2] for each in layer] for layer in past] == [[9, 9], [9, 9]]
    assert list(model.get_decoder()(TOKENS).past_key_values) == []
