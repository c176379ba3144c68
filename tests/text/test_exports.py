"""Exports give what the run's model gives: PEFT loads the adapters, transformers the merged weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Commands
from safetensors.torch import load_file, save_file
from shared.texts import write_base
from torch import Tensor, nn

from fedveil.base.refusal import Refusal
from fedveil.text.base import open_base
from fedveil.text.exports import lora_of, merged_weight, padding, write_merged, write_peft
from fedveil.text.model import TextModel
from fedveil.text.task import TextTask, load

ADAPTERS = ("lora", "ffa", "rxr")
ROWS = [{"unit": "record", "adversary": "model", "epsilon": 3.0, "delta": 1e-5, "adjacency": "zero-out"}]
TOKENS = torch.randint(0, 290, (2, 9), generator=torch.Generator().manual_seed(0))


def trained(base: Path, name: str, bits: int = 32, **keys: Any) -> tuple[TextTask, TextModel]:
    """Return a task and its model with drawn values of the trained factors."""
    adapter = {"name": name, "rank": 3, "layers": 2, "scale": 0.5}
    task = load(base=str(base), base_bits=bits, adapter=adapter, **keys)
    model = task.model()
    assert isinstance(model, TextModel)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.normal_(0, 0.3, generator=draw)
    return task, model.eval()


@torch.no_grad()
def logits_of(model: TextModel) -> Tensor:
    return model.states(TOKENS) @ model.words.get_parameter("weight").float().t()


def base_logits(base: Path, **options: Any) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, **options)
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_adapters_and_gives_the_same_logits(name: str, tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    task, model = trained(tiny_base, name)
    assert write_peft(tmp_path, task, model, ROWS)["base_sha256"] == task.base.digest
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    adapted: Any = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        logits = adapted(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, logits_of(model), rtol=1e-4, atol=1e-5)
    assert (logits - base_logits(tiny_base)).abs().max() > 0.1
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 2 * 7
    card = (tmp_path / "README.md").read_text()
    assert "| record | model | 3 | 1e-05 |" in card and task.base.digest in card


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_weights_give_the_same_logits(name: str, tiny_base: Path, tmp_path: Path) -> None:
    task, model = trained(tiny_base, name)
    assert write_merged(tmp_path, task, model, ROWS)["largest_difference"] < 1e-4
    torch.testing.assert_close(base_logits(tmp_path), logits_of(model), rtol=1e-4, atol=1e-4)
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("dear friend")["input_ids"] == task.base.tokenizer.encode("dear friend").ids
    assert not [*tmp_path.glob("*.py")]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_merged_model_has_the_weights_of_the_bits(bits: int, tiny_base: Path, tmp_path: Path) -> None:
    task, model = trained(tiny_base, "lora", bits)
    write_merged(tmp_path, task, model, ROWS)
    difference = (base_logits(tmp_path) - logits_of(model)).abs().max()
    assert difference < 0.04 * logits_of(model).abs().max()
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path, tiny_base)]
    assert [each.dtype for each in files[0].values()] == [each.dtype for each in files[1].values()]
    packed = model.decoder.layers[0].mlp.up_proj.layer
    name = "model.layers.0.mlp.up_proj.weight"
    down, up = lora_of(model.decoder.layers[0].mlp.up_proj)
    torch.testing.assert_close(files[0][name], merged_weight(packed) + up @ down, rtol=0.01, atol=0.01)


def test_merged_weights_keep_parts_and_types(tmp_path: Path) -> None:
    base, parts = write_base(tmp_path / "base"), {}
    whole = {name: each.half() for name, each in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    for number, start in enumerate((0, 9)):
        part = dict([*whole.items()][start : start + 9 + 99 * number])
        save_file(part, base / f"model-{number}.safetensors", metadata={"format": "pt"})
        parts |= dict.fromkeys(part, f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": parts}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "modeling_own.py").write_text("raise SystemExit")
    task, model = trained(base, "ffa")
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", task, model, ROWS)
    written = load_file(tmp_path / "out" / "model-1.safetensors")
    assert {each.dtype for each in written.values()} == {torch.float16}
    expected = logits_of(model)
    torch.testing.assert_close(base_logits(tmp_path / "out").float(), expected, rtol=0.05, atol=0.05)
    assert not (tmp_path / "out" / "modeling_own.py").exists()


def test_damaged_or_renamed_weights_are_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model = trained(tiny_base, "lora")

    def doubled(layer: nn.Module) -> Tensor:
        return 2 * merged_weight(layer)

    monkeypatch.setattr("fedveil.text.exports.merged_weight", doubled)
    with pytest.raises(Refusal, match="--to='merged': gives logits that differ by"):
        write_merged(tmp_path, task, model, ROWS)
    monkeypatch.setattr("fedveil.text.exports.WEIGHTS", "no*.safetensors")
    with pytest.raises(Refusal, match=r"has no tensor model\.layers\.0.* use --to peft"):
        write_merged(tmp_path, task, model, ROWS)


def classifier(base: Path, bits: int = 32) -> tuple[TextTask, TextModel, Tensor]:
    """Return a task with three classes, its model, and texts of 5 to 9 tokens that end with the end token."""
    labels = ["calm", "glad", "grey"]
    task, model = trained(base, "ffa", bits, label="mood", labels=labels)
    tokens = TOKENS.clone().clamp(min=2)
    tokens[0, 8], tokens[1, 5:] = task.base.end, task.base.end
    return task, model, tokens


@torch.no_grad()
def scores_by_transformers(model: Any, tokens: Tensor, end: int) -> Tensor:
    """Return the scores of each text alone, without padding."""
    texts = [row[: 1 + (row == end).int().argmax()] for row in tokens]
    return torch.cat([model.eval()(input_ids=text[None]).logits for text in texts])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_loads_a_head_of_classes(tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    task, model, tokens = classifier(tiny_base)
    write_peft(tmp_path, task, model, ROWS)
    base: Any = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    scores = scores_by_transformers(PeftModel.from_pretrained(base, tmp_path), tokens, task.base.end)
    torch.testing.assert_close(scores, model(tokens), rtol=1e-4, atol=1e-5)
    assert scores.abs().max() > 0.5
    card = (tmp_path / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "- Classes: 0 calm, 1 glad, 2 grey" in card


@pytest.mark.parametrize("bits", [32, 4])
def test_a_merged_classifier_gives_the_same_scores(
    bits: int, tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaForSequenceClassification

    task, model, tokens = classifier(tiny_base, bits)
    assert write_merged(tmp_path, task, model, ROWS)["largest_difference"] < {32: 1e-4, 4: 0.05}[bits]
    assert "Loading weights" not in capfd.readouterr().err
    loaded: Any = LlamaForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    tolerance = {32: 1e-4, 4: 0.05 * float(model(tokens).detach().abs().max())}[bits]
    scores = scores_by_transformers(loaded, tokens, task.base.end)
    torch.testing.assert_close(scores, model(tokens), rtol=0, atol=tolerance)
    assert loaded.config.id2label == {0: "calm", 1: "glad", 2: "grey"}


def test_padding_of_a_classifier_is_no_end_token(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    assert padding(open_base(str(base))) is None
    plan = json.loads((base / "tokenizer.json").read_text())
    for number, word in ((298, "beyond the vocabulary"), (1, "!")):
        plan["added_tokens"].append({**plan["added_tokens"][0], "id": number, "content": word})
    (base / "tokenizer.json").write_text(json.dumps(plan))
    task, model, tokens = classifier(base)
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", task, model, ROWS)
    from transformers import AutoModelForSequenceClassification

    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert loaded.config.pad_token_id == padding(task.base) == 1
    ends = (tokens == task.base.end).int().cumsum(1) > 1
    with torch.no_grad():  # both texts at once
        scores = loaded(input_ids=tokens.masked_fill(ends, 1)).logits
    torch.testing.assert_close(scores, model(tokens), rtol=1e-4, atol=1e-4)


def test_a_newcomer_goes_from_letters_to_an_adapter(
    commands: Commands, letters: Path, tiny_base: Path
) -> None:
    def done(*words: str) -> str:
        code, command = commands.run(*words)
        assert code == 0, command.err
        assert "warning" not in command.err
        return command.out

    keys = (
        f"task.folder={letters}",
        f"task.base={tiny_base}",
        "task.tokens=8",
        "task.simulated=true",
    )
    done("simulate", "task=text", *keys, "num_rounds=1", "adapter=rxr", "hydra.run.dir=first")
    rows = done("predict", "first", str(letters / "client-0.jsonl")).splitlines()
    assert rows[0] == "perplexity" and len(rows) == 11
    assert done("generate", "first", "dear friend", "--temperature", "0").startswith("dear friend")
    said = done("export", "first", "--to", "peft")
    assert said.splitlines()[0] == "first/export/peft" and "epsilon  3 of a record at delta" in said
    folder = commands.folder / "first" / "export" / "peft"
    card = json.loads((folder / "card.json").read_text())
    assert sorted(card["files"]) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert "passed" in done("verify", "first")
    code, command = commands.run("export", "first", "--to", "onnx")
    assert code == 2
    assert command.err.startswith("--to='onnx': choose one of peft, merged; another does not suit task=text")
    code, command = commands.run("predict", str(folder), str(letters / "client-0.jsonl"))
    assert code == 2 and "holds a model for peft, which other programs read" in command.err
