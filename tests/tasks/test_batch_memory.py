"""Tests of ``batch_memory``: how many examples are in memory at a time."""

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.tasks import batch_memory
from fedveil.tasks.arrays import COPIED, copied_buffers
from fedveil.tasks.batch_memory import (
    ALLOWED,
    AUTO,
    PEAK,
    answers,
    check_at_once,
    evaluated_apart,
    evaluated_at_once,
    outputs_apart,
    trained_at_once,
)
from fedveil.tasks.data import BATCH, Examples, LazyExamples, mean_figures
from fedveil.tasks.mislabelled import losses_of

WORDS, TOKENS, WIDTH = 5000, 16, 4


class Watched(nn.Module):
    """A model that notes the size of each batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.sizes = inner, list[int]()

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs))
        return self.inner(inputs)


def words(frozen: bool = False) -> nn.Module:
    """A language model with a wide vocabulary."""
    return nn.Sequential(
        nn.Embedding(WORDS, WIDTH).requires_grad_(not frozen), nn.Tanh(), nn.Linear(WIDTH, WORDS, bias=False)
    )


def texts(count: int, fill: int = 1) -> Examples:
    return Examples(torch.full((count, TOKENS), fill), torch.full((count, TOKENS), fill))


class Reals:
    """Loss and metrics of one number."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square().mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"mean": float(outputs.mean())}


def points(count: int) -> Examples:
    return Examples(torch.arange(count * 3.0).reshape(count, 3) / 100, torch.arange(float(count)))


def test_wide_outputs_are_evaluated_a_few_at_a_time() -> None:
    logits = TOKENS * WORDS * 4
    rows = evaluated_at_once(AUTO, words(), texts(10))
    assert rows == ALLOWED // (PEAK * logits + TOKENS * 8)
    assert trained_at_once(AUTO, words(), texts(10), whole_gradients=False).rows <= rows


def test_small_model_takes_all_examples_at_once() -> None:
    rows = evaluated_at_once(AUTO, nn.Linear(3, 1), points(10))
    assert rows > 1_000_000
    ((outputs, _),) = answers(nn.Linear(3, 1), points(1000), AUTO)
    assert outputs.shape == (1000, 1)


def test_number_follows_from_shapes_and_not_from_values() -> None:
    model = words()
    assert evaluated_at_once(AUTO, model, texts(5, 1)) == evaluated_at_once(AUTO, words(), texts(9, 4000))
    longer = Examples(torch.ones(5, 2 * TOKENS, dtype=torch.int64), torch.ones(5))
    assert evaluated_at_once(AUTO, model, longer) == pytest.approx(
        evaluated_at_once(AUTO, model, texts(5)) / 2, rel=0.02
    )


def test_whole_gradients_and_saved_tensors_make_parts_smaller() -> None:
    wide, data = nn.Sequential(nn.Linear(3, 4000), nn.Linear(4000, 1)), points(9)
    sums = trained_at_once(AUTO, wide, data, whole_gradients=False)
    whole = trained_at_once(AUTO, wide, data, whole_gradients=True)
    assert 8 <= whole.rows < sums.rows
    deep = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(3, 3), nn.Tanh())])
    trained = trained_at_once(AUTO, deep, data, whole_gradients=False).rows
    base = nn.Sequential(*[each.requires_grad_(False) for each in deep], nn.Linear(3, 3))
    assert trained < trained_at_once(AUTO, base, data, whole_gradients=False).rows


def test_model_is_measured_once_for_each_shape() -> None:
    model = Watched(nn.Linear(3, 1))
    for _ in range(3):
        evaluated_at_once(AUTO, model, points(5))
    assert model.sizes == [2, 1]
    evaluated_at_once(AUTO, model, Examples(torch.zeros(4, 2, 3), torch.zeros(4)))
    assert model.sizes == [2, 1, 2, 1]
    before = len(batch_memory._measured)  # pyright: ignore[reportPrivateUsage]
    del model
    gc.collect()
    assert len(batch_memory._measured) < before  # pyright: ignore[reportPrivateUsage]


def test_measured_model_holds_no_weights_that_it_had() -> None:
    """A pass saves tensors, which would hold its graph, which holds all weights but the first."""
    weights = np.ones((2, 8), np.float32)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].weight.data = torch.from_numpy(weights)
    evaluated_at_once(AUTO, model.eval(), Examples(torch.ones(4, 8), torch.zeros(4)))
    model[2].weight.data, kept = torch.empty(0), weakref.ref(weights)
    del weights
    gc.collect()
    assert kept() is None


def test_weights_that_a_pass_unpacks_count_for_no_example() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.zeros(400, 300, dtype=torch.uint8), requires_grad=False)
            self.own = nn.Parameter(torch.zeros(3, 300))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs @ self.own) @ self.packed.float().T

    data = points(9)
    plain = nn.Sequential(nn.Linear(3, 300, bias=False), nn.Linear(300, 400, bias=False))
    plain[1].requires_grad_(False)
    rows = evaluated_at_once(AUTO, Packed(), data)
    assert rows == evaluated_at_once(AUTO, plain, data)


def test_large_whole_numbers_of_the_base_alone_are_not_copied() -> None:
    def with_codes(trains: bool) -> nn.Module:
        layer = nn.Linear(2, 1).requires_grad_(trains)
        layer.register_buffer("codes", torch.zeros(COPIED + 1, dtype=torch.uint8))
        layer.register_buffer("mean", torch.zeros(COPIED + 1))
        layer.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        return layer

    packed, trained = with_codes(trains=False), with_codes(trains=True)
    copies = copied_buffers(nn.Sequential(packed, trained))
    assert copies.keys() == {"0.mean", "0.count", "1.codes", "1.mean", "1.count"}
    assert copies["0.mean"].data_ptr() != packed.get_buffer("mean").data_ptr()


def test_measurement_moves_neither_buffers_nor_draws() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    trained_at_once(AUTO, model, points(5), whole_gradients=True)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_model_that_fails_on_zeros_gets_batches() -> None:
    class Strict(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            assert bool((inputs > 0).all())
            return inputs

    assert evaluated_at_once(AUTO, Strict(), points(600)) == BATCH
    assert evaluated_at_once(AUTO, nn.Linear(3, 1), points(0)) > BATCH


def test_private_examples_are_padded_or_alone() -> None:
    assert evaluated_apart("8", nn.Linear(3, 1), points(5)) == (8, 8)
    assert evaluated_apart("7", nn.Linear(3, 1), points(5)) == (1, 1)
    assert evaluated_apart("8", nn.Linear(3, 1), points(5)).size(3) == 8
    assert evaluated_apart("7", nn.Linear(3, 1), points(5)).size(1) == 1


@pytest.mark.parametrize("limit", ["1", "3", "7", "100"])
def test_evaluation_passes_no_more_rows_to_the_model(limit: str) -> None:
    model, data = Watched(nn.Linear(3, 1)), points(20)
    with torch.no_grad():
        ((outputs, targets),) = answers(model, data, limit)
        assert max(model.sizes) == min(int(limit), 20) and sum(model.sizes) == 20
        torch.testing.assert_close(outputs, model.inner(data.inputs))
    assert torch.equal(targets, data.targets)


@pytest.mark.parametrize("limit", ["3", "8"])
def test_losses_and_columns_are_computed_in_parts(limit: str) -> None:
    model, data = Watched(nn.Linear(3, 1)), points(20)
    expected = losses_of(Reals(), model.inner, data)  # pyright: ignore[reportArgumentType]
    actual = losses_of(Reals(), model, data, limit)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected))
    with torch.no_grad():
        torch.testing.assert_close(outputs_apart(model, data.inputs, limit), model.inner(data.inputs))
    assert max(model.sizes) <= int(limit)


def test_outputs_that_do_not_fit_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Watched(nn.Linear(3, 1)), points(20)
    monkeypatch.setattr(batch_memory, "ALLOWED", PEAK * 4 * 20 - 1)
    with torch.no_grad():
        parts, whole = list(answers(model, data, "6")), model.inner(data.inputs)
    assert [len(targets) for _, targets in parts] == [6, 6, 6, 2]
    means = mean_figures(
        (len(y), {"loss": float(Reals().loss(x, y)), **Reals().metrics(x, y)}) for x, y in parts
    )
    assert means["mean"] == pytest.approx(float(whole.mean()), rel=1e-6)
    assert means["loss"] == pytest.approx(float(Reals().loss(whole, data.targets)), rel=1e-6)
    monkeypatch.setattr(batch_memory, "ALLOWED", PEAK * 4 * 20)
    assert len(list(answers(model, data, "6"))) == 1


def test_lazy_data_are_evaluated_in_smaller_batches() -> None:
    class Items:
        def __len__(self) -> int:
            return 300

        def __getitem__(self, row: int) -> Mapping[str, Any]:
            return {"x": torch.full((3,), float(row)), "label": 0}

    model, data = Watched(nn.Linear(3, 1)), LazyExamples(Items(), inputs="x")
    with torch.no_grad():
        assert [len(targets) for _, targets in answers(model, data, "1000")] == [256, 44]
        assert [len(targets) for _, targets in answers(model, data, "100")] == [100, 100, 100]


def test_undefined_figure_is_the_mean_of_the_others() -> None:
    batches = [(3, {"auc": 0.5, "loss": 1.0}), (5, {"loss": 2.0}), (1, {"auc": 0.9, "loss": 3.0})]
    assert mean_figures(batches) == pytest.approx({"auc": 0.6, "loss": 16 / 9})


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "few", "null", "true"])
@pytest.mark.parametrize("engine", ["inprocess", "ray"])
def test_invalid_numbers_of_examples_are_refused(engine: str, value: str) -> None:
    with pytest.raises(Refusal, match=r"engine\.examples_at_once=.*: must be auto, or a whole number of at"):
        settings_from_overrides([f"engine={engine}", f"engine.examples_at_once={value}"])
    assert (
        settings_from_overrides([f"engine={engine}", "engine.examples_at_once=3"]).engine.examples_at_once
        == "3"
    )


@pytest.mark.parametrize("value", ["", "0", "-1", "2.5", "few"])
def test_invalid_limits_of_a_device_are_refused(value: str) -> None:
    with pytest.raises(Refusal, match=r"KEY=.*give auto, or a whole number of at least 1"):
        check_at_once(value, "KEY")
    check_at_once("12", "KEY")
    check_at_once(AUTO, "KEY")
