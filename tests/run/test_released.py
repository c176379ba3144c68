"""A released model goes with its run's folder, without the clients' data."""

import json
from pathlib import Path

import pytest
from shared.texts import letter, write_base

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.run.released import model_of, task_of


def test_a_run_on_texts_needs_its_folder_and_its_base(tmp_path: Path) -> None:
    base, letters = write_base(tmp_path / "base"), tmp_path / "letters"
    letters.mkdir()
    for client in range(3):
        lines = (json.dumps({"words": letter(4 * client + number)}) for number in range(4))
        (letters / f"{client}.jsonl").write_text("\n".join(lines))
    keys = {"folder": str(letters), "base": str(base), "tokens": 8, "text_field": "words"}
    run = tmp_path / "run"
    fv.simulate({"name": "text", **keys}, privacy="none", num_rounds=1, audit="off", folder=run, quiet=True)
    texts = (letters / "0.jsonl").rename(tmp_path / "0.jsonl")
    for client in (1, 2):
        (letters / f"{client}.jsonl").unlink()
    before = fv.load(run).predict(str(texts))["perplexity"]
    moved = {"base": str(base.rename(tmp_path / "moved"))}
    with pytest.raises(Refusal, match=r"^task\.base="):
        task_of(run)
    task = task_of(run, keys=moved)
    assert task.num_clients == 0
    after = fv.load(run, task=task).predict(str(texts))["perplexity"]
    assert after.shape == (4,) and (before == after).all()
    model_of(run, task)
    other = write_base(tmp_path / "other", layers=3)
    with pytest.raises(Refusal, match="is not the language model of this run; name that one"):
        task_of(run, keys={"base": str(other)})


def test_a_task_without_a_base_takes_no_other(tmp_path: Path) -> None:
    fv.simulate("digits", num_rounds=1, folder=tmp_path / "run", quiet=True, audit="off")
    with pytest.raises(Refusal, match=r"--base='here': task=digits has no base; leave it out"):
        task_of(tmp_path / "run", keys={"base": "here"})
