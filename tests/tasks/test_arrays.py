"""The base of a model, which stays where it is: frozen parameters, packed weights, constants."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.tasks import Classes
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import spectral_norm

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.client.training.in_place import check_apart
from fedveil.client.training.sgd import train
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.run.manifest import read_manifest
from fedveil.run.released import model_of
from fedveil.server import checkpoint
from fedveil.tasks.arrays import (
    agreement_of,
    base_check,
    base_of,
    check_base,
    dimension_of,
    holds_arrays,
    read_arrays,
)

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

WIDTH, CLIENTS = 64, 40


class Packed(nn.Module):
    """A layer of 4-bit weights, kept as buffers of a module that has no parameter."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(WIDTH, WIDTH)
        scales = weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("packed", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.packed.float() * self.scales)


class Adapted(nn.Module):
    """A base, and an adapter of rank 2 beside it."""

    def __init__(self, base: nn.Module, out: int = WIDTH) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, out)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.up(self.down(inputs))


class Evaluated(nn.Module):
    """A module that stays in evaluation mode, as a frozen backbone has to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)

    def train(self, mode: bool = True) -> "Evaluated":
        super().train(mode)
        self.inner.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


def backbone() -> nn.Module:
    return Evaluated(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()))


def nf4() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(
        WIDTH, WIDTH, bias=False, quant_type="nf4", compute_dtype=torch.float32
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(WIDTH, WIDTH), requires_grad=False, quant_type="nf4"
    )
    return layer.to("cpu").requires_grad_(False)


def of_torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).requires_grad_(False)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


@dataclass(frozen=True)
class Made(Classes):
    """Points of two classes, and a model on some base."""

    base: Callable[[], nn.Module]
    num_clients = CLIENTS
    held_out_client = 10_000

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(Adapted(self.base()), nn.Linear(WIDTH, 2))

    def client_data(self, client: int) -> fv.Examples:
        inputs = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(client))
        return fv.Examples(inputs, (inputs.sum(1) > 0).long())


TRAINED = 2 * WIDTH + 2 * WIDTH + WIDTH + 2 * WIDTH + 2
BASES = {"packed": Packed, "backbone": backbone, "nf4": nf4, "torchao": of_torchao}


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    """Return the base's values; of another library's tensor, what it computes."""
    plain = {
        name: value.detach() if type(value) in (Tensor, nn.Parameter) else value.data
        for name, value in base_of(model).items()
    }
    dense = {name: value if type(value) is Tensor else value.dequantize() for name, value in plain.items()}
    return {name: value.numpy().tobytes() for name, value in dense.items()}


@pytest.mark.parametrize(
    "privacy", ["none", "client_central", "client_distributed", "record", "record_distributed"]
)
@pytest.mark.parametrize("base", BASES)
def test_a_base_is_the_same_to_the_bit_after_three_rounds(
    base: str, privacy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = Made(BASES[base])
    if base == "backbone" and privacy.startswith("record"):
        pytest.skip("batch normalisation is refused there")
    modes = {"none": "none", "record": fv.Record(target_epsilon=50.0)}
    modes |= {"client_central": fv.ClientCentral(target_epsilon=50.0, allow_large_delta=True)}
    modes |= {"client_distributed": fv.ClientDistributed(target_epsilon=50.0, allow_large_delta=True)}
    modes |= {"record_distributed": fv.RecordDistributed(target_epsilon=50.0)}
    run = fv.simulate(task, privacy=modes[privacy], num_rounds=3, quiet=True, seed=0, cohort=fv.All())
    before = bytes_of(task.model())
    assert before and bytes_of(run.model) == before
    assert dimension_of(task) == TRAINED
    kept = checkpoint.read(run.folder)
    assert kept is not None and sum(each.size for each in kept.state.arrays.values()) == TRAINED


def shifted() -> nn.Module:
    """Return a base that differs in one number of a buffer."""
    base = Packed()
    base.scales[3] += 1e-6
    return base


def test_a_run_on_another_base_is_not_resumed_and_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = fv.simulate(Made(Packed), privacy="none", folder=folder, num_rounds=1, quiet=True, seed=0)
    assert (folder / "base.json").is_file() and "base.json" in read_manifest(folder).files
    assert bytes_of(model_of(folder, Made(Packed))) == bytes_of(run.model)
    with pytest.raises(Refusal, match="another base"):
        model_of(folder, Made(shifted))
    (folder / "result.json").unlink()
    with pytest.raises(Refusal, match=r"started with another base\.json"):
        fv.simulate(Made(shifted), resume=folder, quiet=True)


@pytest.mark.parametrize("base", BASES)
def test_server_and_clients_agree_on_a_base_by_its_values(base: str) -> None:
    task = Made(BASES[base])
    assert agreement_of(task) == agreement_of(task) != agreement_of(Made(shifted))
    assert agreement_of(Made(Packed)) not in (agreement_of(Made(shifted)), None)
    assert agreement_of(Made(lambda: nn.Linear(WIDTH, WIDTH))) is None


def test_old_checkpoints_and_model_files_hold_the_base_as_well() -> None:
    model = Made(Packed).model()
    sent = read_arrays(model)
    whole = {name: value.numpy() for name, value in model.state_dict().items()}
    assert set(whole) - set(sent) == {"0.base.packed", "0.base.scales"}
    assert holds_arrays(model, sent) and holds_arrays(model, whole)
    assert not holds_arrays(model, {**sent, "other": sent["1.bias"]})
    assert not holds_arrays(model, {name: sent[name] for name in list(sent)[1:]})


class Constant(nn.Module):
    """A buffer of a module without parameters; training may change it."""

    def __init__(self, changes: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.changes = changes

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and self.changes:
            self.mean += 0.1 * (inputs.detach().mean(0) - self.mean)
        return inputs - self.mean


class Declared(Constant):
    """As torch's normalisations say it."""

    track_running_stats = True


class Own(nn.Linear):
    """A trained module with a buffer."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(1))


class Pinned(Own):
    """A trained module whose buffer is a constant."""

    track_running_stats = False


@pytest.mark.parametrize(
    ("layer", "sent"),
    [
        (nn.BatchNorm1d(WIDTH), {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}),
        (nn.BatchNorm1d(WIDTH, affine=False), {"running_mean", "running_var", "num_batches_tracked"}),
        (nn.BatchNorm1d(WIDTH).requires_grad_(False), set()),
        (
            nn.InstanceNorm1d(WIDTH, track_running_stats=True),
            {"running_mean", "running_var", "num_batches_tracked"},
        ),
        (
            spectral_norm(nn.Linear(2, 2, bias=False)),
            {
                "parametrizations.weight.original",
                "parametrizations.weight.0._u",
                "parametrizations.weight.0._v",
            },
        ),
        (spectral_norm(nn.Linear(2, 2, bias=False)).requires_grad_(False), set()),
        (Packed(), set()),
        (Constant(), set()),
        (Declared(), {"mean"}),
        (Own(), {"weight", "bias", "seen"}),
        (Own().requires_grad_(False), set()),
        (Pinned(), {"weight", "bias"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sent_arrays_follow_from_the_model_alone(layer: nn.Module, sent: set[str]) -> None:
    model = nn.Sequential(layer)
    assert set(read_arrays(model)) == {f"0.{name}" for name in sent}
    assert set(base_of(model)) == set(model.state_dict()) - set(read_arrays(model))


@dataclass(frozen=True)
class Moving(Made):
    """As `Made`, on real data."""

    simulated = False


def frozen_norm() -> nn.Module:
    return nn.BatchNorm1d(WIDTH).requires_grad_(False)


@pytest.mark.parametrize(
    ("base", "name"), [(frozen_norm, "0.base.running_mean"), (lambda: Constant(True), "0.base.mean")]
)
def test_a_base_that_training_changes_is_refused_before_a_round(
    base: Callable[[], nn.Module], name: str, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=f"model='{name} of the base is changed by training'") as refused:
        fv.simulate(Made(base), privacy="client_central", folder=tmp_path / "run", quiet=True, num_rounds=2)
    assert "evaluation mode" in refused.value.remedy and "track_running_stats" in refused.value.remedy
    assert not (tmp_path / "run").exists()
    with pytest.raises(Refusal, match=name):
        check_apart(Workbench(ClientSettings("own", LocalTraining(batch_size=4)), Moving(base)))


def replaced_layer(layer: Any) -> None:
    layer.frozen = nn.Linear(3, 4).requires_grad_(False)


def replaced_parameter(layer: Any) -> None:
    layer.frozen.weight = nn.Parameter(layer.frozen.weight + 1, requires_grad=False)


def replaced_buffer(layer: Any) -> None:
    layer.frozen.scale = layer.frozen.scale + 1


def removed_parameter(layer: Any) -> None:
    layer.frozen.bias = None


def trained_parameter(layer: Any) -> None:
    layer.frozen.bias.requires_grad_(True)


def values(layer: Any) -> None:
    layer.frozen.weight.data.add_(1)


class FrozenBeside(nn.Module):
    """A frozen layer with a buffer, and one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(3, 4).requires_grad_(False), nn.Linear(3, 4)
        self.frozen.register_buffer("scale", torch.ones(4))


@pytest.mark.parametrize(
    "change",
    [replaced_layer, replaced_parameter, replaced_buffer, removed_parameter, trained_parameter, values],
)
def test_every_change_of_a_base_is_refused(change: Callable[[Any], None]) -> None:
    model = nn.Sequential(FrozenBeside())
    require = base_check(model)
    require()
    change(model[0])
    with pytest.raises(Refusal, match="of the base is changed by training"):
        require()


def test_other_objects_with_an_equal_base_are_not_refused() -> None:
    model = nn.Sequential(FrozenBeside())
    require = base_check(model)
    layer = model[0]
    layer.trained.weight = nn.Parameter(layer.trained.weight + 1)
    layer.frozen.weight = nn.Parameter(layer.frozen.weight.clone(), requires_grad=False)
    layer.extra = nn.Dropout()
    require()


def test_declared_running_statistics_are_averaged(tmp_path: Path) -> None:
    task = Made(lambda: Declared(True))
    run = fv.simulate(task, privacy="none", num_rounds=2, quiet=True, folder=tmp_path, cohort=fv.All())
    assert bool(run.model[0].base.mean.any())


@dataclass(frozen=True)
class Alone(Made):
    """Trains by a function of its own, which moves what is frozen."""

    frozen: str = "base.scales"

    def train(self, model: nn.Module, data: Any, training: LocalTraining) -> None:
        with torch.no_grad():
            model[0].get_buffer(self.frozen).mul_(1.5)


def test_client_does_not_release_an_update_of_its_base(tmp_path: Path) -> None:
    task = Alone(Packed)
    with pytest.raises(Refusal, match=r"0\.base\.scales of the base is changed by training"):
        train(task.model(), task, task.client_data(0), LocalTraining(batch_size=4), 0, 0)
    run = fv.simulate(task, privacy="none", folder=tmp_path, quiet=True, num_rounds=1)
    assert bytes_of(run.model) == bytes_of(task.model())
    assert run.history[0]["dropped"] == {"failed": run.history[0]["invited"]}


def test_nothing_of_one_client_in_the_base_reaches_the_next() -> None:
    """A base that a client moved is refused at each later one: nothing restores it."""
    task = Made(lambda: Constant(True))
    bench = Workbench(ClientSettings("own", LocalTraining(batch_size=4)), task)
    bench.forget()
    train(bench.model, task, task.client_data(0), LocalTraining(batch_size=4), 0, 0)
    for _ in range(2):
        with pytest.raises(Refusal, match=r"0\.base\.mean"):
            bench.forget()


def test_a_buffer_that_noise_alone_would_move_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fv.simulate(Made(Own), privacy="client_central", folder=tmp_path, quiet=True, num_rounds=1)
    assert "noise moves 0.base.seen" in capsys.readouterr().err
    assert check_base(Made(Own), torch.zeros(2, WIDTH)) == ["0.base.seen"]
    assert check_base(Made(Pinned), torch.zeros(2, WIDTH)) == []


class Extra(nn.Linear):
    """State that is no array."""

    def get_extra_state(self) -> object:
        return {"scale": 1.0}

    def set_extra_state(self, state: object) -> None:
        del state


@pytest.mark.parametrize("layer", [lambda: Extra(WIDTH, WIDTH), lambda: nn.LazyLinear(WIDTH)])
def test_state_that_is_no_array_is_refused_before_a_round(
    layer: Callable[[], nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match="cannot travel"):
        fv.simulate(Made(layer), privacy="client_central", folder=tmp_path / "run", quiet=True, num_rounds=2)
    assert not (tmp_path / "run").exists()
