"""Tasks: what the shipped ones hold, what bad data is told, and tasks of the user's own."""

import gzip
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedveil.base.refusal import Refusal
from fedveil.tasks import Examples, Task, check_examples, load_task
from fedveil.tasks.classification import classification, softmax_regression
from fedveil.tasks.partition import Partition
from fedveil.tasks.shipped import fashion_mnist as fashion
from fedveil.tasks.shipped import scattering
from fedveil.tasks.shipped.heart import BOUND, HOSPITALS, MEASURED, encode
from fedveil.tasks.shipped.mnist5k import FEATURES, gabor_filters, oriented_energies, straightened

INSTALLED = ("mnist5k", "digits", "heart")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: load_task(name) for name in INSTALLED}


@pytest.mark.parametrize(
    ("name", "clients", "train", "held_out"),
    [("mnist5k", 400, 4000, 1000), ("digits", 100, 1437, 360), ("heart", 4, 736, 184)],
)
def test_shipped_tasks_hold_all_of_their_data(
    tasks: dict[str, Task], name: str, clients: int, train: int, held_out: int
) -> None:
    task = tasks[name]
    assert isinstance(task, Task)
    assert task.simulated
    assert task.num_clients == clients
    assert sum(len(task.client_data(client)) for client in range(clients)) == train
    assert len(task.held_out()) == held_out


@pytest.mark.parametrize("name", INSTALLED)
def test_loading_again_gives_the_same_bytes(tasks: dict[str, Task], name: str) -> None:
    torch.rand(3)
    again = load_task(name, {})
    for ours, theirs in (
        (tasks[name].client_data(1), again.client_data(1)),
        (tasks[name].held_out(), again.held_out()),
    ):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)
    state, other = tasks[name].model().state_dict(), again.model().state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)


def test_the_held_out_examples_do_not_depend_on_the_seed(tasks: dict[str, Task]) -> None:
    other = load_task("digits", {"seed": 9, "num_clients": 7, "partition": "shards"})
    assert torch.equal(other.held_out().inputs, tasks["digits"].held_out().inputs)
    assert other.num_clients == 7


@pytest.mark.parametrize("name", INSTALLED)
def test_models_take_the_inputs_and_leave_the_random_state_alone(tasks: dict[str, Task], name: str) -> None:
    before = torch.random.get_rng_state()
    model = tasks[name].model()
    assert torch.equal(before, torch.random.get_rng_state())
    data = tasks[name].client_data(0)
    outputs = model(data.inputs)
    loss = tasks[name].loss(outputs, data.targets)
    # A softmax that starts at zero finds all classes equally likely.
    assert loss.item() == pytest.approx(np.log(outputs.shape[1]), rel=1e-5)
    assert 0 <= tasks[name].metrics(outputs, data.targets)["accuracy"] <= 1


@pytest.mark.parametrize(("name", "least"), [("mnist5k", 0.96), ("digits", 0.93), ("heart", 0.75)])
def test_the_pooled_data_can_be_learned(tasks: dict[str, Task], name: str, least: float) -> None:
    task = tasks[name]
    clients = [task.client_data(client) for client in range(task.num_clients)]
    inputs, targets = (torch.cat([getattr(data, part) for data in clients]) for part in ("inputs", "targets"))
    model = task.model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets) + 1e-4 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    held_out = task.held_out()
    with torch.no_grad():
        assert task.metrics(model(held_out.inputs), held_out.targets)["accuracy"] >= least


@pytest.mark.parametrize("client", [-1, 4])
def test_a_client_that_is_not_there_is_refused(tasks: dict[str, Task], client: int) -> None:
    with pytest.raises(Refusal, match="from 0 to 3"):
        tasks["heart"].client_data(client)


def test_mnist_features_have_length_one(tasks: dict[str, Task]) -> None:
    inputs = tasks["mnist5k"].held_out().inputs
    assert inputs.shape[1] == FEATURES
    assert torch.allclose(inputs.norm(dim=1), torch.ones(len(inputs)), atol=1e-5)


def test_features_of_an_image_depend_on_that_image_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    images[5] = 0
    together = oriented_energies(images)
    assert np.allclose(together[2], oriented_energies(images[2:3])[0], atol=1e-6)
    assert not together[5].any()
    assert np.isfinite(together).all()


def test_features_tell_orientations_apart() -> None:
    bars = np.zeros((2, 28, 28), np.uint8)
    bars[0, 6:22, 13:15] = 255
    bars[1, 13:15, 6:22] = 255
    upright, flat = oriented_energies(bars)
    assert upright @ flat < 0
    assert torch.allclose(gabor_filters().sum((1, 2, 3)), torch.zeros(8), atol=1e-6)


def test_straightening_takes_out_the_slant() -> None:
    image = np.zeros((1, 28, 28), np.float32)
    for row in range(6, 22):
        image[0, row, (row + 14) // 2 : (row + 14) // 2 + 2] = 1
    columns = np.arange(28)
    upper, lower = (
        (part @ columns / part.sum(1)).mean()
        for straight in [straightened(image)[0]]
        for part in (straight[6:14], straight[14:22])
    )
    assert abs(upper - lower) < 0.5
    upright = np.zeros((1, 28, 28), np.float32)
    upright[0, 6:22, 13:15] = 1
    assert np.allclose(straightened(upright), upright, atol=1e-5)


def test_heart_hospitals_are_the_clients(tasks: dict[str, Task]) -> None:
    sizes = [len(tasks["heart"].client_data(client)) for client in range(len(HOSPITALS))]
    # Held out by outcome: 28 + 33 of 304 patients, 21 + 37 of 293, 23 + 2 of 123, 30 + 10 of 200.
    assert sizes == [243, 235, 98, 160]
    everything = torch.cat([tasks["heart"].client_data(client).inputs for client in range(4)])
    assert everything.abs().max() <= BOUND
    with pytest.raises(Refusal, match="has 4 clients"):
        load_task("heart", {"num_clients": 5})
    assert load_task("heart", {"num_clients": 5, "partition": "iid"}).num_clients == 5


def test_missing_values_of_a_patient_are_zero_for_any_others() -> None:
    names = (
        "age",
        "trestbps",
        "chol",
        "thalch",
        "oldpeak",
        "ca",
        "sex",
        "cp",
        "fbs",
        "restecg",
        "exang",
        "slope",
        "thal",
    )
    blank = dict.fromkeys(names, "")
    assert not any(encode(blank))
    assert not any(encode({**blank, "trestbps": "0", "chol": "0"}))
    assert encode({**blank, "age": "70"})[list(MEASURED).index("age")] == 2.0
    assert encode({**blank, "chol": "603"})[list(MEASURED).index("chol")] == BOUND


GOOD = Examples(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize(
    ("examples", "reason"),
    [
        (Examples(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), "no examples"),
        (
            Examples(
                torch.tensor([[1.0, float("nan")], [float("nan"), 0.0]]), torch.zeros(2, dtype=torch.int64)
            ),
            "2 NaN",
        ),
        (Examples(torch.tensor([[float("inf")]]), torch.zeros(1, dtype=torch.int64)), "1 NaN or infinite"),
        (Examples(torch.zeros(3, 1), torch.tensor([0, 2, -1])), "2 labels out of range.*from 0 to 1"),
        (Examples(torch.zeros(3, 1), torch.tensor([0, 1])), "equally many"),
    ],
)
def test_bad_data_are_refused_with_the_count(examples: Examples, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        check_examples(examples, 2)
    for train, test in ((examples, GOOD), (GOOD, examples)):
        with pytest.raises(Refusal, match=reason):
            classification(train, test, 2, Partition("iid", 1), lambda: softmax_regression(3, 2))


def test_good_data_pass_unchanged() -> None:
    assert check_examples(GOOD, 2) is GOOD
    words = Examples(torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]))
    assert check_examples(words, 2) is words


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("mnist", {}, "mnist5k, digits, heart, fashion_mnist"),
        ("digits", {"num_client": 3}, "num_client"),
        ("digits", {"partition": "random"}, "natural, iid, dirichlet, shards"),
        ("digits", {"partition": "natural"}, "do not name owners"),
        ("digits", {"num_clients": 1438}, "only 1437 examples"),
        ("my_module:Mine", {}, "its module is not allowed"),
        ("os:system", {}, "its module is not allowed"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(name: str, options: dict[str, object], reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        load_task(name, options)


class Coins:
    """A task as a user writes it: no class of ours above it."""

    simulated = False
    num_clients = 3

    def __init__(self, flips: int = 5) -> None:
        self.flips = flips

    def model(self) -> nn.Module:
        return softmax_regression(1, 2)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client: int) -> Examples:
        return Examples(
            torch.full((self.flips, 1), float(client)), torch.zeros(self.flips, dtype=torch.int64)
        )

    def held_out(self) -> Examples:
        return self.client_data(0)


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("coins_of_mine")
    module.Coins = Coins  # type: ignore[attr-defined]
    module.Half = type("Half", (), {"simulated": True, "num_clients": 1})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_task_of_ones_own_gets_its_options(own_module: str) -> None:
    task = load_task(f"{own_module}:Coins", {"flips": 7}, allow=(own_module,))
    assert isinstance(task, Coins)
    assert len(task.client_data(2)) == 7


@pytest.mark.parametrize(
    ("attribute", "options", "allow", "reason"),
    [
        ("Coins", {}, ("another",), "allowed: another"),
        ("Coin", {}, ("coins_of_mine",), "cannot be imported"),
        ("Coins", {"flops": 1}, ("coins_of_mine",), "flops"),
        ("Half", {}, ("coins_of_mine",), "lacks client_data, held_out, loss, metrics, model"),
    ],
)
def test_a_task_of_ones_own_that_does_not_fit_is_refused(
    own_module: str, attribute: str, options: dict[str, object], allow: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(Refusal, match=reason):
        load_task(f"{own_module}:{attribute}", options, allow)


def test_an_allowed_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(Refusal, match="cannot be imported"):
        load_task("no_such_module_here:Task", {}, ("no_such_module_here",))


def test_digits_are_those_of_scikit_learn(tasks: dict[str, Task]) -> None:
    pixels, digits = load_digits(return_X_y=True)
    held_out = np.random.default_rng(1797).permutation(len(digits))[:360]
    found = tasks["digits"].held_out()
    expected = pixels[held_out] / np.linalg.norm(pixels[held_out], axis=1, keepdims=True)
    assert np.array_equal(found.inputs, expected.astype(np.float32))
    assert np.array_equal(found.targets, digits[held_out])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fedveil.tasks.digits", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(Refusal, match=r"scikit-learn.*fedveil\[simulation\]"):
        load_task("digits")


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    generator = np.random.default_rng(1)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels, labels = (
            generator.integers(0, 256, (count, 28, 28), np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
        )
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(pixels)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(labels)))
    return tmp_path


def test_fashion_mnist_reads_its_files_and_stores_their_features(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", clothes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task = load_task("fashion_mnist", {"num_clients": 8})
    data = task.client_data(3)
    assert data.inputs.shape == (5, 3969) and data.inputs.dtype == torch.float32
    norms = data.inputs.norm(dim=1)
    assert norms.min() > 30 and norms.max() < 63.1
    assert task.held_out().targets.tolist() == list(range(10)) * 2
    monkeypatch.setattr(fashion, "features", None)  # what is kept is not made again
    again = load_task("fashion_mnist", {"num_clients": 8})
    assert torch.equal(again.client_data(3).inputs, data.inputs)
    pixels, path = np.zeros((1, 28, 28), np.uint8), clothes / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(_idx(pixels)))
    with pytest.raises(TypeError):  # other pictures have other features
        fashion.read_examples(clothes, "t10k")


def test_scattering_is_kymatios() -> None:
    """The fixture is ScatteringTorch2D(J=2, shape=(28, 28)) of kymatio 0.3.0 on these images."""
    noise, shape = np.random.default_rng(7).random((2, 28, 28)).astype(np.float32)
    shape[:, :14] = 0
    shape[8:20, 14:] = 1
    images = torch.from_numpy(np.stack([noise, shape]))
    expected = torch.from_numpy(np.load(Path(__file__).parents[1] / "fixtures" / "kymatio_scattering.npy"))
    found = scattering.Wavelets(28, 28)(images)
    assert found.shape == expected.shape == (2, 81, 7, 7)
    assert (found - expected).abs().max() < 1e-4
    assert scattering.normalised(found) == pytest.approx(scattering.normalised(expected), abs=1e-3)
    alone = scattering.features(images[1:])
    assert torch.equal(scattering.features(images)[1:], alone)
    assert alone.float().unflatten(1, (27, -1)).mean(2).abs().max() < 1e-3


def test_a_part_of_a_set_is_transformed_as_the_whole_is() -> None:
    images = torch.rand(7, 28, 28, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(scattering.features(images, batch=3), scattering.features(images), atol=2e-3)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw + b"\0", "too long"),
        (lambda raw: raw[:6], "not an IDX file"),
        (lambda raw: b"\0\0\x0d\x03" + raw[4:], "not an IDX file"),
        (lambda raw: raw[:8] + struct.pack(">I", 14) + raw[12:], "not an IDX file"),
    ],
)
def test_a_damaged_file_is_refused(clothes: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    path = clothes / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(Refusal, match=reason):
        fashion.read_idx(path, dimensions=3)


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b"abc" * 100, mtime=0)[:-9], None])
def test_a_file_that_cannot_be_unpacked_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Refusal, match="cannot be read"):
        fashion.read_idx(path, dimensions=1)


def test_without_files_one_sentence_names_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(Refusal, match=r"dataset-fashion-mnist .* or torchvision"):
        load_task("fashion_mnist")


def test_torchvision_downloads_into_the_cache(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(root: str, download: bool) -> None:
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for file in clothes.glob("*.gz"):
            (raw / file.name).write_bytes(file.read_bytes())

    torchvision = types.ModuleType("torchvision.datasets")
    torchvision.FashionMNIST = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", torchvision)
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load_task("fashion_mnist", {"num_clients": 4}).num_clients == 4
    assert (tmp_path / "cache" / "fedveil" / "FashionMNIST" / "raw").is_dir()
