import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Commands
from safetensors.numpy import load_file
from shared.texts import letter, write_base, write_letters
from torch.nn.functional import cross_entropy

import fedveil as fv
from fedveil.audit.membership_attacks import attack_on, by_loss
from fedveil.base.refusal import Refusal
from fedveil.tasks.arrays import agreement_of, dimension_of
from fedveil.tasks.data import Data, LazyExamples
from fedveil.tasks.protocol import PredictingTask, SizedTask
from fedveil.text import task as texts
from fedveil.text.base import open_base
from fedveil.text.model import TextModel
from fedveil.text.task import TextTask, load

ROWS = torch.arange(4)
MODES = {
    "none": (),
    "record": ("privacy.target_epsilon=8",),
    "record_distributed": ("privacy.target_epsilon=8",),
    "client_central": ("privacy.target_epsilon=20", "privacy.allow_large_delta=true"),
    "client_distributed": ("privacy.target_epsilon=20", "privacy.allow_large_delta=true"),
    "record_and_client": ("privacy.client.target_epsilon=20", "privacy.client.allow_large_delta=true"),
}
ADAPTER = {"name": "lora", "rank": 2, "layers": 1, "modules": ["q_proj", "down_proj"], "scale": 2.0}


def loaded(letters: Path, base: Path, **keys: Any) -> TextTask:
    options = {"base_bits": 32, "tokens": 8, "simulated": True, "adapter": ADAPTER, **keys}
    return load(str(letters), str(base), **options)


def refusal_of(letters: Path | None, base: Path, **keys: Any) -> str:
    with pytest.raises(Refusal) as refusal:
        load(None if letters is None else str(letters), str(base), **keys)
    return str(refusal.value)


def rows_of(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    return data.batch(torch.arange(len(data)))


def test_it_is_a_task_with_sizes_and_predictions(letters: Path, tiny_base: Path) -> None:
    task = loaded(letters, tiny_base)
    assert isinstance(task, SizedTask) and isinstance(task, PredictingTask)
    assert task.num_clients == 3
    assert [task.client_size(client) for client in range(3)] == [len(task.client_data(c)) for c in range(3)]
    assert sum(map(len, task.clients)) + len(task.test) == 30
    with pytest.raises(Refusal, match="clients run from 0 to 2"):
        task.client_data(3)


@torch.no_grad()
def test_loss_and_metrics_are_those_of_transformers(letters: Path, tiny_base: Path) -> None:
    from transformers import LlamaForCausalLM

    task = loaded(letters, tiny_base, cache="none", tokens=12)
    tokens, targets = rows_of(task.held_out())
    outputs = task.model()(tokens)
    logits: Any = LlamaForCausalLM.from_pretrained(tiny_base)(input_ids=tokens).logits
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    counts = (targets != -100).sum(1)
    torch.testing.assert_close(task.loss(outputs, targets), (losses.sum(1) / counts).mean())
    metrics = task.derived(task.metrics(outputs, targets))
    assert metrics["perplexity"] == pytest.approx(math.exp(losses.sum() / counts.sum()), rel=1e-4)
    hits = ((logits.argmax(-1) == targets).sum(1) / counts).mean()
    assert metrics["accuracy"] == pytest.approx(float(hits), abs=1e-6)
    encode = task.base.tokenizer.encode  # the first token is not predicted
    size = sum(len(text) - encode(text).offsets[0][1] for text in texts_of(task, tokens))
    assert metrics["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / size, rel=1e-4)
    assert set(metrics) == {"accuracy", "perplexity", "bits_per_byte"}


def texts_of(task: TextTask, tokens: torch.Tensor) -> list[str]:
    """Return the letters that rows of tokens are."""
    written = [task.base.tokenizer.decode(row.tolist()) for row in tokens]
    assert {*written} <= {letter(number) for number in range(30)}
    return written


@torch.no_grad()
def test_scores_of_an_evaluation_are_computed_once(
    letters: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = loaded(letters, tiny_base)
    inputs, targets = rows_of(task.held_out())
    outputs = task.model()(inputs)
    calls: list[int] = []
    real = texts.scores
    monkeypatch.setattr(texts, "scores", lambda *args: calls.append(1) or real(*args))
    first = task.loss(outputs, targets), task.metrics(outputs, targets)
    assert len(calls) == 1
    assert task.loss(outputs, targets.clone()) == first[0] and len(calls) == 2
    outputs.mul_(2)
    assert task.loss(outputs, targets) != first[0] and len(calls) == 3
    with torch.enable_grad():
        task.loss(outputs, targets)
    assert len(calls) == 4


def test_hidden_states_of_the_prefix_give_the_same_losses(letters: Path, tiny_base: Path) -> None:
    whole, cached = (loaded(letters, tiny_base, cache=cache) for cache in ("none", "prefix"))
    for client in range(3):
        (tokens, targets), (states, same) = (
            rows_of(whole.client_data(client)),
            rows_of(cached.client_data(client)),
        )
        assert states.shape == (*tokens.shape, 32) and torch.equal(targets, same)
        losses = (task.loss(task.model()(x), targets) for task, x in ((whole, tokens), (cached, states)))
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_a_model_that_scales_what_enters_it_needs_no_cache(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base")
    task = loaded(letters, base)
    decoder: Any = texts.text_model(task.base, task.form).last_layers[0]
    real = type(decoder).forward

    def scaled(self: Any, *args: Any, **options: Any) -> Any:
        if options.get("inputs_embeds") is not None:
            options["inputs_embeds"] = 7 * options["inputs_embeds"]
        return real(self, *args, **options)

    monkeypatch.setattr(type(decoder), "forward", scaled)
    with pytest.raises(
        Refusal, match=r"this architecture changes what enters its first layer; use task\.cache=none"
    ):
        task.client_data(0).batch(ROWS)


def test_a_decoder_of_another_shape_is_refused(letters: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    task = loaded(letters, write_base(tmp_path / "base"))
    size = task.base.config["vocab_size"]
    other = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(other).save_pretrained(tmp_path / "base")
    with pytest.raises(Refusal, match="use a model such as Llama"):
        loaded(letters, tmp_path / "base").model()


def test_a_head_that_scales_its_logits_is_refused(letters: Path, tmp_path: Path) -> None:
    task = loaded(letters, write_base(tmp_path / "base"), cache="none")
    whole: Any = task.base.model(32)
    handle = whole.register_forward_hook(
        lambda _, inputs, outputs: setattr(outputs, "logits", 2 * outputs.logits)
    )
    try:
        with pytest.raises(Refusal, match="its logits are not a product of hidden states and a head"):
            task.model()
    finally:
        handle.remove()


def test_texts_end_with_a_token_and_are_cut(letters: Path, tiny_base: Path) -> None:
    long, short = (loaded(letters, tiny_base, cache="none", tokens=tokens) for tokens in (12, 4))
    tokens, _ = rows_of(long.client_data(0))
    cut, targets = rows_of(short.client_data(0))
    for text, row in zip(texts_of(long, tokens), tokens.tolist(), strict=True):
        assert row == (long.base.tokenizer.encode(text).ids + 12 * [long.base.end])[:12]
    assert torch.equal(cut, tokens[:, :4])
    assert torch.equal(targets[:, :3], cut[:, 1:]) and (targets[:, 3] == -100).all()
    whole = loaded(letters, tiny_base, cache="none", tokens=40)
    tokens, targets = rows_of(whole.client_data(0))
    lengths = [len(whole.base.tokenizer.encode(text).ids) for text in texts_of(whole, tokens)]
    assert (targets != -100).sum(1).tolist() == lengths, "the end is learned too"


def test_equal_texts_are_held_out_by_themselves(tmp_path: Path, tiny_base: Path) -> None:
    for client in range(2):
        (tmp_path / f"{client}.jsonl").write_text(20 * '{"text": "dear friend"}\n')
    task = loaded(tmp_path, tiny_base)
    assert 0 < len(task.test) < 20
    again = loaded(tmp_path, tiny_base)
    assert [len(each) for each in task.clients] == [len(each) for each in again.clients]


def test_a_person_is_held_out_with_all_texts(letters: Path, tiny_base: Path) -> None:
    task = loaded(letters, tiny_base, person="writer", held_out_share=0.4)
    persons = [name for data in task.clients for name in data.persons or ()]
    assert len(persons) == 30 - len(task.test)
    assert all(persons.count(name) == 2 for name in persons)


def test_real_texts_are_not_held_out(letters: Path, tiny_base: Path, tmp_path: Path) -> None:
    task = loaded(letters, tiny_base, simulated=False)
    assert sum(map(len, task.clients)) == 30 and len(task.test) == 0
    inputs, targets = rows_of(task.held_out())
    assert inputs.shape == (0, 8, 32) and targets.shape == (0, 8)
    public = tmp_path / "public.txt"
    public.write_text("the sea is calm")
    other = loaded(letters, tiny_base, simulated=False, held_out_file=str(public))
    assert len(other.held_out()) == 1


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_texts_with_labels_are_classified(letters: Path, tiny_base: Path, cache: str) -> None:
    task = loaded(letters, tiny_base, label="mood", cache=cache)
    assert task.form.labels == ("calm", "glad") and task.classes == 2
    inputs, targets = rows_of(task.client_data(1))
    outputs = task.model()(inputs)
    assert outputs.shape == (len(targets), 2) and set(targets.tolist()) == {0, 1}
    torch.testing.assert_close(task.loss(outputs, targets), torch.tensor(math.log(2)))
    assert 0 <= task.derived(task.metrics(outputs, targets))["accuracy"] <= 1
    trained = {name for name, each in task.model().named_parameters() if each.requires_grad}
    assert "head.weight" in trained and "head.bias" not in trained


def test_partitions_deal_simulated_texts(letters: Path, tiny_base: Path) -> None:
    task = loaded(letters, tiny_base, partition="iid", num_clients=6)
    assert [len(each) for each in task.clients].count(0) == 0 and task.num_clients == 6
    by_class = loaded(letters, tiny_base, partition="shards", num_clients=5, label="mood")
    assert by_class.num_clients == 5
    assert sum(map(len, by_class.clients)) + len(by_class.test) == 30


def test_a_device_has_its_own_texts(letters: Path, tiny_base: Path) -> None:
    task = load(base=str(tiny_base), data=str(letters / "client-1.jsonl"), base_bits=32)
    assert task.num_clients == 1 and len(task.client_data(0)) == 10
    server = load(base=str(tiny_base), base_bits=32)
    assert server.num_clients == 0
    assert agreement_of(server) == agreement_of(task)
    assert agreement_of(load(base=str(tiny_base), base_bits=32, tokens=9)) != agreement_of(task)


def test_wrong_keys_are_refused(letters: Path, tiny_base: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    write_letters(one, clients=1, letters=1)
    real = "these texts are real, and classes taken from them would reveal them; declare the classes"
    cases: list[tuple[Path | None, dict[str, Any], str]] = [
        (
            letters,
            {"num_clients": 4},
            f"task.num_clients=4: {letters} gives 3, one per file or folder; leave it out",
        ),
        (
            letters,
            {"partition": "iid"},
            "real texts stay with their owners; use natural, or set task.simulated=true",
        ),
        (letters, {"partition": "shards", "simulated": True}, "needs classes, and these texts have none"),
        (letters, {"label": "mood"}, f"task.labels=[]: {real}"),
        (one, {"label": "mood", "labels": ["glad"]}, "task.labels=['glad']: give at least two classes"),
        (letters, {"label": "mood", "labels": ["glad", "sad"]}, "1 labels of the texts are not among them"),
        (one, {"simulated": True, "held_out_share": 1e-9}, "holds out no text; increase it"),
        (letters, {"simulated": True, "held_out_share": 1}, "give a number above 0 and below 1"),
    ]
    for folder, keys, sentence in cases:
        assert sentence in refusal_of(folder, tiny_base, **keys), keys
    with pytest.raises(Refusal, match=r"task.base=None: name the language model"):
        load(str(letters))


def test_sizes_of_tokens_are_those_of_the_text(tiny_base: Path) -> None:
    base = open_base(str(tiny_base))
    sizes = texts.token_bytes(base)
    for text in ("dear friend", "grüße an dich\n", " 3 \u4e2d\u6587 \U0001f600"):
        assert int(sizes[base.tokenizer.encode(text).ids].sum()) == len(text.encode())
    assert sizes[base.end] == 0 and len(sizes) == base.config["vocab_size"]


def test_a_run_trains_predicts_and_loads(letters: Path, tiny_base: Path, tmp_path: Path) -> None:
    digest = open_base(str(tiny_base)).digest
    keys = {"folder": str(letters), "base": str(tiny_base), "simulated": True, "tokens": 8, "base_bits": 32}
    run = fv.simulate(
        {"name": "text", **keys, "adapter": ADAPTER},
        privacy="none",
        num_rounds=3,
        learning_rate=0.5,
        folder=tmp_path / "run",
        quiet=True,
        audit="off",
    )
    first, *_, last = run.history
    assert last["perplexity"] < first["perplexity"]
    form = json.loads((tmp_path / "run" / "text.json").read_text())
    assert form["base"] == digest and form["adapter"]["modules"] == ["q_proj", "down_proj"]
    for each in (run, fv.load(tmp_path / "run")):
        predicted = each.predict(str(letters / "client-0.jsonl"))
        assert [*predicted] == ["perplexity"] and len(predicted["perplexity"]) == 10
    task = loaded(letters, tiny_base)
    inputs, targets = rows_of(task.held_out())
    with torch.no_grad():
        metrics = task.derived(task.metrics(run.model(inputs), targets))
    assert metrics["perplexity"] == pytest.approx(run.metrics["perplexity"], rel=1e-4)
    assert open_base(str(tiny_base)).digest == digest
    found = attack_on(tmp_path / "run", 1)
    assert isinstance(found.records, LazyExamples) and len(found.records) == found.members + len(inputs) // 2
    assert len(by_loss(found, 0)) == len(found.records)
    write_base(tmp_path / "other", layers=3)
    with pytest.raises(Refusal, match="is not the language model of this run; name that one"):
        texts.read_form(tmp_path / "run" / "text.json", open_base(str(tmp_path / "other")))


def test_labels_are_predicted_with_their_probability(letters: Path, tiny_base: Path) -> None:
    task = loaded(letters, tiny_base, label="mood")
    inputs = task.encode(letters / "client-0.jsonl")
    assert inputs.dtype == torch.int64 and inputs.shape == (10, 8)
    columns = task.decode(task.model()(inputs) + torch.tensor([0.0, math.log(3)]))
    assert set(columns["label"]) == {"glad"}
    np.testing.assert_allclose(columns["probability"], 0.75, rtol=1e-5)
    with pytest.raises(Refusal, match="give the path of"):
        task.encode([1, 2])


def test_real_texts_have_ledgers_and_no_metrics(commands: Commands, letters: Path, tiny_base: Path) -> None:
    keys = ("simulate", "task=text", f"task.folder={letters}", f"task.base={tiny_base}", "task.tokens=8")
    code, done = commands.run(*keys)
    assert code == 2 and "task.data_id=None: name these real data" in done.err
    code, done = commands.run(
        *keys,
        *(
            "num_rounds=2",
            "task.data_id=letters-1",
            f"ledger.dir={commands.folder / 'ledgers'}",
            "accept_vacuous=true",
        ),
        *("reason=test", "audit=off", "hydra.run.dir=run"),
    )
    assert code == 0, done.err
    assert "perplexity" not in done.out and "completed: 2 rounds" in done.out


@pytest.mark.parametrize("mode", MODES)
def test_the_command_trains_in_every_mode(
    commands: Commands, letters: Path, tiny_base: Path, mode: str
) -> None:
    before = (tiny_base / "model.safetensors").read_bytes()
    code, done = commands.run(
        *("simulate", "task=text", f"task.folder={letters}", f"task.base={tiny_base}", "task.simulated=true"),
        *("task.tokens=8", "num_rounds=2", "audit=off", f"privacy={mode}", *MODES[mode]),
        *("adapter=lora", "adapter.rank=2", "hydra.run.dir=run"),
    )
    assert code == 0, done.err
    assert done.out.count("perplexity") == 2 and "bits per byte" in done.out
    arrays = load_file(commands.folder / "run" / "model.safetensors")
    task = load(str(letters), str(tiny_base), adapter={"name": "lora", "rank": 2})
    trained = sum(each.numel() for each in task.model().parameters() if each.requires_grad)
    assert sum(each.size for each in arrays.values()) == dimension_of(task) == trained
    assert (tiny_base / "model.safetensors").read_bytes() == before


def test_perplexity_of_a_diverged_model_has_few_digits(letters: Path, tiny_base: Path) -> None:
    figures = loaded(letters, tiny_base).derived({"nats": 1e6, "tokens": 10.0, "bytes": 40.0})
    assert len(f"{figures['perplexity']:.4f}") < 16


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 8])
def test_features_of_classes_are_balanced(letters: Path, tiny_base: Path, tokens: int) -> None:
    model = loaded(letters, tiny_base, label="mood", tokens=tokens, cache="none").model()
    assert isinstance(model, TextModel)
    states = model.states(torch.randint(1, 200, (6, tokens)))[:, -1]
    features = model.features(states)
    part = (features @ model.axis)[:, None] * model.axis
    assert features.isfinite().all() and 0.1 < float(part.norm(dim=1).mean()) < 10
    assert 0.1 < float((features - part).norm(dim=1).mean()) < 10
    weight = torch.randn(3, states.shape[1])
    torch.testing.assert_close(
        features @ weight.t(), states @ model.features(weight).t(), rtol=1e-3, atol=1e-3
    )
