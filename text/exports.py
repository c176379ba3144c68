"""Exports of a fine-tuned language model: adapters as a folder of PEFT, or merged weights as a folder of Hugging Face."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..base.bounded_decoding import format_number
from ..base.refusal import Refusal
from .adapters import Adapter, weight_of
from .base import Base
from .loading import CONFIG, TYPES, WEIGHTS, load_model
from .model import TextModel
from .packed import PackedLinear
from .task import SENTENCE, TOLERANCES, TextTask, base_decoder

README = "README.md"
INDEX = "model*.index.json"  # which file of a base has which tensor
RELEASED = "This export is post-processing of the released model, so that its epsilon is that of the run."
ADAPTERS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as PEFT reads them
PREFIX = "base_model.model."  # of PEFT, before a name of the base
# Files of a base that a merged model has too, besides its weights; no code of anybody is among them.
COPIED = (
    "config.json",
    "generation_config.json",
    INDEX,
    "*token*.json",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)
HALF = 16  # bits of a weight with which a merged model is checked, or 32
ROUNDING = 2 * max(TOLERANCES.values())  # of two models, relative to the largest logit
LARGE = 0.1  # score of a class: a smaller one is compared as if it were as large
HEAD = "score"  # name of the layer to classes in transformers' models
CAUSAL, CLASSES = "ForCausalLM", "ForSequenceClassification"  # ends of the names of transformers' models
EXAMPLE = {
    "peft": """\
from peft import PeftModel
from transformers import AutoModel{kind}

base = AutoModel{kind}.from_pretrained("BASE"{keys})
model = PeftModel.from_pretrained(base, "THIS FOLDER")""",
    "transformers": """\
from transformers import AutoModel{kind}, AutoTokenizer

model = AutoModel{kind}.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")""",
}


def write_peft(
    folder: Path, task: TextTask, model: TextModel, privacy: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write the adapters as LoRA, as `PeftModel.from_pretrained` loads them onto the base.

    Args:
      folder: empty.
      task: of the run.
      model: its released one.
      privacy: rows of the run's result, for the model card.

    Returns:
      Entries of the export's card.
    """
    adapters = dict(_adapters(task, model))
    tensors: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        down, up = lora_of(adapter)
        tensors |= {f"{PREFIX}{path}.lora_A.weight": down, f"{PREFIX}{path}.lora_B.weight": up}
    tensors |= {f"{PREFIX}{name}": each for name, each in _head(model).items()}
    save_file(tensors, folder / ADAPTERS, metadata={"format": "pt"})
    rank = task.form.adapter.rank
    config = {
        "peft_type": "LORA",
        "task_type": ("CAUSAL_LM", "SEQ_CLS")[bool(task.classes)],
        "modules_to_save": [HEAD] * bool(task.classes) or None,
        "base_model_name_or_path": task.base.config.get("_name_or_path"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # so that PEFT's factor is 1: the second factor of each layer has the scale
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapters),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / README).write_text(_readme(task, "peft", privacy), encoding="utf-8")
    return {"file": ADAPTERS, "base_sha256": task.form.base}


def write_merged(
    folder: Path, task: TextTask, model: TextModel, privacy: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write the base with the adapters in its weights, as transformers loads it, and compare its logits.

    Arguments, result and refusals as of `write_peft`. Weights have the types of the base's files. Those that the run used
    with 8 or 4 bits are the same numbers, unpacked.

    Raises:
      Refusal: the base's files name their weights otherwise, or the logits differ.
    """
    changed = {f"{path}.weight": layer for path, layer in _changed(task, model)}
    files = sorted(task.base.folder.glob(WEIGHTS))
    parts: dict[str, str] = {}
    for file in files:
        tensors = load_file(file)
        if task.classes:  # the layer to the vocabulary, where it is one of its own, has no use
            tensors = {name: each for name, each in tensors.items() if name.startswith(_decoder_name(task))}
        if file == files[-1]:
            tensors |= _head(model)
        for name in tensors.keys() & changed.keys():
            tensors[name] = merged_weight(changed.pop(name)).to(tensors[name].dtype).contiguous()
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        parts |= dict.fromkeys(tensors, file.name)
    if changed:
        remedy = f"has no tensor {min(changed)} in the files of this base; use --to peft"
        raise Refusal("--to", "merged", remedy)
    for pattern in COPIED:
        for file in task.base.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    if task.classes:
        _describe_classes(folder, task, parts)
    (folder / README).write_text(_readme(task, "transformers", privacy), encoding="utf-8")
    difference = _difference(folder, task, model)
    return {"file": files[0].name, "base_sha256": task.form.base, "largest_difference": difference}


def _describe_classes(folder: Path, task: TextTask, parts: Mapping[str, str]) -> None:
    """Change the configuration of a copied base into that of a classifier.

    Args:
      folder: of the export.
      task: of the run.
      parts: file of each tensor.
    """
    labels, config = task.form.labels, task.base.config
    names = [each.replace(CAUSAL, CLASSES) for each in config.get("architectures") or ()]
    described = {
        **config,
        "architectures": names,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "pad_token_id": padding(task.base),
    }
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for index in folder.glob(INDEX):
        index.write_text(json.dumps({"metadata": {}, "weight_map": parts}, indent=2) + "\n", encoding="utf-8")


def padding(base: Base) -> int | None:
    """Return a token to pad with, which ends no text, so that transformers finds the last token; None without one."""
    plan = json.loads(base.tokenizer.to_str())
    special = [each["id"] for each in plan.get("added_tokens", ()) if each.get("special")]
    words = {*range(int(base.config["vocab_size"]))} - {base.end}
    return next((each for each in (base.config.get("pad_token_id"), *special) if each in words), None)


def _head(model: TextModel) -> dict[str, Tensor]:
    """Return the weight of the layer to classes by its name in transformers; empty for a language model."""
    weights = model.head.named_parameters()
    return {f"{HEAD}.{name}": model.features(each.detach()).contiguous() for name, each in weights}


def lora_of(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return an adapter as the two factors of LoRA with the factor 1, shapes (rank, inputs) and (outputs, rank)."""
    up = adapter.scale * adapter.up.weight.detach()
    for square in adapter.square.parameters():  # of `rxr`
        up = up @ square.detach()
    return adapter.down.weight.detach().contiguous(), up.contiguous()


def merged_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer with its adapter, or of a packed one, shape (outputs, inputs), float32."""
    if not isinstance(layer, Adapter):
        return weight_of(layer)
    down, up = lora_of(layer)
    return weight_of(layer.layer) + up @ down


def _adapters(task: TextTask, model: TextModel) -> Iterator[tuple[str, Adapter]]:
    """Yield the adapters by the names that their layers have in the base."""
    for path, layer in _named(task, model):
        if isinstance(layer, Adapter):
            yield path, layer


def _changed(task: TextTask, model: TextModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers whose weights are not those in the base's files: with adapters, or packed; by their names there."""
    inside = {id(adapter.layer) for _, adapter in _adapters(task, model)}
    for path, layer in _named(task, model):
        if isinstance(layer, Adapter | PackedLinear) and id(layer) not in inside:
            yield path, layer


def _named(task: TextTask, model: TextModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model's decoder by their names in the whole base."""
    for path, module in model.decoder.named_modules():
        yield f"{_decoder_name(task)}.{path}".strip("."), module


def _decoder_name(task: TextTask) -> str:
    """Return the name of the decoder in the whole base."""
    whole, decoder = task.base.model(task.form.base_bits), base_decoder(task.base, task.form)
    return next(name for name, module in whole.named_modules() if module is decoder)


def _difference(folder: Path, task: TextTask, model: TextModel) -> float:
    """Return the largest difference between outputs of the written model and of the released one on a public sentence.

    Outputs are logits of all tokens, or scores of the classes. It is relative to the largest of them.
    """
    bits = max(task.form.base_bits, HALF)
    tokens = torch.tensor([[*task.base.tokenizer.encode(SENTENCE).ids, task.base.end]])
    with torch.no_grad():
        if task.classes:
            written, expected = _scores(folder, bits, tokens), model(tokens)
        else:
            whole: Any = load_model(folder, bits)
            weight = model.words.get_parameter("weight").float()
            written, expected = whole(input_ids=tokens).logits.float(), model.states(tokens) @ weight.t()
    difference = float((written - expected).abs().max() / expected.abs().max().clamp(min=LARGE))
    if not difference <= ROUNDING:
        remedy = f"gives logits that differ by {difference:.2%} of the largest; use --to peft"
        raise Refusal("--to", "merged", remedy)
    return difference


def _scores(folder: Path, bits: int, tokens: Tensor) -> Tensor:
    """Return the scores that transformers' model of classes gives to texts, shape (n, classes), float32.

    Args:
      folder: of the model.
      bits: of a weight: 32 or 16.
      tokens: shape (n, tokens).
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    showed_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=TYPES[bits]
    )
    if showed_bars:
        logging.enable_progress_bar()
    return model.eval()(input_ids=tokens).logits.float()


def _readme(task: TextTask, library: str, privacy: Sequence[Mapping[str, Any]]) -> str:
    """Return the model card: how to load the model, what it was trained from, and epsilon against each adversary."""
    form, keys = task.form, task.form.adapter
    rows = [
        f"| {each['unit']} | {each['adversary']} | {format_number(each['epsilon'], '.4g')} | {each['delta']:g} |"
        for each in privacy
    ]
    # A row of a client's own model has a statement of its own.
    statements = [f"Privacy: {each['said']}." for each in privacy if "said" in each] or [RELEASED]
    lines = [
        *(
            "---",
            f"library_name: {library}",
            "tags: [federated-learning, differential-privacy, fedveil]",
            "---",
        ),
        *("", "# Language model that clients fine-tuned on their own texts", "", "Trained by fedveil.", ""),
        f"- Adapters: {keys.name}, rank {keys.rank}, scale {keys.scale:g}; number of last layers with them: {keys.layers}",
        f"- Base, frozen, with {form.base_bits} bits a weight; SHA-256 of its configuration, tokenizer and weights:",
        f"  `{form.base}`",
        f"- Texts: cut at {form.tokens} tokens",
        *_classes(task),
        *("", "```python", _example(task, library), "```", "", "## What is promised to whom", ""),
        *("| hidden | from | epsilon | delta |", "|---|---|---|---|", *rows, ""),
        "Without privacy epsilon is infinite: the model may then repeat clients' texts word by word.",
        *statements,
    ]
    return "\n".join(lines) + "\n"


def _classes(task: TextTask) -> list[str]:
    """Return the lines on a classifier: its classes, and the last token of a text; none of a language model."""
    if not task.classes:
        return []
    labels = ", ".join(f"{number} {label}" for number, label in enumerate(task.form.labels))
    return [f"- Classes: {labels}", f"- A text that is not cut ends with the token {task.base.end}; add it"]


def _example(task: TextTask, library: str) -> str:
    """Return the lines of Python that load an export."""
    if not task.classes:
        return EXAMPLE[library].format(kind=CAUSAL, keys="")
    keys = f", num_labels={task.classes}, pad_token_id={padding(task.base)}"
    return EXAMPLE[library].format(kind=CLASSES, keys=keys)
