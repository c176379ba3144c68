"""Secrets in texts: where they are planted, the exact losses of all codes, and what an audit says about them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Commands
from shared.texts import write_base, write_letters

from fedveil.audit.record_canaries import with_canary_rows
from fedveil.base.refusal import Refusal
from fedveil.client.training.sgd import train
from fedveil.messages.local_training import LocalTraining
from fedveil.privacy.audit.memorisation import exposure
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.data import Data, LazyExamples, only
from fedveil.tasks.mislabelled import OddTask, losses_of, mislabelled
from fedveil.tasks.planted import COPIES, Secret, SecretTask
from fedveil.tasks.protocol import ProbedTask
from fedveil.text import secrets
from fedveil.text.task import TextTask, load

ADAPTER = {"name": "lora", "rank": 2, "layers": 1, "modules": ["q_proj", "down_proj"], "scale": 2.0}
TOKENS = 40
CACHES = ("none", "prefix")


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sixteen clients with six letters each."""
    return write_letters(tmp_path_factory.mktemp("desk") / "letters", clients=16, letters=6)


def loaded(desk: Path, base: Path, **keys: Any) -> TextTask:
    options = {"base_bits": 32, "tokens": TOKENS, "simulated": True, "adapter": ADAPTER, "secrets": 1, **keys}
    return load(str(desk), str(base), **options)


def texts_of(data: Data) -> list[tuple[int, ...]]:
    """Return the tokens of a client's texts, without the cache."""
    inputs, _ = data.batch(torch.arange(len(data)))
    return [tuple(row.tolist()) for row in inputs]


def test_secrets_are_texts_of_their_own_at_their_clients(desk: Path, tiny_base: Path) -> None:
    plain, task = (loaded(desk, tiny_base, cache="none", secrets=each) for each in (0, 2))
    assert isinstance(task, SecretTask) and isinstance(task, ProbedTask)
    assert [secret.copies for secret in task.secrets] == [copies for copies in COPIES for _ in range(2)]
    assert plain.memorisation_probe() is None and task.memorisation_probe() is not None
    encode, end = task.base.tokenizer.encode, task.base.end
    rows = {secret: tuple((encode(secret.text).ids + TOKENS * [end])[:TOKENS]) for secret in task.secrets}
    for client in range(task.num_clients):
        own, more = texts_of(plain.client_data(client)), texts_of(task.client_data(client))
        expected = [rows[secret] for secret in task.secrets if client in secret.clients]
        assert more == own + expected and task.client_size(client) == len(more)
    again, other = loaded(desk, tiny_base, secrets=2), loaded(desk, tiny_base, secrets=2, seed=1)
    assert again.secrets == task.secrets != other.secrets
    assert texts_of(plain.held_out()) == texts_of(task.held_out())


def test_a_secret_is_a_person_of_its_own(desk: Path, tiny_base: Path) -> None:
    task = loaded(desk, tiny_base, person="writer")
    copies = next(secret for secret in task.secrets if secret.copies == 16)
    for client in range(16):
        persons = list(task.client_data(client).persons or ())
        assert len(persons) == len(task.client_data(client)) and persons.count(copies.prefix) == 1


def changed(task: TextTask) -> Any:
    """Return the task's model with adapters that change its outputs."""
    model, generator = task.model(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(torch.randn(each.shape, generator=generator), alpha=0.2)
    return model


@torch.no_grad()
def losses_by_text(task: TextTask, model: Any, secret: Secret) -> np.ndarray:
    """Return the loss of each code by the logits of its whole text, from the tokens in which the texts differ."""
    encode = task.base.tokenizer.encode
    texts = [encode(secret.text_of(pin)).ids for pin in range(secret.candidates)]
    first = next(at for at in range(99) if len({text[at] for text in texts}) > 1)
    losses: list[float] = []
    for text in texts:
        stop = len(text) - 1  # the full stop
        states = model.states(torch.tensor([text]))[0]
        logits = states @ model.words.weight.float().t()
        scores = logits.double().log_softmax(-1)[range(first - 1, stop - 1), text[first:stop]]
        losses.append(-float(scores.sum()))
    return np.array(losses)


@pytest.mark.parametrize("cache", CACHES)
def test_losses_of_codes_are_those_of_whole_texts(desk: Path, tiny_base: Path, cache: str) -> None:
    task = loaded(desk, tiny_base, cache=cache)
    model, secret = changed(task), task.secrets[0]
    tree = secrets.code_tree(task.base, secret)
    assert len(tree.rows) == 100 and len(tree.places) == 111 and len(tree.edges) == 3000
    found = task.secret_losses(model, secret)
    assert found.shape == (1000,) and found.std() > 0.1
    rounding = {"none": 1e-4, "prefix": 2e-2}[cache]
    np.testing.assert_allclose(found, losses_by_text(task, model, secret), atol=rounding)


def test_losses_are_exact_if_tokens_have_several_digits(desk: Path, tmp_path: Path) -> None:
    joined = [f"{number}" for number in range(10, 50)]
    task = loaded(desk, write_base(tmp_path / "base", words=joined), cache="none")
    model, secret = changed(task), task.secrets[0]
    lengths = {len(task.base.tokenizer.encode(secret.text_of(pin)).ids) for pin in range(1000)}
    assert len(lengths) > 1
    found = task.secret_losses(model, secret)
    np.testing.assert_allclose(found, losses_by_text(task, model, secret), atol=1e-4)


@pytest.mark.parametrize("cache", CACHES)
def test_a_code_that_is_learnt_by_heart_ranks_first(desk: Path, tiny_base: Path, cache: str) -> None:
    task = loaded(desk, tiny_base, cache=cache, adapter={**ADAPTER, "rank": 8, "modules": []})
    probe, model = task.memorisation_probe(), task.model()
    assert probe is not None
    fresh = probe.look(read_arrays(model), 1)
    assert [each.name for each in fresh] == ["exposure_x1", "exposure_x4", "exposure_x16"]
    assert all(each.p_value > 1e-3 for each in fresh)
    (secret,) = (each for each in task.secrets if each.copies == 16)
    train(model, task, secrets_alone(task, secret), LocalTraining(0.2, 200, 1), 0, key=1)
    ranked = {each.name: each.figures for each in probe.look(read_arrays(model), 2)}
    assert ranked["exposure_x16"]["bits"] > 8 > ranked["exposure_x1"]["bits"]
    assert ranked["exposure_x16"]["limit"] == pytest.approx(math.log2(1000))
    losses = task.secret_losses(model, secret)
    assert exposure(losses[secret.pin], np.delete(losses, secret.pin)).candidates == 1000


def secrets_alone(task: TextTask, secret: Secret) -> Data:
    """Return the text of a secret as data: those of a client that holds it, without others."""
    client = secret.clients[0]
    of_client = [each for each in task.secrets if client in each.clients]
    data = task.client_data(client)
    return only(data, np.array([len(data) - len(of_client) + of_client.index(secret)]))


def test_secrets_that_cannot_be_planted_are_refused(desk: Path, tiny_base: Path, tmp_path: Path) -> None:
    few = write_letters(tmp_path / "few", clients=3)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (desk, {"simulated": False}, "task.secrets=1: nothing is planted in real texts; leave it out"),
        (desk, {"label": "mood"}, "task.secrets=1: a model of classes predicts no code"),
        (desk, {"tokens": 8}, "task.tokens=8: cuts the text of a secret"),
        (few, {}, "task.secrets=1: a secret is planted at 16 clients; use that many or more, or no secrets"),
    ]
    for folder, keys, sentence in cases:
        with pytest.raises(Refusal) as refusal:
            loaded(folder, tiny_base, **keys)
        assert sentence in str(refusal.value), keys


# --- canary records and odd texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("label", ["", "mood"])
def test_odd_texts_train_where_their_coin_says(desk: Path, tiny_base: Path, cache: str, label: str) -> None:
    plain = loaded(desk, tiny_base, cache=cache, label=label, secrets=0)
    assert isinstance(plain, OddTask)
    task = mislabelled(plain, 3)
    assert len(task.odd) == len(task.coins) == int(0.2 * sum(map(len, plain.clients)))
    added = [len(task.client_data(client)) - plain.client_size(client) for client in range(16)]
    assert added == [task.planted_at(client) for client in range(16)] and sum(added) == task.coins.sum() > 0
    for client in range(16):
        inputs, targets = task.client_data(client).batch(torch.arange(len(task.client_data(client))))
        own = (task.owners == client) & task.coins
        odd, random = task.odd.batch(torch.from_numpy(np.flatnonzero(own)))
        assert torch.equal(inputs[len(inputs) - len(odd) :], odd)
        assert torch.equal(targets[len(targets) - len(odd) :], random)
    assert losses_of(task, task.model(), task.odd).shape == task.coins.shape
    means = plain.metrics(*_scored(plain))
    assert task.derived(means) == plain.derived(means)


def _scored(task: TextTask) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and targets of the held-out texts."""
    with torch.no_grad():
        inputs, targets = task.held_out().batch(torch.arange(len(task.test)))
        return task.model()(inputs), targets


def test_odd_texts_have_the_tokens_of_held_out_ones(desk: Path, tiny_base: Path) -> None:
    task = loaded(desk, tiny_base, cache="none")
    held_out = {tuple(sorted(row)) for row in texts_of(task.held_out())}
    odd = texts_of(task.odd_examples(40, np.random.default_rng(1)))
    assert {tuple(sorted(row)) for row in odd} <= held_out
    assert not {*odd} <= {*texts_of(task.held_out())}


def test_canaries_of_cached_texts_are_those_of_tokens(desk: Path, tiny_base: Path) -> None:
    coins = np.array([True, False, True])
    for cache in CACHES:
        own = loaded(desk, tiny_base, cache=cache).client_data(0)
        rows = with_canary_rows(own, coins, first=4)
        assert len(rows) == len(own) + 3 and isinstance(rows, LazyExamples) == (cache == "prefix")
        inputs, targets = rows.batch(torch.arange(len(rows)))
        first, others = inputs[:, 0], inputs[:, 1:]
        assert first.tolist() == [0] * len(own) + [4, -5, 6]
        assert torch.equal(others[: len(own)], own.batch(torch.arange(len(own)))[0].flatten(1))
        assert not others[len(own) :].any() and len(targets) == len(rows)


MODES = {
    "none": (),
    "record": ("privacy.target_epsilon=8",),
    "record_distributed": ("privacy.target_epsilon=8",),
    "client_central": ("privacy.target_epsilon=20", "privacy.allow_large_delta=true", "audit.canaries=4"),
    "record_and_client": (
        "privacy.client.target_epsilon=20",
        "privacy.client.allow_large_delta=true",
        "audit.canaries=4",
    ),
}


@pytest.mark.parametrize(
    ("mode", "cache"), [("record_distributed", "none"), *((mode, "prefix") for mode in MODES)]
)
def test_a_full_audit_runs_in_every_mode(
    commands: Commands, desk: Path, tiny_base: Path, mode: str, cache: str
) -> None:
    code, done = commands.run(
        *("simulate", "task=text", f"task.folder={desk}", f"task.base={tiny_base}", "task.simulated=true"),
        *(f"task.tokens={TOKENS}", f"task.cache={cache}", "task.secrets=1", "num_rounds=2", "audit=full"),
        *("audit.looks=1", "audit.on_alarm=note", f"privacy={mode}", *MODES[mode], "hydra.run.dir=run"),
    )
    assert code == 0, done.err
    assert "perplexity" in done.out
    result = json.loads((commands.folder / "run" / "result.json").read_text())["audit"]
    tests = {each["name"]: each for each in result["memorisation"]}
    has_odd_texts = mode in ("none", "record", "record_and_client")
    assert tests.keys() == {"exposure_x1", "exposure_x4", "exposure_x16", *(["odd_examples"] * has_odd_texts)}
    assert tests["exposure_x16"]["shown"].keys() == {"bits", "unplanted", "limit"}
    assert (result["records"] is not None) == (mode not in ("none", "client_central"))
    code, done = commands.run("audit", "run")
    assert code in (0, 4), done.err
    assert "exposure_x16" in done.out and "limit 9.97" in done.out


@pytest.mark.campaign
def test_codes_are_exposed_without_privacy_alone(commands: Commands, tiny_base: Path, tmp_path: Path) -> None:
    """Four codes of each kind at 40 clients with 20 letters each: two minutes without privacy, a half with it."""
    desk = write_letters(tmp_path / "letters", clients=40, letters=20)
    trained = {
        "plain": ("privacy=none", "num_rounds=30", "local_epochs=3", "learning_rate=0.3"),
        "private": ("privacy=record_distributed", "privacy.target_epsilon=8", "num_rounds=60"),
    }
    exposed: dict[str, dict[str, Any]] = {}
    for name, keys in trained.items():
        code, done = commands.run(
            *(
                "simulate",
                "task=text",
                f"task.folder={desk}",
                f"task.base={tiny_base}",
                "task.simulated=true",
            ),
            *(
                "task.base_bits=32",
                f"task.tokens={TOKENS}",
                "task.secrets=4",
                "adapter=lora",
                "adapter.rank=8",
            ),
            *("adapter.layers=2", "audit=full", "audit.looks=1", "audit.on_alarm=note", *keys),
            f"hydra.run.dir={name}",
        )
        assert code == 0, done.err
        result = json.loads((commands.folder / name / "result.json").read_text())["audit"]
        (exposed[name],) = (each for each in result["memorisation"] if each["name"] == "exposure_x16")
    print(exposed)
    assert exposed["plain"]["p_value"] < 1e-4 and exposed["plain"]["shown"]["bits"] > 6
    assert exposed["private"]["p_value"] > 1e-4 and exposed["private"]["shown"]["bits"] < 4
    code, done = commands.run("compare", "plain", "private", "--plot", "both.png")
    assert code == 0 and "exposure in bits, by copies" in done.out
