"""Models of Hugging Face keep examples apart, and the probe says so, whatever their weights."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.tasks import probe
from fedveil.tasks.data import Examples
from fedveil.tasks.independence import check_independence

transformers = pytest.importorskip("transformers")

CLASSES, WORDS = 3, 99
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDED = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **SIZE}
MODELS: dict[str, Callable[[], Any]] = {
    "BERT": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(num_labels=CLASSES, **WORDED)
    ),
    "RoBERTa": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(num_labels=CLASSES, max_position_embeddings=40, **WORDED)
    ),
    "ViT": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(num_labels=CLASSES, image_size=16, patch_size=4, **SIZE)
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, bos_token_id=0, eos_token_id=1, n_embd=32, n_layer=2, n_head=4
        )
    ),
    "Llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **WORDED)
    ),
    "Llama with biases": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(attention_bias=True, max_position_embeddings=64, **WORDED)
    ),
}


class Logits(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs).logits


class Objective:
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.dim() == 2:
            return F.cross_entropy(outputs, targets)
        return F.cross_entropy(outputs[:, :-1].mT, targets[:, 1:])


@pytest.mark.parametrize("seeds", [2, pytest.param(20, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("name", MODELS)
def test_no_model_of_hugging_face_is_refused(name: str, seeds: int) -> None:
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, words = Logits(MODELS[name]()), torch.randint(3, WORDS, (12, 10))
        inputs = torch.rand(12, 3, 16, 16) if name == "ViT" else words
        language = "LM" in type(model.inner).__name__
        check_independence(
            model,
            Objective(),
            Examples(inputs, words if language else torch.randint(0, CLASSES, (12,))),
        )


def test_a_model_in_bfloat16_with_a_trained_head_passes() -> None:
    words = torch.randint(3, WORDS, (12, 10))
    model = Logits(MODELS["Llama"]().to(torch.bfloat16))
    assert any(buffer.dtype == torch.bfloat16 for buffer in model.buffers())
    check_independence(model, Objective(), Examples(words, words))


def test_the_ends_of_sequences_are_enough_for_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counts(Logits):
        lengths: ClassVar[list[int]] = []

        def forward(self, inputs: Tensor) -> Tensor:
            self.lengths.append(inputs.shape[1])
            return super().forward(inputs)

    monkeypatch.setattr(probe, "LARGE_MODEL", 0)
    words = torch.randint(3, WORDS, (12, 60))
    check_independence(Counts(MODELS["Llama"]()), Objective(), Examples(words, words))
    assert {*Counts.lengths} == {32, 2}
