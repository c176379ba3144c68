"""Generation gives the tokens of transformers, repeats by its seed, and prints plain lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Commands
from shared.texts import write_letters

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.text.base import open_base
from fedveil.text.generate import Decoding, continuation, lines_of, plain
from fedveil.text.task import TextTask, load, text_model

GREEDY = Decoding(12, 0)
START = "dear friend the sea"


@pytest.fixture(scope="module")
def task(tiny_base: Path) -> TextTask:
    return load(base=str(tiny_base), base_bits=32, adapter={"name": "lora", "rank": 2})


def written(task: TextTask, sampling: Decoding, text: str = START) -> str:
    return "".join(continuation(task.model(), task, text, sampling))


def reference_of(base: Path, tokens: torch.Tensor, count: int) -> list[int]:
    """Return the tokens with which transformers goes on."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(base)
    outputs = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return outputs[0, tokens.shape[1] :].tolist()


def test_the_likeliest_tokens_are_those_of_transformers(task: TextTask, tiny_base: Path) -> None:
    encoder = open_base(str(tiny_base)).tokenizer
    tokens = torch.tensor([encoder.encode(START).ids])
    expected = encoder.decode(reference_of(tiny_base, tokens, GREEDY.tokens))
    assert written(task, GREEDY).rstrip("\ufffd") == expected.rstrip("\ufffd") != ""


def test_a_decoder_of_transformers_gives_the_same_text(
    task: TextTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_plain(_: object) -> bool:
        return False

    from fedveil.text.loading import load_model

    own = written(task, GREEDY)
    monkeypatch.setattr("fedveil.text.loading.is_plain", is_plain)
    load_model.cache_clear()
    text_model.cache_clear()
    try:
        model = task.model()
        assert type(model.get_submodule("decoder")).__module__.startswith("transformers")
        other = "".join(continuation(model, task, START, GREEDY))
    finally:  # no other test of this process gets that decoder
        load_model.cache_clear()
        text_model.cache_clear()
    assert other == own


def test_a_seed_repeats_a_text_and_another_changes_it(task: TextTask) -> None:
    texts = [written(task, Decoding(20, 1.0, seed)) for seed in (0, 0, 1, 2, 3)]
    assert texts[0] == texts[1] and len(set(texts)) > 2
    assert written(task, Decoding(12, 1e-9)) == written(task, GREEDY)


def test_adapters_change_the_text(task: TextTask) -> None:
    model = task.model()
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "up.weight" in name:
                each.fill_(3.0)
    assert "".join(continuation(model, task, START, GREEDY)) != written(task, GREEDY)


def test_a_text_ends_at_the_end_token(task: TextTask) -> None:
    model: Any = task.model()
    model.end = reference_of(task.base.folder, torch.tensor([task.base.tokenizer.encode(START).ids]), 5)[4]
    text = "".join(continuation(model, task, START, GREEDY))
    assert written(task, GREEDY).startswith(text) and len(text) < len(written(task, GREEDY))


def test_other_models_and_values_are_refused(task: TextTask, tiny_base: Path, tmp_path: Path) -> None:
    letters = write_letters(tmp_path / "letters")
    classes = load(str(letters), str(tiny_base), label="mood", simulated=True)
    cases: list[tuple[Any, str, Decoding, str]] = [
        (object(), START, GREEDY, "is not a language model; name a run with task=text"),
        (classes, START, GREEDY, "classifies texts and writes none; use fedveil predict"),
        (task, "", GREEDY, "TEXT='': has no token; write the beginning of a text"),
        (task, START, Decoding(0), "--tokens=0: must be at least 1"),
        (task, START, Decoding(1, -0.1), "--temperature=-0.1: must be at least 0"),
        (task, START, Decoding(1, float("nan")), "--temperature=nan: must be at least 0"),
        (task, START, Decoding(1, 1, -1), "--seed=-1: must be a whole number from 0"),
    ]
    for other, text, sampling, sentence in cases:
        with pytest.raises(Refusal) as refusal:
            continuation(task.model(), other, text, sampling)
        assert sentence in str(refusal.value)


def test_lines_are_broken_between_words_as_they_come() -> None:
    words = ["Dear fri", "end, the sea", " is calm\n\n", "and ", "w", "e sail home", "-" * 25, " x"]
    assert "".join(lines_of(words, 20)).splitlines() == [
        *("Dear friend, the sea", "is calm", "", "and we sail"),
        *("home" + 25 * "-", "x"),
    ]
    taken: list[str] = []

    def pieces() -> Iterator[str]:
        for word in ("one ", "two ", "three"):
            taken.append(word)
            yield word

    assert next(lines_of(pieces())) == "one" and taken == ["one "]


def test_no_character_steers_the_terminal() -> None:
    assert plain("a\x1b[2Jb\x07\tc\u202e\r\nd\u00fc") == "a[2Jb c\nd\u00fc"


def test_the_command_writes_and_warns_without_a_promise(
    commands: Commands, tiny_base: Path, tmp_path: Path
) -> None:
    letters = write_letters(tmp_path / "letters")
    keys = (f"task.folder={letters}", f"task.base={tiny_base}", "task.simulated=true", "task.tokens=8")
    code, done = commands.run(
        *("simulate", "task=text", *keys, "num_rounds=1", "audit=off", "privacy=none", "hydra.run.dir=run")
    )
    assert code == 0, done.err
    code, done = commands.run("generate", "run", START, "--tokens", "9")
    assert code == 0 and done.out.startswith(START) and max(map(len, done.out.splitlines())) <= 80
    assert done.err.startswith("warning: no epsilon is known for this model") and "clients' texts" in done.err
    loaded = fv.load(commands.folder / "run")
    text = loaded.generate(START, tokens=9)
    assert "".join(lines_of([START, text])).rstrip() == done.out.rstrip()
    with pytest.raises(Refusal, match="must be at least 1"):
        loaded.generate(START, tokens=0)
    code, done = commands.run("generate", "run", START, "--base", str(letters))
    assert code == 2 and done.err.startswith(f"task.base='{letters}': has no config.json")
