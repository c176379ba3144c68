from types import SimpleNamespace

import pytest
import torch

from fedveil.base.refusal import Refusal
from fedveil.text import prefix
from fedveil.text.prefix import padded_rows, prefix_states

TEXTS = [torch.tensor(each) for each in ([5, 6, 7], [3], [5, 6, 7], [2, 9])]


class Decoder:
    """Decoder whose hidden states are the tokens, and which notes the batches that it gets."""

    def __init__(self) -> None:
        self.shapes: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.shapes.append(list(input_ids.shape))
        states = input_ids[..., None].expand(-1, -1, 2).float()
        return SimpleNamespace(last_hidden_state=states)


def test_each_text_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "TEXTS", 2)
    decoder = Decoder()
    states = prefix_states(decoder, 4, 2)
    first = states(TEXTS)
    assert first[..., 0].tolist() == [[5, 6, 7, 0], [3, 0, 0, 0], [5, 6, 7, 0], [2, 9, 0, 0]]
    assert decoder.shapes == [[2, 2], [1, 3]], "short texts together, without their padding to four"
    assert torch.equal(states(TEXTS[:2]), first[:2])
    assert len(decoder.shapes) == 2
    states([torch.tensor([1])])
    assert decoder.shapes[2:] == [[1, 1]]
    assert states([]).shape == (0, 4, 2)


def test_states_that_exceed_float16_are_refused() -> None:
    with pytest.raises(Refusal) as refusal:
        prefix_states(Decoder(), 4, 2)([torch.tensor([70_000])])
    sentence = "some hidden states of this model exceed float16; use task.cache=none"
    assert str(refusal.value) == f"task.cache='prefix': {sentence}"


def test_rows_are_padded_with_the_end_token() -> None:
    assert padded_rows(TEXTS[1:], 3, 8).tolist() == [[3, 8, 8], [5, 6, 7], [2, 9, 8]]
