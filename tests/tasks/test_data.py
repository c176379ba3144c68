"""Data as people have them: trees of tensors, arrays, data sets that are read lazily; trained, probed, refused."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedveil as fv
from fedveil.client.training.in_place import check_apart
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.populations.local import Local
from fedveil.populations.machine import OnThisMachine, Simulated
from fedveil.tasks.data import as_data, check_data, data_of, held_out_of
from fedveil.tasks.fingerprint import fingerprint
from fedveil.tasks.independence import check_independence
from fedveil.tasks.reading_order import check_order, check_reading

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

FEATURES, CLIENTS, EACH = 4, 6, 24


def made(seed: int, count: int = EACH) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs.sum(1) > 0).long()


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """A data set of torch, as people write it."""

    def __init__(self, seed: int, count: int = EACH) -> None:
        self.inputs, self.targets = made(seed, count)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if row >= len(self.targets):
            raise IndexError(row)
        return self.inputs[row], self.targets[row]


class Outputs(dict[str, Any]):
    """What a model of Hugging Face returns, in few words: keys are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Model(nn.Module):
    """Takes a tensor, two, or fields by name; returns a tensor, a named tuple or an object with fields."""

    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, 2)
        self.returns = returns
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-0.4, 0.4, parameter.numel()).view_as(parameter))

    def forward(self, features: Tensor, scale: Tensor | None = None, labels: Tensor | None = None) -> Any:
        hidden = torch.tanh(self.first(features if scale is None else features * scale[:, None]))
        logits = self.last(hidden)
        if labels is not None:
            return Outputs(loss=nn.functional.cross_entropy(logits, labels), logits=logits)
        fields = Outputs(logits=logits)
        return {"tensor": logits, "tuple": Pair(logits, hidden), "fields": fields}[self.returns]


def loss_of(outputs: Any, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(getattr(outputs, "logits", outputs), targets)


@dataclass
class Made:
    """A task over whatever `give` makes of a seed."""

    give: Callable[[int], Any]
    returns: str = "tensor"
    loss: Callable[[Any, Tensor], Tensor] = loss_of
    simulated: bool = True
    num_clients: int = CLIENTS
    make: Callable[[], nn.Module] | None = None

    def model(self) -> nn.Module:
        return self.make() if self.make else Model(self.returns)

    def metrics(self, outputs: Any, targets: Tensor) -> dict[str, float]:
        logits = getattr(outputs, "logits", outputs)
        return {"accuracy": (logits.argmax(1) == targets).float().mean().item()}

    def client_data(self, client: int) -> Any:
        return self.give(client)

    def held_out(self) -> Any:
        return self.give(99)


def pairs(seed: int) -> Any:
    return made(seed)


def arrays(seed: int) -> Any:
    inputs, targets = made(seed)
    return inputs.double().numpy(), targets.int().numpy()


def dictionary(seed: int) -> Any:
    inputs, targets = made(seed)
    return fv.Examples({"features": inputs, "scale": torch.ones(len(inputs))}, targets)


def several(seed: int) -> Any:
    inputs, targets = made(seed)
    return fv.Examples((inputs, torch.ones(len(inputs))), targets)


def lazy_fields(seed: int) -> Any:
    inputs, targets = made(seed)
    items = [{"features": x, "label": y, "name": "none"} for x, y in zip(inputs, targets, strict=True)]
    return fv.LazyExamples(items, inputs=["features"])


def collated(seed: int) -> Any:
    def collate(items: list[Any]) -> Any:
        return {"features": torch.stack([x for x, _ in items]), "target": torch.stack([y for _, y in items])}

    return fv.LazyExamples(Rows(seed), collate=collate, inputs="features")


FORMS = {
    "a pair": pairs,
    "arrays": arrays,
    "a dictionary": dictionary,
    "a tuple": several,
    "a data set": Rows,
    "fields": lazy_fields,
    "collated": collated,
}


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Tensor]]:
    """What tensors in memory lead to, by the privacy; all forms must lead there."""
    return {name: trained(Made(pairs), name) for name in ("none", "record")}


def trained(task: Any, privacy: str) -> dict[str, Tensor]:
    options: Any = fv.Record(target_epsilon=20.0, target_delta=1e-2) if privacy == "record" else privacy
    run = fv.simulate(task, privacy=options, num_rounds=3, cohort=fv.Poisson(0.7), batch_size=8, quiet=True)
    assert run.status == "completed"
    assert all(line["replies"] == line["invited"] for line in run.history)
    return {name: value.detach() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize("privacy", ["none", "record"])
@pytest.mark.parametrize(
    "made_of", [*((each,) for each in FORMS.values()), (pairs, "tuple"), (pairs, "fields")]
)
def test_every_form_of_data_and_of_outputs_trains_to_the_same_model(
    made_of: tuple[Any, ...], privacy: str, plain: dict[str, dict[str, Tensor]]
) -> None:
    found = trained(Made(*made_of), privacy)
    for name, value in plain[privacy].items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("privacy", ["none", "record"])
def test_a_loss_that_the_model_computes_is_the_loss(
    privacy: str, plain: dict[str, dict[str, Tensor]]
) -> None:
    def with_labels(seed: int) -> Any:
        inputs, targets = made(seed)
        return fv.Examples({"features": inputs, "labels": targets}, targets)

    found = trained(Made(with_labels, loss=lambda outputs, targets: outputs.loss), privacy)
    for name, value in plain[privacy].items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_numbers_are_targets_too() -> None:
    def numbers(seed: int) -> Any:
        inputs, _ = made(seed)
        return inputs, inputs.sum(1)

    class Line(Made):
        def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
            return {"error": float((outputs.squeeze(1) - targets).square().mean())}

    def square(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs.squeeze(1), targets)

    def line() -> nn.Module:
        layer = nn.Linear(FEATURES, 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    task = Line(numbers, loss=square, make=line)
    run = fv.simulate(task, privacy="record", num_rounds=8, cohort=fv.All(), quiet=True)
    assert run.history[-1]["error"] < run.history[0]["error"]


def test_hugging_face_data_sets_are_read_as_they_are() -> None:
    datasets = pytest.importorskip("datasets")

    def give(seed: int) -> Any:
        inputs, targets = made(seed)
        return datasets.Dataset.from_dict({"features": inputs.tolist(), "label": targets.tolist()})

    found = trained(Made(give), "record")
    expected = trained(Made(pairs), "record")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert fingerprint(as_data(give(1))) == fingerprint(as_data(give(1))) != fingerprint(as_data(give(2)))


# --- checks ---------------------------------------------------------------------------------------------------------


class Liar(Rows):
    def __len__(self) -> int:
        return 2 * len(self.targets)


def broken(seed: int) -> Any:
    inputs, targets = made(seed)
    if seed == 3:
        inputs[-1, 0] = float("nan")
    return inputs, targets


def short(items: list[Any]) -> Any:
    return torch.stack([x for x, _ in items[:-1]]), torch.stack([y for _, y in items])


def ragged(seed: int) -> Any:
    inputs, targets = made(seed)
    return {"features": inputs, "scale": torch.ones(3)}, targets


def other_fields(seed: int) -> Any:
    return dictionary(seed) if seed == 2 else pairs(seed)


BAD = {
    "a length that lies": (Liar, "held-out data: data='48 examples'"),
    "a NaN": (broken, "client 3: inputs='1 NaN or infinite'"),
    "a collate that loses one": (lambda n: fv.LazyExamples(Rows(n), collate=short), "for 2 examples"),
    "a field that is short": (ragged, "held-out data: scale=(3,)"),
    "other fields": (other_fields, "client 2: inputs='a dictionary of features, scale'"),
    "no length": (lambda n: iter([1]), "client_data='list_iterator'"),
    "no such field": (lambda n: fv.LazyExamples([{"x": 1.0, "y": 0}] * 4, inputs="z"), "data='z'"),
    "no targets": (lambda n: fv.LazyExamples([{"x": 1.0}] * 4), "data='targets'"),
    "no number": (lambda n: fv.LazyExamples([{"x": "a", "y": 0}] * 4), "x='str'"),
    "text as an array": (lambda n: (np.array(["a"]), np.array([0])), "data='an array of <U1'"),
    "nobody has any": (lambda n: made(n, 20 if n == 99 else 0), "no client has an example"),
    "nothing is held out": (lambda n: made(n, 0 if n == 99 else 20), "held_out=0"),
}


@pytest.mark.parametrize("privacy", ["none", "record"])
@pytest.mark.parametrize("case", BAD)
def test_data_without_a_batch_are_refused_before_writing(case: str, privacy: str, tmp_path: Path) -> None:
    give, sentence = BAD[case]
    with pytest.raises(fv.Refusal) as refused:
        fv.simulate(Made(give), privacy=privacy, num_rounds=2, folder=tmp_path / "run", quiet=True)
    assert sentence in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_client_without_examples_sits_out() -> None:
    run = fv.simulate(
        Made(lambda seed: made(seed, 0 if seed == 2 else EACH)),
        privacy="record",
        cohort=fv.All(),
        num_rounds=2,
        quiet=True,
    )
    assert run.status == "completed"


def mixed(items: list[Any]) -> Any:
    inputs = torch.stack([x for x, _ in items])
    return 0.7 * inputs + 0.3 * inputs[torch.randperm(len(inputs))], torch.stack([y for _, y in items])


def padded(items: list[Any]) -> Any:
    longest = max(len(x) for x, _ in items)
    inputs = torch.stack([nn.functional.pad(x, (0, longest - len(x))) for x, _ in items])
    return inputs, torch.stack([y for _, y in items])


class Summed(nn.Module):
    def __init__(self, mean: bool = False) -> None:
        super().__init__()
        self.last, self.mean = nn.Linear(1, 2), mean

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(inputs.mean(1, keepdim=True) if self.mean else inputs.sum(1, keepdim=True))


def test_mixing_collate_is_refused_and_a_padding_one_is_not() -> None:
    with pytest.raises(fv.Refusal, match="one example's loss changes"):
        fv.simulate(
            Made(lambda seed: fv.LazyExamples(Rows(seed), collate=mixed)), privacy="record", quiet=True
        )
    ragged_rows = [(torch.ones(1 + n % 5), torch.tensor(n % 2)) for n in range(9)]
    check_independence(Summed(), Made(pairs), fv.LazyExamples(ragged_rows, collate=padded))
    for first in range(9):  # whichever of them is the longest
        rows = fv.LazyExamples(ragged_rows[first:] + ragged_rows[:first], collate=padded)
        with pytest.raises(fv.Refusal, match="hide padding"):
            check_independence(Summed(mean=True), Made(pairs), rows)


class Blending:
    """Mixes an item with the one that was read before it."""

    before: Any = 0.0

    def __call__(self, item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        blended = (item[0] + self.before) / 2
        self.before = item[0]
        return blended, item[1]


BLENDING = Blending()


def test_history_dependent_reading_is_refused_and_a_random_one_is_not() -> None:
    own, given = np.random.default_rng(1), Made(lambda seed: fv.LazyExamples(Rows(seed), transform=BLENDING))
    bench = Workbench(ClientSettings("made", LocalTraining()), given)
    records = partial(check_independence, given.model(), given, given.client_data(0))
    for check in (records, partial(check_apart, bench)):
        with pytest.raises(fv.Refusal, match="data='an example differs after another one was read'"):
            check()
    for random_one in (flip, lambda item: (item[0] * own.choice([-1.0, 1.0]), item[1])):
        rows = [
            partial(fv.LazyExamples(Rows(n), transform=random_one).batch, torch.arange(2)) for n in (0, 1)
        ]
        check_reading(rows[0], *rows)


KEPT: dict[Any, Any] = {}


class Scaled(Made):
    """Real data, which `scale` changes by what it keeps of the clients that it has seen."""

    def __init__(
        self, scale: Callable[[dict[Any, Any], int, np.ndarray], np.ndarray], kept: Any = None
    ) -> None:
        super().__init__(arrays, simulated=False)
        self.scale, self.kept = scale, {} if kept is None else kept
        KEPT.clear()

    def client_data(self, client: int) -> Any:
        inputs, targets = arrays(client)
        return self.scale(self.kept, client, inputs + client), targets


class Cached(Rows):
    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return KEPT.setdefault(row, super().__getitem__(row))


def by_first(kept: dict[Any, Any], client: int, inputs: np.ndarray) -> np.ndarray:
    return inputs - kept.setdefault("mean", inputs.mean(0))


def by_all_so_far(kept: dict[Any, Any], client: int, inputs: np.ndarray) -> np.ndarray:
    kept[client] = inputs.mean(0)
    return inputs - np.mean([*kept.values()], axis=0)


def by_rounding(kept: dict[Any, Any], client: int, inputs: np.ndarray) -> np.ndarray:
    kept["factor"] = kept.get("factor", 1.0) + 1e-9
    return inputs * kept["factor"]


DEPEND_ON_ORDER: dict[str, Callable[[], Any]] = {
    "a scaler of the first client": lambda: Scaled(by_first),
    "a scaler of a module": lambda: Scaled(by_first, KEPT),
    "a scaler over clients": lambda: Scaled(by_all_so_far),
    "a cache by position": lambda: KEPT.clear() or Made(Cached, simulated=False),
    "one generator of all": lambda: Scaled(
        lambda kept, _, x: x + kept["own"].normal(size=x.shape), {"own": np.random.default_rng(1)}
    ),
}
READ_APART: dict[str, Callable[[], Any]] = {
    "own data": lambda: Scaled(lambda kept, _, x: x - x.mean(0)),
    "a public scaler": lambda: Scaled(lambda kept, _, x: x - 3),
    "noise of the system": lambda: Scaled(
        lambda kept, _, x: x + np.random.default_rng().normal(size=x.shape)
    ),
    "seeded noise": lambda: Scaled(lambda kept, _, x: x + np.random.normal(size=x.shape)),
    "rounding": lambda: Scaled(by_rounding),
    "a data set": lambda: Made(Rows, simulated=False),
    "a random transform": lambda: Made(lambda n: fv.LazyExamples(Rows(n), transform=flip), simulated=False),
    "what cannot be read": lambda: Scaled(lambda kept, client, x: [][client]),
}


@pytest.mark.parametrize("privacy", ["record", "client_central", "record_distributed"])
@pytest.mark.parametrize("name", DEPEND_ON_ORDER)
def test_data_that_go_by_clients_read_before_are_refused(name: str, privacy: str, tmp_path: Path) -> None:
    task = DEPEND_ON_ORDER[name]()
    with pytest.raises(fv.Refusal, match=r"client_data=.*clients that were read before"):
        fv.simulate(task, privacy=privacy, folder=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    assert "mean" not in KEPT and "mean" not in getattr(
        task, "kept", {}
    )  # others read, in processes of their own


@pytest.mark.parametrize("name", READ_APART)
def test_data_of_one_client_alone_are_not_refused(name: str) -> None:
    check_order(READ_APART[name]())


def test_a_process_that_dies_reading_is_no_proof() -> None:
    with pytest.raises(fv.Refusal, match="died"):
        check_order(Made(lambda n: os._exit(9), simulated=False))


def test_unplantable_canary_is_refused_by_name() -> None:
    for give in (Rows, dictionary):
        with pytest.raises(fv.Refusal, match="audit='full': it needs inputs that are one tensor in memory"):
            fv.simulate(Made(give), privacy="record", audit="full", num_rounds=2, quiet=True)


def test_canaries_among_several_inputs_are_refused_by_name() -> None:
    with pytest.raises(fv.Refusal, match="audit='full': canaries need inputs that are one tensor"):
        fv.simulate(Made(dictionary), privacy="record_distributed", audit="full", num_rounds=2, quiet=True)


def test_canaries_in_several_outputs_are_refused_by_name() -> None:
    with pytest.raises(fv.Refusal, match="audit='full': canaries need outputs"):
        fv.simulate(Made(pairs, "tuple"), privacy="record", audit="full", num_rounds=2, quiet=True)


# --- identity -------------------------------------------------------------------------------------------------------


def flip(item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return item[0] * random.choice([-1.0, 1.0]), item[1]


class Flipped(Rows):
    """Random by itself, as data sets with a transform inside are."""

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return flip(super().__getitem__(row))


def test_random_transforms_do_not_change_a_fingerprint() -> None:
    once = fingerprint(fv.LazyExamples(Rows(1), transform=flip))
    assert once == fingerprint(fv.LazyExamples(Rows(1), transform=flip)) == fingerprint(as_data(Rows(1)))
    assert once != fingerprint(as_data(Rows(2)))
    assert fingerprint(as_data(Flipped(1))) == fingerprint(as_data(Flipped(1)))
    assert fingerprint(as_data(Flipped(1))) != fingerprint(as_data(Flipped(1, EACH + 1)))


def test_real_data_of_unknown_content_count_as_new_in_each_run() -> None:
    """Whether they were dealt anew since the last run, nobody could tell: the ledgers go on from the most."""

    def prints(data: type[Rows], kind: type[OnThisMachine]) -> set[str]:
        task: Any = SimpleNamespace(num_clients=2, client_data=lambda _: as_data(data(1)))
        none: Any = None
        runs = [kind(none, task) for _ in range(2)]
        return {print_ for run in runs for print_ in (*run.fingerprints, *run.fingerprints)}

    assert len(prints(Flipped, Local)) == 4
    assert len(prints(Rows, Local)) == len(prints(Flipped, Simulated)) == 1


def test_a_simulation_with_random_transforms_repeats_itself() -> None:
    def give(seed: int) -> Any:
        return fv.LazyExamples(Rows(seed), transform=flip)

    one, other = (trained(Made(give), "none") for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["last.bias"], trained(Made(Rows), "none")["last.bias"])


def test_every_value_of_an_item_counts_in_a_fingerprint() -> None:
    items: list[list[Any]] = [[(1.0, "ab", b"c")], [(1.0, "a", b"bc")], [(2.0, "ab", b"c")], [{"a": (1, 2)}]]
    assert len({fingerprint(as_data(each)) for each in items}) == len(items)


@dataclass(frozen=True)
class Counted:
    """Counts how often it is read."""

    read: list[int] = field(default_factory=list[int])

    def __len__(self) -> int:
        return EACH

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        self.read.append(row)
        return torch.ones(FEATURES), row % 2


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        (lambda x, y: (x, y.index_fill(0, torch.tensor([EACH // 2]), 7)), "client 1: targets"),
        (lambda x, y: (x[:, :-1], y), "client 1: inputs"),
    ],
)
def test_unfit_data_for_model_or_loss_are_refused_before_a_charge(
    changed: Callable[..., Any], refused: str, tmp_path: Path
) -> None:
    task = Made(lambda n: fv.Examples(*(changed(*made(n)) if n == 1 else made(n))))
    with pytest.raises(fv.Refusal, match=refused) as caught:
        fv.simulate(
            task, privacy=fv.Record(target_delta=1e-2), cohort="all", num_rounds=1, folder=tmp_path / "run"
        )
    assert "Error: " in str(caught.value) and not (tmp_path / "run").exists()  # torch's own words


class Owned(Made):
    data_id, held_out_public = "unequal", True


def test_rounds_of_unequal_real_clients_state_the_cost_of_each(tmp_path: Path) -> None:
    task = Owned(lambda n: made(n, EACH * (1 + n % 3)), simulated=False)
    ledger = {"dir": str(tmp_path)}
    asked = fv.Record(target_delta=1e-3)
    run = fv.simulate(task, privacy=asked, cohort="all", num_rounds=3, quiet=True, ledger=ledger)
    spent = [row["epsilon_record"] for row in run.history]
    assert spent == sorted(set(spent)) and spent[-1] == pytest.approx(run.epsilon, rel=1e-2)


def test_the_check_reads_the_first_and_the_last_example() -> None:
    counted = Counted()
    check_data(as_data(counted), "client 0")
    assert counted.read == [0, EACH - 1]


def test_a_dictionary_of_columns_is_data() -> None:
    columns = {"x": np.zeros((5, 3)), "labels": np.arange(5)}
    data = as_data(columns)
    assert isinstance(data, fv.Examples) and len(data) == 5 and set(data.inputs) == {"x"}
    assert data.targets.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(fv.Refusal, match=r"a dictionary of x, mask.*name its targets labels"):
        as_data({"x": columns["x"], "mask": columns["x"]})


def test_held_out_data_that_are_read_give_the_same_metrics() -> None:
    lazy, whole = (
        fv.simulate(replace(Made(give), num_clients=2), privacy="none", num_rounds=1, quiet=True).metrics
        for give in (lambda n: Rows(n, 600), lambda n: made(n, 600))
    )
    assert lazy == pytest.approx(whole, abs=1e-5)
    assert len(held_out_of(Made(Rows))) == len(data_of(Made(Rows), 0)) == EACH
