"""Compressed updates on both links: the mean of what was kept comes back, and all else of a round stays as it was."""

import math
import runpy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from shared.runs import run_quietly
from torch import Tensor, nn

from fedveil.base.refusal import Refusal
from fedveil.client.dp_sgd.rounds import GradientClip, step, step_of
from fedveil.client.private_update import compressed, private_update
from fedveil.configs.settings import settings_from_overrides
from fedveil.configs.training_settings import CompressionSettings, NoCompression
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.record_settings import StepTerms
from fedveil.messages.training_order import RecordTerms
from fedveil.messages.wire import WEIGHT, instruct, memory_arrays, only_arrays, view
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Unit
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.compression import (
    Compression,
    CompressionKind,
    CompressionPlan,
    compress,
    expand,
    sketch_of,
)
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec, compressed_spec
from fedveil.privacy.plan import Plan
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import SumPrivacy, SumTerms
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.cohorts import All
from fedveil.strategies.registry import make_strategy
from fedveil.tasks.data import Examples

MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "masked_clients.py"))
CLIENTS, Clients, LAYOUT, masking, update_of = (
    MADE[name] for name in ("CLIENTS", "Clients", "LAYOUT", "masking", "update_of")
)
KINDS = pytest.mark.parametrize("kind", ["mask", "project"])
START = {name: np.full(shape, 0.5, np.float32) for name, shape in LAYOUT.items()}
SIZE = sum(math.prod(shape) for shape in LAYOUT.values())
RATIO, KEPT = 0.25, 5
SEED = Randomness(4).stream("compression").bytes(32).hex()


def open_clients(absent: Iterable[int] = ()) -> InProcessGrid:
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        client = int(str(context.node_config["partition-id"]))
        if client in absent:
            return Message(Error(1, "gone"), reply_to=message)
        arrays = {k: v.numpy() + update_of(client)[k] for k, v in only_arrays(message.content).items()}
        metrics = MetricRecord({WEIGHT: client + 1, "loss": 1.0})
        return Message(RecordDict({"a": memory_arrays(arrays), "m": metrics}), reply_to=message)

    return InProcessGrid(app, CLIENTS, {})


def grid_of(inner: InProcessGrid, compress: CompressionPlan | None, **options: Any) -> PrivateGrid:
    everybody = Participants(inner, All(), CLIENTS)
    return PrivateGrid(
        everybody, randomness=Randomness(4), run="run", terms=SumTerms(compress=compress), **options
    )


def moved(grid: PrivateGrid, number: int = 1) -> dict[str, np.ndarray]:
    strategy = make_strategy("fedavg", {})
    messages = strategy.configure_train(number, memory_arrays(START), ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
    assert arrays is not None
    return {name: view(arrays[name]) - START[name] for name in LAYOUT}


def mean_update(weights: Iterable[float]) -> dict[str, np.ndarray]:
    given = list(weights)
    return {
        name: np.average([update_of(c)[name] for c in range(CLIENTS)], axis=0, weights=given)
        for name in LAYOUT
    }


@pytest.fixture
def ledger(tmp_path: Path) -> Iterable[Ledger]:
    with Ledger.open(tmp_path / "l", Budget(Unit.CLIENT, 1e9, 1e-5), owner="test", simulated=True) as opened:
        yield opened


@KINDS
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
@pytest.mark.parametrize("row", [1, 2])
def test_mean_of_the_sent_coordinates_comes_back_with_its_gain(
    kind: CompressionKind, masked: bool, row: int
) -> None:
    links = {"masking": masking()} if masked else {}
    grid = grid_of(Clients() if masked else open_clients(), CompressionPlan(kind, RATIO), **links)
    grid.skip_to(row - 1)
    sketch = sketch_of(Compression(kind, SIZE, KEPT, SEED), row)
    expected = expand(compress(mean_update(range(1, CLIENTS + 1)), sketch), LAYOUT, sketch)
    found = moved(grid, row)
    for name in LAYOUT:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-3)


@KINDS
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_clients_are_clipped_and_charged_as_without_compression(
    kind: CompressionKind, masked: bool, ledger: Ledger
) -> None:
    """Each client's norm is that of what is kept; the release on the ledger is the same, and so is the noise's energy."""
    noise, clip = 1.0, 0.5
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), clip, 10, noise)
    links = {"masking": masking()} if masked else {}
    grid = grid_of(
        Clients() if masked else open_clients(),
        CompressionPlan(kind, RATIO),
        privacy=SumPrivacy(plan, ledger),
        **links,
    )
    found = moved(grid)
    assert ledger.events(Adversary.MODEL) == [plan.event_of(1)]
    assert grid.released is not None
    (seen,) = grid.released.layers
    assert seen.size == KEPT and grid.released.noise == pytest.approx(noise)
    assert np.linalg.norm(seen) < CLIENTS + 6 * noise * math.sqrt(KEPT)
    sent = np.concatenate([found[name].ravel() for name in LAYOUT]) * CLIENTS / clip
    # The way back is orthogonal, with a gain of d / k over the root of k / d.
    assert np.linalg.norm(sent) == pytest.approx(np.linalg.norm(seen) * math.sqrt(SIZE / KEPT), rel=1e-3)


@KINDS
def test_dropout_is_a_zero_in_the_sent_coordinates(kind: CompressionKind, ledger: Ledger) -> None:
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), 20.0, 10, 2e-3)
    grid = grid_of(
        open_clients(absent=(0, 5)), CompressionPlan(kind, RATIO), privacy=SumPrivacy(plan, ledger)
    )
    here = [float(client not in (0, 5)) for client in range(CLIENTS)]
    sketch = sketch_of(Compression(kind, SIZE, KEPT, SEED), 1)
    share = {name: value * sum(here) / CLIENTS for name, value in mean_update(here).items()}
    expected = expand(compress(share, sketch), LAYOUT, sketch)
    found = moved(grid)
    assert grid.rounds.newest[0].dropped == {"failed": 2}
    for name in LAYOUT:
        np.testing.assert_allclose(found[name], expected[name], atol=0.05)


def test_a_grid_of_256_cells_gives_the_same_mean_up_to_its_rounding(ledger: Ledger) -> None:
    clip = 20.0
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), clip, 10, 2e-3)
    found, fine = (
        moved(
            grid_of(open_clients(), CompressionPlan("project", 1.0, cells), privacy=SumPrivacy(plan, ledger))
        )
        if cells
        else moved(grid_of(open_clients(), None))
        for cells in (256, None)
    )
    expected = mean_update([1.0] * CLIENTS)
    # Noise of 8 grid units of smoothing, and half a unit of rounding a client: in the mean about one of 256 / 20.
    for name in LAYOUT:
        np.testing.assert_allclose(found[name], expected[name], atol=6 * clip / 256)
    assert fine.keys() == found.keys()


def test_mask_drops_coordinates_and_masks_differ_between_rounds() -> None:
    kept: list[frozenset[int]] = []
    grid = grid_of(open_clients(), CompressionPlan("mask", RATIO))
    for number in (1, 2, 3):
        flat = np.concatenate([each.ravel() for each in moved(grid, number).values()])
        kept.append(frozenset(np.flatnonzero(flat).tolist()))
    assert [len(each) for each in kept] == [KEPT] * 3
    assert len(set(kept)) == 3
    resumed = grid_of(open_clients(), CompressionPlan("mask", RATIO))
    resumed.skip_to(2)
    again = np.concatenate([each.ravel() for each in moved(resumed, 3).values()])
    assert frozenset(np.flatnonzero(again).tolist()) == kept[2]


def test_masks_follow_from_a_runs_name_or_a_simulations_seed() -> None:
    def kept(run: str, seed: int | None) -> bytes:
        everybody = Participants(open_clients(), All(), CLIENTS)
        plan = CompressionPlan("mask", RATIO)
        grid = PrivateGrid(everybody, randomness=Randomness(seed), run=run, terms=SumTerms(compress=plan))
        return np.concatenate([each.ravel() for each in moved(grid).values()]).astype(np.float32).tobytes()

    assert kept("a", 4) == kept("b", 4) != kept("a", 5)
    assert kept("a", None) == kept("a", None) != kept("b", None)


class Brief(nn.Sequential):
    """A model with numbers that NumPy lacks: the first, which do not travel, and the last, which would."""

    def __init__(self) -> None:
        first = nn.Linear(64, 10, dtype=torch.bfloat16).requires_grad_(False)
        super().__init__(first, nn.Linear(10, 10, dtype=torch.bfloat16))


class Wide(nn.Sequential):
    """A model of more coordinates than 256 cells are enough for."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 900), nn.Linear(900, 10))


# --- records ------------------------------------------------------------------------------------------------------


class Classes:
    """What a step needs of a task: its loss."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


@KINDS
@pytest.mark.parametrize("engine", ["hooks", "one_by_one", "auto"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_records_gradient_is_compressed_before_it_is_clipped(kind: str, engine: str) -> None:
    """By hand: each gradient by itself, compressed, clipped to what is kept of the norm, and added up."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    examples = Examples(3 * torch.randn(9, 5), torch.arange(9) % 3)
    examples.inputs[4, 2] = math.nan
    layout = {name: tuple(p.shape) for name, p in model.named_parameters()}
    size = sum(p.numel() for p in model.parameters())
    sketch = sketch_of(Compression(kind, size, size // 4), 7)
    norm = 0.3 * sketch.compression.clip_factor
    expected = np.zeros(sketch.compression.kept)
    cut = 0
    for row in range(9):
        if row == 4:
            continue
        loss = Classes().loss(model(examples.inputs[row : row + 1]), examples.targets[row : row + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        kept = sketch.of(np.concatenate([each.numpy().ravel() for each in gradients]))
        length = float(np.linalg.norm(kept))
        cut += length > norm
        expected += kept * min(1.0, norm / length)
    assert cut > 4
    clip = GradientClip(norm, engine, sketch)
    update = step(model, Classes(), examples, np.arange(9), clip, 0.5, layout)
    (found,) = compress(update, sketch).values()
    np.testing.assert_allclose(found, -0.5 * expected, atol=1e-5)


@KINDS
def test_record_is_clipped_by_its_compressed_norm(kind: str) -> None:
    """In a round: whatever its gradient, no record adds more than the sum's noise is for."""
    model = nn.Linear(5, 3)
    whole = SumSpec(2.0, unit_norm=0.2)
    spec = compressed_spec(whole, Compression(kind, 18, 6))
    content = RecordDict(
        {"arrays": memory_arrays({n: p.detach().numpy() for n, p in model.named_parameters()})}
    )
    sent = instruct(content, spec, "run", 5)
    settings = ClientSettings(
        "made",
        LocalTraining(learning_rate=0.4),
        step=StepTerms(RecordTerms(8.0, 1e-5, 0.5, Adjacency.ZERO_OUT, sample_rate=1.0)),
    )
    inputs = 1e3 * torch.ones(1, 5)
    far = Examples(inputs, model(inputs).argmin(1))  # not of the class that it is taken for already
    update = step_of(model, Classes(), settings, sent, far, np.array([0]))
    (left,) = compressed(update, sent, spec).values()
    assert spec.unit_norm is not None
    assert 0.9 * spec.unit_norm < np.linalg.norm(left) <= spec.unit_norm * (1 + 1e-6)


class Signs:
    """Two classes by the sign of one output: a record far away on the wrong side has its inputs as its gradient."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.float())


@KINDS
@pytest.mark.parametrize("engine", ["hooks", "one_by_one"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_record_compressed_to_nothing_does_not_drown_the_others(kind: str, engine: str) -> None:
    """The matrix is public: a record can be a row that is not kept, as long as float32 goes."""
    size = 64
    sketch = sketch_of(Compression(kind, size, 16), 3)
    every = replace(sketch, compression=Compression(kind, size, size))
    dropped = next(row for row in map(every.back, np.eye(size)) if np.linalg.norm(sketch.of(row)) < 1e-12)
    far = torch.from_numpy(np.rint(dropped / np.abs(dropped).max())).float() * 2.0**60
    torch.manual_seed(1)
    model, others = nn.Linear(size, 1, bias=False), torch.randn(50, size)
    wrong = (model(far[None])[0] < 0).long()
    clip = GradientClip(sketch.compression.clip_factor, engine, sketch)

    def left(data: Examples) -> np.ndarray:
        update = step(model, Signs(), data, np.arange(len(data)), clip, 1.0, {"weight": (1, size)})
        return compress(update, sketch)["compressed"]

    without = left(Examples(others, torch.ones(50, dtype=torch.int64)))
    beside = Examples(torch.cat([others, far[None]]), torch.cat([torch.ones(50, dtype=torch.int64), wrong]))
    assert np.linalg.norm(without) > 2 * clip.max_grad_norm
    assert np.linalg.norm(left(beside) - without) <= clip.max_grad_norm


def test_an_engine_that_holds_no_gradient_cannot_compress_one() -> None:
    model = nn.Linear(5, 3)
    sketch = sketch_of(Compression("mask", 18, 5), 1)
    clip = GradientClip(0.3, "book_keeping", sketch)
    examples = Examples(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64))
    layout = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(Refusal, match="does not hold whole gradients"):
        step(model, Classes(), examples, np.arange(4), clip, 0.5, layout)


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "field", "said"),
    [
        (["compress=top_k"], "compress", "a release"),
        (["compress=client_mask"], "compress", "no sum"),
        (["compress=mask_after_clip"], "compress", "signal falls"),
        (["compress=fixed_projection"], "compress", "never learned"),
        (["compress=other"], "compress", "there is no such option"),
        (["compress=mask", "compress.ratio=0"], "compress.ratio", "above 0"),
        (["compress=project", "compress.ratio=1.5"], "compress.ratio", "at most 1"),
        (
            ["compress=mask", "cohort=min_separation", "privacy.noise=correlated"],
            "compress.name",
            "compression draws new ones",
        ),
        (
            ["compress=mask", "privacy=record_distributed", "cohort=all", "privacy.gradients=ghost"],
            "privacy.gradients",
            "before it is clipped",
        ),
        (["compress=mask", "compress.cells=256"], "compress.cells", "rounded to zero"),
        (["compress=project", "compress.cells=255"], "compress.cells", "256"),
        (
            ["compress=project", "compress.cells=256", "privacy=client_distributed"],
            "compress.cells",
            "secagg.bits",
        ),
        (["compress=project", "compress.cells=256", "privacy=none"], "compress.cells", "on no grid"),
    ],
    ids=str,
)
def test_setting_that_breaks_the_guarantee_is_refused_by_name(
    overrides: list[str], field: str, said: str
) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        settings_from_overrides(overrides)
    assert field in str(refused.value)


def test_grid_that_would_round_an_update_to_nothing_is_refused(
    tmp_path: Path,
) -> None:
    kept = CompressionPlan("project", 0.5, 256).of(2 * 256**2).kept
    assert kept == 256**2
    with pytest.raises(Refusal, match=r"compress\.cells=256: rounds most of 65537 coordinates .*give 257 or"):
        CompressionPlan("project", 0.5, 256).of(2 * 256**2 + 2)
    asked = ["task=digits", f"task.model={__name__}:Wide", f"allow_modules=[{__name__}]"]
    asked += ["compress=project", "compress.ratio=1", "compress.cells=256"]
    with pytest.raises(Refusal, match=r"compress\.cells=256: rounds most"):
        run_quietly(asked, tmp_path / "run")
    with pytest.raises(Refusal, match=r"1\.weight in bfloat16'?: cannot travel"):
        asked = ["task=digits", f"task.model={__name__}:Brief", f"allow_modules=[{__name__}]"]
        run_quietly(asked, tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_settings_of_compression() -> None:
    assert settings_from_overrides([]).compress == NoCompression()
    assert settings_from_overrides(["compress=mask"]).compress == CompressionSettings(name="mask")
    found = settings_from_overrides(["compress=project", "compress.ratio=0.1", "compress.cells=256"]).compress
    assert found == CompressionSettings(name="project", ratio=0.1, cells=256)
