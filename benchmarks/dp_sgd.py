"""Cost of DP-SGD beside plain SGD: a step of each engine on the same model and batch, on one thread, in CPU time."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ..base.refusal import Refusal
from ..client.dp_sgd.train import (
    NOISE_BLOCK,
    PrivateSteps,
    chosen_engine,
    lattice_of,
    train_privately,
)
from ..client.training.sgd import train, with_fast_kernels
from ..messages.local_training import LocalTraining
from ..privacy.budget import Adjacency, Unit
from ..privacy.mechanisms import discrete_gaussian
from ..privacy.mechanisms.discrete_gaussian import add_on_lattice
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.plan import Plan
from ..simulations.simulate import restoring_state
from ..strategies.record_plan import PoissonBatches
from ..tasks.data import Examples
from ..tasks.memory import keep_memory
from .engines import Options
from .made_task import Made
from .noise import by_numpy
from .stopwatch import cpu_milliseconds
from .tables import Row, conditions, ratio, result_of, spelled
from .workload import CLASSES, CLIPPING_NORM, LEARNING_RATE, NOISE_MULTIPLIER, build

# Examples of a batch, and steps of a turn: what is set up for a turn, and cold in it, is shared by as many.
BATCHES = {32: 16, 256: 4}
PLAIN, COMPILED, COMPILED_NOISE = "plain", "compiled", "compiled noise"
FUNCTORCH = "Opacus, functorch"
# `one_by_one` takes a backward pass for each example, as nobody would here.
MEASURED = ("hooks", "ghost", "book_keeping", "vmap")
_SEED = 5


class Block(nn.Module):
    """A transformer's block before Vaswani et al.'s norms: pre-norm, one projection for keys, queries and values."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return shape (batch, length, width), as it came."""
        shape = (*inputs.shape[:2], 3, self.heads, -1)
        query, key, value = self.attend(self.before(inputs)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        inputs = inputs + self.join(mixed.transpose(1, 2).reshape(inputs.shape))
        return inputs + self.narrow(nn.functional.gelu(self.widen(self.between(inputs))))


class Transformer(nn.Module):
    """An encoder that classifies the mean of its outputs."""

    def __init__(self, vocabulary: int = 1000, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.out = nn.Linear(width, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits, shape (batch, classes), of words, shape (batch, length)."""
        return self.out(self.blocks(self.embedding(words)).mean(1))


class EmbeddingClassifier(nn.Module):
    """The mean of the words' vectors, and one linear layer."""

    def __init__(self, vocabulary: int = 30_000, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(vocabulary, width), nn.Linear(width, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits, shape (batch, classes), of words, shape (batch, length)."""
        return self.out(self.embedding(words).mean(1))


class Recurrent(nn.Module):
    """The mean of a recurrent layer's outputs, and one linear layer."""

    def __init__(self, kind: Callable[..., nn.Module], vocabulary: int = 80, width: int = 96) -> None:
        super().__init__()
        self.embedding, self.cells = nn.Embedding(vocabulary, 32), kind(32, width, batch_first=True)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits, shape (batch, classes), of words, shape (batch, length)."""
        return self.out(self.cells(self.embedding(words))[0].mean(1))


class Placed(nn.Module):
    """The transformer, with learned positions that all examples share."""

    def __init__(self, length: int = 32, width: int = 64) -> None:
        super().__init__()
        self.places, self.inner = nn.Embedding(length, width), Transformer(width=width)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits, shape (batch, classes), of words, shape (batch, length)."""
        placed = self.inner.embedding(words) + self.places(torch.arange(words.shape[1], device=words.device))
        return self.inner.out(self.inner.blocks(placed).mean(1))


class Vision(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), whose class token and positions are bare parameters."""

    def __init__(self, width: int = 64, patch: int = 7) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 1 + (28 // patch) ** 2, width) / 50)
        self.blocks, self.out = nn.Sequential(Block(width), Block(width)), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (batch, classes), of images, shape (batch, 1, 28, 28)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        return self.out(self.blocks(tokens + self.places)[:, 0])


class Encoder(nn.Module):
    """Torch's own transformer layers, whose outputs' mean one linear layer classifies."""

    def __init__(self, vocabulary: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(vocabulary, width), nn.Linear(width, CLASSES)
        layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in range(2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits, shape (batch, classes), of words, shape (batch, length)."""
        return self.out(self.layers(self.embedding(words)).mean(1))


def waves() -> nn.Module:
    """Return a convolution over the pixels of an image in a row, and one over its results."""
    first, second = nn.Conv1d(1, 32, 9, stride=4), nn.Conv1d(32, 32, 5, stride=2)
    return nn.Sequential(
        nn.Flatten(2), first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(3040, CLASSES)
    )


class Adapted(nn.Module):
    """A frozen linear layer and a low-rank one beside it (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of both."""
        return self.layer(inputs) + self.up(self.down(inputs))


def adapted(width: int = 128, blocks: int = 2) -> nn.Module:
    """Return the transformer, frozen but for adapters of its attention and its output layer; arguments as of its class."""
    model: Any = Transformer(width=width, blocks=blocks).requires_grad_(False)
    for block in model.blocks:
        block.attend = Adapted(block.attend)
    model.out.requires_grad_(True)
    return model


def adapted_by_peft(width: int = 128) -> nn.Module:
    """Return the model of `adapted` with adapters that PEFT put there; argument as of its class."""
    peft: Any = importlib.import_module("peft")
    model: Any = Transformer(width=width).requires_grad_(False)
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["attend"]), model)
    model.out.requires_grad_(True)
    return model


# The model, how many words an example has and from how large a vocabulary; None: images of 28 x 28 pixels.
PRIVATE: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, int] | None]] = {
    "cnn": (lambda: build("cnn-100k"), None),
    "transformer": (Transformer, (32, 1000)),
    "embedding": (EmbeddingClassifier, (64, 30_000)),
    "adapters": (adapted, (32, 1000)),
    "peft": (adapted_by_peft, (32, 1000)),
    "conv1d": (waves, None),
    "resnet": (lambda: build("resnet-272k"), None),
    "rnn": (partial(Recurrent, nn.RNN), (32, 80)),
    "lstm": (partial(Recurrent, nn.LSTM), (32, 80)),
    "gru": (partial(Recurrent, nn.GRU), (32, 80)),
    "encoder": (Encoder, (32, 1000)),
    "positions": (Placed, (32, 1000)),
    "vision": (Vision, None),
    "cnn-1m": (lambda: build("cnn-1m"), None),
    "resnet-18": (lambda: build("resnet-18"), None),
    "lora": (partial(adapted, 768, 12), (128, 1000)),
}
LARGE = ("cnn-1m", "resnet-18", "lora")  # of a GPU
# Those that are measured by default.
USUAL = tuple(name for name in PRIVATE if name not in LARGE and (name != "peft" or find_spec("peft")))


def run_dp_sgd(options: Options) -> Row:
    """Measure each engine on each model and batch, in turns."""
    before, turns = conditions(), options.size.rounds * options.repeats
    with restoring_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Opacus' hooks, and of its noise, which is not secure
        torch.set_num_threads(1)
        keep_memory()  # as the engine's processes do
        measured = [_measure(name, batch, turns) for name in options.workloads for batch in BATCHES]
    ratios = {
        "Over plain SGD, noise and all": [_ratios(row, 0) for row in measured],
        "Over plain SGD, without the noise": [_ratios(row, 1) for row in measured],
    }
    tables = {"Milliseconds of CPU: a step": measured}
    batches = " / ".join(map(str, BATCHES))
    tables |= {f"{title}, at batch {batches}": _by_batch(rows) for title, rows in ratios.items()}
    steps = ", ".join(f"{number} at batch {batch}" for batch, number in BATCHES.items())
    notes = [
        f"the fastest of {turns} turns; steps of a turn: {steps}; auto: what `auto` takes",
        f"{FUNCTORCH}: its PrivacyEngine by torch's vmap, with noise of torch's generator",
        "plain: what privacy=none trains by; noise: drawn from AES-CTR for every parameter that trains, by NumPy",
        "compiled: the engine that `auto` takes, with the compiled package's noise",
    ]
    return result_of("dp_sgd", before, tables, notes)


def _ratios(row: Row, less: int) -> Row:
    """Return each engine's step, less so many times its noise, over the plain one."""
    noises = {**dict.fromkeys(MEASURED, "noise"), COMPILED: COMPILED_NOISE}
    left = {engine: row[engine] - less * row[noise] for engine, noise in noises.items() if engine in row}
    if not less and FUNCTORCH in row:  # it does not draw this noise
        left[FUNCTORCH] = row[FUNCTORCH]
    named = {key: row[key] for key in ("model", "batch", "auto")}
    return named | {engine: ratio(each, row[PLAIN]) for engine, each in left.items()}


def _by_batch(rows: list[Row]) -> list[Row]:
    """Return one row for each model, whose cells have the ratios of the batches beside each other."""
    engines = [each for each in (*MEASURED, FUNCTORCH, COMPILED) if any(each in row for row in rows)]
    joined: dict[str, Row] = {}
    for row in rows:
        line = joined.setdefault(row["model"], {"model": row["model"], "auto": row["auto"]})
        for engine in engines:
            cell = spelled(row.get(engine))
            line[engine] = f"{line[engine]} / {cell}" if engine in line else cell
    return list(joined.values())


def _measure(name: str, batch: int, turns: int) -> Row:
    examples, steps = made_examples(name, batch), BATCHES[batch]
    engines = [engine for engine in (PLAIN, *MEASURED) if trains(engine, name, examples)]
    models = {engine: with_fast_kernels(model_of(name)) for engine in engines}
    auto = chosen_engine("auto", models[PLAIN], examples)
    trained = sum(p.numel() for p in models[PLAIN].parameters() if p.requires_grad)
    ways: dict[str, Callable[[], None]] = {
        e: by_numpy()(partial(take_steps, e, model, examples, steps)) for e, model in models.items()
    }
    with suppress(Exception):  # whatever Opacus raises for layers that it does not know
        by_opacus(name, examples, 1, "functorch")()
        ways[FUNCTORCH] = by_opacus(name, examples, steps, "functorch")
    noises = {"noise": by_numpy()(partial(draw_noise, trained))}
    if discrete_gaussian.compiled():
        ways[COMPILED] = partial(take_steps, auto, with_fast_kernels(model_of(name)), examples, steps)
        noises[COMPILED_NOISE] = partial(draw_noise, trained)
    return {
        "model": name,
        "batch": batch,
        "parameters": trained,
        "auto": auto,
        **{engine: _rounded(min(times) / steps) for engine, times in cpu_milliseconds(ways, turns).items()},
        **{noise: _rounded(min(times)) for noise, times in cpu_milliseconds(noises, turns).items()},
    }


def trains(engine: str, name: str, examples: Examples) -> bool:
    """Return whether an engine can train a model: Opacus' hooks see no product of torch's recurrent layers.

    Args:
      engine: of DP-SGD, or `PLAIN`.
      name: a key of `PRIVATE`.
      examples: of its inputs.
    """
    try:
        return engine == PLAIN or chosen_engine(engine, model_of(name), examples) == engine
    except Refusal:
        return False


def model_of(name: str) -> nn.Module:
    """Return a model in `PRIVATE`, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return PRIVATE[name][0]()


def made_examples(name: str, batch: int) -> Examples:
    """Return a batch for a model in `PRIVATE`."""
    words = PRIVATE[name][1]
    generator = torch.Generator().manual_seed(_SEED)
    targets = torch.randint(CLASSES, (batch,), generator=generator)
    if words is None:
        return Examples(torch.randn(batch, 1, 28, 28, generator=generator), targets)
    length, vocabulary = words
    return Examples(torch.randint(vocabulary, (batch, length), generator=generator), targets)


def take_steps(engine: str, model: nn.Module, examples: Examples, steps: int) -> None:
    """Take the steps of a turn, each on all examples.

    Args:
      engine: of DP-SGD, or `PLAIN`.
      model: is trained in place.
      examples: on the model's device.
      steps: how many.
    """
    task, training = Made("tiny", 1), LocalTraining(LEARNING_RATE, steps, len(examples))
    if engine == PLAIN:
        train(model, task, examples, training, 0, 0)
        return
    sampling = PoissonBatches(1.0, steps)
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, sampling, CLIPPING_NORM, 1, NOISE_MULTIPLIER)
    streams = Randomness(_SEED).stream("batches"), Randomness(_SEED).stream("noise")
    train_privately(model, task, examples, training, PrivateSteps(plan, *streams), engine)


def by_opacus(name: str, examples: Examples, steps: int, mode: str) -> Callable[[], None]:
    """Return the function that takes the steps of a turn by Opacus, as its documents write them.

    Args:
      name: a key of `PRIVATE`.
      examples: on the device of the model.
      steps: how many.
      mode: `grad_sample_mode` of Opacus.
    """
    model = model_of(name).to(examples.targets.device).train()
    made: Any = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(examples.inputs, examples.targets), len(examples)),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIPPING_NORM,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimizer, *criterion, _ = made
    return partial(loop, wrapped, optimizer, *(criterion or [nn.CrossEntropyLoss()]), examples, steps)


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Tensor, Tensor], Any],
    examples: Examples,
    steps: int,
) -> None:
    """Take steps as torch's documents write them.

    Args:
      model: is trained in place.
      optimizer: of its parameters.
      loss_of: takes outputs and targets.
      examples: of each step.
      steps: how many.
    """
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(examples.inputs), examples.targets).backward()
        optimizer.step()


def draw_noise(count: int) -> None:
    """Draw the noise of one step of so many parameters."""
    stream = Randomness(_SEED).stream("noise")
    sigma, step = lattice_of(NOISE_MULTIPLIER, CLIPPING_NORM, count)
    for block in torch.zeros(count).split(NOISE_BLOCK):
        add_on_lattice(block.numpy(), sigma, step, stream)


def _rounded(milliseconds: float) -> float:
    return float(f"{milliseconds:.3g}")
