"""Pruned exports: channels that are cut out for real, weights that are zero, and what they leave of the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fedveil as fv
from fedveil.__main__ import run as fedveil
from fedveil.base.refusal import Refusal
from fedveil.export.distil import distil
from fedveil.export.export import Order, export
from fedveil.export.prune import Pruning, cuts_of, pruned, pruning_of, settle

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")


def seeded(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with values and statistics of norms that differ by channel."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in (*model.parameters(), *model.buffers()):
            if each.is_floating_point():
                each.uniform_(0.1, 1.0, generator=draw).mul_(torch.randn(each.shape, generator=draw).sign())
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_var is not None:
                module.running_var.abs_()
    return model.eval()


class Hidden(nn.Sequential):
    """A perceptron for the digits."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


class Functional(nn.Module):
    """Layers between functions, as most people write them, and one branch that cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
        self.c, self.d, self.e = nn.Linear(32, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        pictures = F.relu(self.b(torch.tanh(self.a(inputs))))
        hidden = self.c(torch.flatten(pictures, 1)).relu()
        return self.e(hidden + F.gelu(self.d(hidden)))


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))


def pictures() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, bias=False), nn.GELU(),
        nn.Flatten(), nn.Linear(24, 10), nn.BatchNorm1d(10, affine=False), nn.Dropout(0.5), nn.Linear(10, 3),
    )  # fmt: skip


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(16, 8), nn.Sigmoid()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Linear(8, 2),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "perceptron": (nested, (16,), ("0.0", "1.0")),
    "pictures": (pictures, (1, 10, 10), ("0", "4", "7")),
    "functions": (Functional, (1, 6, 6), ("a", "b")),
    "words": (words, (), ("2",)),
}


def inputs_of(name: str, rows: int = 5) -> Tensor:
    if name == "words":
        return torch.arange(4 * rows).reshape(rows, 4) % 11
    return torch.randn(rows, *MODELS[name][1], generator=torch.Generator().manual_seed(1))


# --- channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_cutting_what_nobody_reads_changes_no_output(name: str) -> None:
    model = seeded(MODELS[name][0]())
    cuts = cuts_of(model)
    assert [each.layer for each in cuts] == [*MODELS[name][2]]
    for cut in cuts:  # every second channel is read by zeros
        channels = len(model.get_submodule(cut.layer).weight)
        reader = model.get_submodule(cut.reader)
        with torch.no_grad():
            reader.weight.reshape(len(reader.weight), channels, -1)[:, ::2] = 0
    before = model(inputs_of(name))
    smaller, entry = pruned(model, Pruning(0.5))
    assert torch.allclose(smaller(inputs_of(name)), before, rtol=1e-5, atol=1e-6)
    assert all(2 * after == before for before, after in entry["layers"].values())
    numbers = [sum(each.numel() for each in one.parameters()) for one in (smaller, model)]
    assert numbers[0] < 0.65 * numbers[1]
    assert torch.equal(model(inputs_of(name)), before)


def test_the_channels_of_least_norm_go_as_torch_has_it() -> None:
    model = seeded(nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 4, 3)))
    layer, reader = (model.get_submodule(each) for each in "02")
    with torch.no_grad():
        reader.weight.fill_(1)  # then the layer alone decides
    smaller, entry = pruned(model, Pruning(0.3))
    weight = layer.weight.detach().clone()
    prune.ln_structured(layer, "weight", amount=0.3, n=2, dim=0)
    kept = layer.weight_mask.flatten(1).any(1)
    assert torch.equal(smaller.get_submodule("0").weight, weight[kept]) and entry["layers"] == {"0": (20, 14)}


def test_one_channel_stays() -> None:
    smaller, entry = pruned(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), Pruning(0.99))
    assert entry["layers"] == {"0": (3, 1)} and smaller(torch.zeros(2, 4)).shape == (2, 2)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.end(self.layer(torch.tanh(self.layer(inputs))))


class Choosing(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.sum() > 0 else -inputs


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.Linear(4, 2), "Linear has no layer whose channels only one other layer reads"),
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), "Sequential has no layer"),
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(1), nn.Linear(6, 2)), "Sequential has no layer"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)), "has no layer"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(4, 2)), "Sequential has no layer"),
        (tied, "Sequential has no layer"),
        (Twice, "Twice has no layer"),
        (Choosing, "Choosing cannot be traced"),
    ],
    ids=["alone", "layer norm", "softmax", "groups", "width", "tied", "called twice", "branch"],
)
def test_a_model_that_cannot_be_cut_is_named(build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(Refusal, match=f"--prune.*{reason}.*; give weights:"):
        pruned(build(), Pruning(0.5))


# --- weights --------------------------------------------------------------------------------------------------------


def test_the_smallest_weights_of_all_matrices_become_zero() -> None:
    model = seeded(pictures())
    smaller, entry = pruned(model, Pruning(0.8, "weights"))
    settle(smaller)
    names = [name for name, each in model.named_parameters() if each.dim() > 1]
    before, after = (
        np.concatenate([one.get_parameter(name).detach().numpy().ravel() for name in names])
        for one in (model, smaller)
    )
    zeros = np.argsort(np.abs(before), kind="stable")[: round(0.8 * len(before))]
    before[zeros] = 0
    assert np.array_equal(after, before)
    assert smaller.state_dict().keys() == model.state_dict().keys()
    total = sum(each.numel() for each in model.parameters())
    assert entry["zeros"] == pytest.approx(len(zeros) / total)


@pytest.mark.parametrize("what", ["channels", "weights"])
def test_a_pruned_model_learns_from_the_released_one(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.export.distil.STEPS", 150)
    torch.manual_seed(0)
    model, inputs = Hidden().eval(), torch.randn(400, 64)
    smaller, _ = pruned(model, Pruning(0.75, what))
    with torch.no_grad():
        gaps = [(smaller(inputs) - model(inputs)).abs().mean()]
    distil(model, smaller, inputs, classifies=True)
    settle(smaller)
    with torch.no_grad():
        gaps.append((smaller(inputs) - model(inputs)).abs().mean())
    assert gaps[1] < gaps[0]
    if what == "weights":
        weights = torch.cat([each.flatten() for each in smaller.parameters() if each.dim() > 1])
        assert float((weights == 0).double().mean()) == 0.75


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "hidden"
    task = {"name": "digits", "model": f"{__name__}:Hidden"}
    fv.simulate(task, allow_modules=[__name__], num_rounds=2, folder=folder, quiet=True)
    return folder


@pytest.mark.parametrize("to", ["safetensors", "int8", "torchscript"])
def test_a_cut_export_is_smaller_and_predicts(
    hidden: Path, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(hidden), "--to", to, "--allow-module", __name__]
    assert fedveil([*words, "--out", str(tmp_path / "whole"), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert fedveil([*words, "--prune", "0.5", "--out", str(tmp_path / "cut"), "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["bytes"] < whole["bytes"] and whole["pruned"] == {}
    assert card["pruned"] == {"what": "channels", "share": 0.5, "layers": {"0": [32, 16]}, "tuned": False}
    assert card["privacy"] == whole["privacy"] and card["measured_on"] == "held-out data"
    np.save(tmp_path / "rows.npy", np.zeros((3, 64), np.float32))
    assert fedveil(["predict", str(tmp_path / "cut"), str(tmp_path / "rows.npy")]) == 0


def test_the_command_says_what_was_removed(
    hidden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("fedveil.export.distil.STEPS", 5)
    np.save(tmp_path / "public.npy", np.random.default_rng(0).random((50, 64), np.float32))
    words = ["export", str(hidden), "--to", "safetensors", "--allow-module", __name__]
    assert fedveil([*words, "--prune", "0.25"]) == 0
    said = capsys.readouterr().out
    assert (
        "channels   24 of 32 of layer 0\n" in said
        and "tuned      no; public data of --public tune it\n" in said
    )
    assert "safetensors-pruned-0.25/model.safetensors" in said
    assert fedveil([*words, "--prune", "weights:0.9", "--public", str(tmp_path / "public.npy")]) == 0
    said = capsys.readouterr().out
    assert "zeros      88.4% of the numbers; " in said and "tuned      on public data\n" in said


@pytest.mark.parametrize("text", ["0", "1", "-0.5", "nan", "half", "weights", "weights:", "rows:0.5", ""])
def test_another_share_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="give a share of the channels"):
        pruning_of(text)


def test_a_pruning_goes_with_no_student_and_no_folder(hidden: Path) -> None:
    with pytest.raises(Refusal, match="is of the released model"):
        export(hidden, Order("int8", "small:Net", Path("public.npy"), prune=Pruning(0.5)))
    with pytest.raises(Refusal, match="another does not suit task=digits"):
        export(hidden, Order("peft", prune=Pruning(0.5)))
