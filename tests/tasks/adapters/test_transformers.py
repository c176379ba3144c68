"""Models of Hugging Face train what PEFT leaves to train, by their own loss, at both levels."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedveil as fv
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.independence import check_independence

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from fedveil.tasks.adapters.transformers import TransformersTask

# PEFT reads what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(**options: Any) -> nn.Module:
    config = transformers.BertConfig(vocab_size=20, initializer_range=0.2, **SIZE, **options)
    lora = peft.LoraConfig("SEQ_CLS", r=2, target_modules=["query", "value"])
    return peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)


def gpt() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    lora = peft.LoraConfig("CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)


def sentences(client: int, kind: type = int) -> list[dict[str, Tensor]]:
    tokens = torch.randint(2, 20, (60, 6), generator=torch.Generator().manual_seed(client))
    return [{"input_ids": row, "label": torch.tensor(kind(row[0] < 11))} for row in tokens]


def texts(client: int) -> fv.Examples:
    generator = torch.Generator().manual_seed(client)
    tokens = torch.randint(2, 20, (40, 8), generator=generator)
    lengths = torch.randint(3, 9, (40, 1), generator=generator)
    mask = (torch.arange(8) < lengths).long()
    return fv.Examples({"input_ids": tokens, "attention_mask": mask}, tokens.masked_fill(mask == 0, -100))


def classifier(model: Any = bert, kind: type = int) -> TransformersTask:
    return TransformersTask(
        model, [sentences(n, kind) for n in range(3)], sentences(99, kind), simulated=True
    )


def writer() -> TransformersTask:
    return TransformersTask(gpt, [texts(n) for n in range(3)], texts(99), simulated=True)


@pytest.mark.parametrize("task_of", [classifier, writer])
@pytest.mark.parametrize("privacy", [fv.Record(target_delta=1e-2), fv.ClientCentral(target_delta=1e-2)])
def test_adapters_train_at_both_levels(task_of: Any, privacy: Any) -> None:
    task, before = task_of(), read_arrays(task_of().model())
    run = fv.simulate(task, privacy=privacy, cohort="all", num_rounds=2, quiet=True)
    assert run.status == "completed" and run.epsilon <= 3 and np.isfinite(run.metrics["loss"])
    after = read_arrays(run.model)
    assert after.keys() == before.keys()
    assert all("lora" in name or "modules_to_save" in name for name in after)
    assert any((after[name] != before[name]).any() for name in after)
    frozen = dict(task.model().named_parameters())
    for name, value in run.model.named_parameters():
        assert value.requires_grad or torch.equal(value, frozen[name])


def test_a_frozen_parameter_with_two_names_travels_under_neither() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight.requires_grad_(False)
    assert set(read_arrays(nn.Sequential(first, second, nn.Linear(3, 1)))) == {"2.weight", "2.bias"}


def test_the_loss_of_a_language_model_is_the_mean_of_its_texts() -> None:
    task = writer()
    model, (inputs, labels) = task.model().eval(), task.held_out().batch(torch.arange(5))
    outputs = model(**inputs)
    alone = [model(**{name: each[row : row + 1] for name, each in inputs.items()}).loss for row in range(5)]
    torch.testing.assert_close(task.loss(outputs, labels), torch.stack(alone).mean())
    assert abs((task.loss(outputs, labels) - outputs.loss).item()) > 1e-4  # transformers weighs by length
    check_independence(task.model(), task, task.client_data(0))


def test_figures_of_a_language_model_do_not_depend_on_batches() -> None:
    task = writer()
    model, data = task.model().eval(), task.held_out()

    def figures(size: int) -> dict[str, float]:
        means: dict[str, float] = {}
        for rows in torch.arange(len(data)).split(size):
            inputs, labels = data.batch(rows)
            for name, value in task.metrics(model(**inputs), labels).items():
                means[name] = means.get(name, 0.0) + value * len(rows) / len(data)
        return task.derived(means)

    whole = figures(40)
    assert set(whole) == {"accuracy", "perplexity"}
    for size in (1, 7):
        assert figures(size) == pytest.approx(whole, rel=1e-4)
    inputs, labels = data.batch(torch.arange(40))
    outputs = model(**inputs)  # transformers' own loss is the mean over all tokens
    assert whole["perplexity"] == pytest.approx(outputs.loss.exp().item(), rel=1e-4)
    right = outputs.logits[:, :-1].argmax(-1) == labels[:, 1:]
    known = labels[:, 1:] != -100
    each = [float(right[row][known[row]].float().mean()) for row in range(40)]
    assert whole["accuracy"] == pytest.approx(np.mean(each), abs=1e-6)
    run = fv.simulate(task, privacy=fv.NoPrivacy(), cohort="all", num_rounds=1, quiet=True)
    assert {"accuracy", "perplexity", "loss"} <= set(run.metrics) and not {"nats", "tokens"} & set(
        run.metrics
    )


def test_the_loss_of_a_classifier_is_the_models_own() -> None:
    task = classifier()
    inputs, labels = task.client_data(0).batch(torch.arange(8))
    assert set(inputs) == {"input_ids", "labels"}
    outputs = task.model()(**inputs)
    assert task.loss(outputs, labels) is outputs.loss


def test_numbers_are_learned_without_an_accuracy() -> None:
    task = classifier(lambda: bert(num_labels=1), float)
    run = fv.simulate(task, privacy=fv.NoPrivacy(), cohort="all", num_rounds=1, quiet=True)
    assert "loss" in run.metrics and "accuracy" not in run.metrics


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: bert().requires_grad_(False), "every parameter is frozen"),
        (lambda: transformers.BertModel(transformers.BertConfig(vocab_size=20, **SIZE)), "head"),
    ],
)
def test_a_model_that_cannot_train_is_refused(model: Any, said: str) -> None:
    with pytest.raises(fv.Refusal, match=said):
        classifier(model)


def test_copies_of_a_model_share_its_base_and_nothing_that_trains() -> None:
    task = classifier()
    one, other = task.model(), task.model()
    pairs = [*zip(one.parameters(), other.parameters(), strict=True)]
    assert all((a.data_ptr() == b.data_ptr()) != a.requires_grad for a, b in pairs)
    assert any(a.requires_grad for a, _ in pairs) and not all(a.requires_grad for a, _ in pairs)
