import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedveil.tasks.arrays import base_of, sent_state
from fedveil.text.adapters import AdapterKeys, adapt
from fedveil.text.base import open_base
from fedveil.text.loss import IGNORED
from fedveil.text.model import TextModel, part_of, shared_copy, targets_of

END = 0
TOKENS = torch.tensor([[5, 9, 7, 3, 8, 2], [4, 6, 1, 9, 0, 0], [8, 0, 0, 0, 0, 0]])
LENGTHS = torch.tensor([6, 5, 2])  # with the end token


def text_model(base: Path, classes: int = 0) -> TextModel:
    """Return a model whose last layer has adapters that are not zero."""
    whole: Any = shared_copy(open_base(str(base)).model(32))
    decoder = whole.get_decoder()
    first = adapt(decoder, AdapterKeys("lora", rank=3, scale=1.0))
    model = TextModel(decoder, whole.get_output_embeddings(), first, END, classes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    return model.eval()


def prefix(model: TextModel) -> torch.Tensor:
    """Return the outputs of the first layer for the texts, with zeros for padding."""
    first: Any = part_of(model.decoder, 0, 1)
    states = first(input_ids=TOKENS, use_cache=False).last_hidden_state
    return states * (torch.arange(TOKENS.shape[1]) < LENGTHS[:, None])[..., None]


@torch.no_grad()
def test_padding_changes_nothing_before_it(tiny_base: Path) -> None:
    model = text_model(tiny_base)
    for row, length in zip(TOKENS, LENGTHS, strict=True):
        alone = model(row[None, :length])
        torch.testing.assert_close(model(TOKENS)[:, :length][(row == TOKENS).all(1)], alone)


@torch.no_grad()
def test_no_texts_have_no_states(tiny_base: Path) -> None:
    model = text_model(tiny_base)
    for inputs in (TOKENS, prefix(model)):
        assert model(inputs[:0]).shape == (0, 6, 32)
    assert text_model(tiny_base, classes=4)(TOKENS[:0]).shape == (0, 4)


@torch.no_grad()
def test_last_layers_continue_from_the_first(tiny_base: Path) -> None:
    model = text_model(tiny_base)
    whole, parts = model(TOKENS), model(prefix(model))
    filled = torch.arange(TOKENS.shape[1]) < LENGTHS[:, None]
    torch.testing.assert_close(whole[filled], parts[filled])
    assert whole.dtype == torch.float32 and whole.shape == (3, 6, 32)


@torch.no_grad()
def test_tokens_with_targets_are_scored(tiny_base: Path) -> None:
    model = text_model(tiny_base)
    targets = targets_of(TOKENS, LENGTHS)
    scored = model(torch.stack([TOKENS, targets], 1))
    logits = model.words(model(TOKENS)).transpose(1, 2)
    nats = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").sum(1)
    torch.testing.assert_close(scored, torch.stack([nats, torch.tensor([5.0, 4.0, 1.0])], 1))


@torch.no_grad()
def test_classes_are_scored_at_the_last_token(tiny_base: Path) -> None:
    model = text_model(tiny_base, classes=4)
    states = model.states(TOKENS)[torch.arange(3), LENGTHS - 1]
    torch.testing.assert_close(model(TOKENS), model.head(states))
    torch.testing.assert_close(model(prefix(model)), model.head(states))


def test_targets_are_the_next_tokens_of_the_text() -> None:
    i = IGNORED
    assert targets_of(TOKENS, LENGTHS).tolist() == [
        [9, 7, 3, 8, 2, i],
        [6, 1, 9, 0, i, i],
        [0, i, i, i, i, i],
    ]


def test_copies_share_what_is_frozen(tiny_base: Path) -> None:
    model: Any = text_model(tiny_base, classes=2)
    copy = shared_copy(model)
    pairs = list(zip(model.named_parameters(), copy.named_parameters(), strict=True))
    assert all((a.data_ptr() == b.data_ptr()) != a.requires_grad for (_, a), (_, b) in pairs)
    assert all(
        torch.equal(a, b) and n == m and a.requires_grad == b.requires_grad for (n, a), (m, b) in pairs
    )
    buffers = zip(model.buffers(), copy.buffers(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in buffers)
    assert copy.last_layers[0].layers[1] is copy.decoder.layers[1]
    assert {n for n, p in copy.named_parameters() if p.requires_grad} == set(sent_state(copy))
    assert len(base_of(copy)) > 20


def test_copies_take_no_memory_of_the_base(tiny_base: Path) -> None:
    model: Any = shared_copy(text_model(tiny_base))
    with torch.no_grad():
        model.words.weight = torch.nn.Parameter(torch.zeros(1 << 20, 32), requires_grad=False)  # 128 MiB
    copies = [shared_copy(model) for _ in range(2)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    copies += [shared_copy(model) for _ in range(4)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert len({each.words.weight.data_ptr() for each in copies}) == 1


def test_a_copy_that_moves_leaves_the_model(tiny_base: Path) -> None:
    model: Any = text_model(tiny_base)
    shared_copy(model).to(torch.float64)
    assert {each.dtype for each in (*model.parameters(), *model.buffers())} == {torch.float32}
    copy = shared_copy(model)
    assert copy.words.weight is copy.decoder.embed_tokens.weight


def test_a_step_trains_the_copy_alone(tiny_base: Path) -> None:
    model: Any = text_model(tiny_base)
    copy = shared_copy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy(TOKENS).square().mean().backward()
    torch.optim.SGD([each for each in copy.parameters() if each.requires_grad], lr=1.0).step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in copy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(sent_state(copy))


@pytest.mark.parametrize("text", [[3], [3, 4]])
@torch.no_grad()
def test_a_short_text_has_its_last_token(tiny_base: Path, text: list[int]) -> None:
    model = text_model(tiny_base, classes=2)
    assert model.last(torch.tensor([[*text, *[END] * (5 - len(text))]])).item() == len(text)
    assert model.last(torch.tensor([[3, 4, 5]])).item() == 2
