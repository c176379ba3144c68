"""`fedveil audit claim`: evidence in every form, the three verdicts with their exit codes, refusals of one sentence."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fedveil.__main__ import main
from fedveil.audit import membership_attacks
from fedveil.cli.audit import audit_run

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

Claim = Callable[..., tuple[int, str, str]]


@pytest.fixture
def claim(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Claim:
    monkeypatch.chdir(tmp_path)

    def run(epsilon: object, *evidence: object, delta: object = 1e-5) -> tuple[int, str, str]:
        argv = ["audit", "claim", "--epsilon", epsilon, "--delta", delta, *evidence]
        monkeypatch.setattr(sys, "argv", ["fedveil", *map(str, argv)])
        return main(), *capsys.readouterr()

    return run


def scores(apart: float, count: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    inside = rng.random(count) < 0.5
    values = rng.standard_normal(count) + apart * inside
    return values[inside], values[~inside]


def test_guesses_and_the_three_verdicts(claim: Claim) -> None:
    evidence = ("--guesses", 400, "--correct", 330, "--canaries", 1000)
    code, out, err = claim(1, *evidence)
    assert (code, err) == (3, "")
    assert out.splitlines()[-1] == "violated: epsilon is at least 1.24, and 1 is claimed"
    code, out, _ = claim(3, *evidence)
    assert code == 0
    assert (
        out.splitlines()[-1] == "consistent: this evidence does not refute the claim, and proves no privacy"
    )
    code, out, _ = claim(8, *evidence)
    assert code == 4
    assert out.splitlines()[-1].startswith(
        "too weak to tell: not even perfect guesses could have shown more than epsilon 4.4"
    )


def test_gaussian_claim_is_tested_more_sharply(claim: Claim) -> None:
    evidence = ("--guesses", 400, "--correct", 330, "--canaries", 1000)
    assert claim(1.5, *evidence)[0] == 0
    assert claim(1.5, *evidence, "--gaussian")[0] == 3
    assert claim(1.5, *evidence, "--gaussian", "--confidence", "0.9999999")[0] == 0


def test_json_holds_every_method(claim: Claim) -> None:
    code, out, _ = claim(1, "--guesses", 400, "--correct", 330, "--canaries", 1000, "--gaussian", "--json")
    found = json.loads(out)
    assert code == 3
    assert found["verdict"] == "violated"
    assert [each["method"] for each in found["findings"]] == [
        "Mahloujifar et al., Gaussian",
        "Steinke et al.",
    ]
    assert found["findings"][1]["lower"] == pytest.approx(1.2418, abs=1e-4)


@pytest.mark.parametrize("form", ["npz", "csv", "two files", "two arrays"])
def test_every_form_of_scores_says_the_same(claim: Claim, form: str) -> None:
    members, others = scores(3.0)
    match form:
        case "npz":
            np.savez("scores.npz", members=members, others=others)
            evidence = ("--scores", "scores.npz")
        case "csv":
            rows = [f"{score},{kind}" for kind, part in ((1, members), (0, others)) for score in part]
            Path("scores.csv").write_text("\n".join(["score,member", *rows]))
            evidence = ("--scores", "scores.csv")
        case "two files":
            for name, part in (("in.txt", members), ("out.txt", others)):
                Path(name).write_text("\n".join(map(str, part)))
            evidence = ("--in-scores", "in.txt", "--out-scores", "out.txt")
        case _:
            np.save("in.npy", members)
            np.save("out.npy", others)
            evidence = ("--in-scores", "in.npy", "--out-scores", "out.npy")
    code, out, err = claim(2, *evidence)
    assert (code, err) == (3, "")
    assert out.splitlines()[-1] == "violated: epsilon is at least 4.03, and 2 is claimed"


def test_noise_halved_is_violated_and_noise_as_claimed_is_not(claim: Claim) -> None:
    """mu 0.5 is epsilon 1.99 at 1e-5; half the noise is mu 1."""
    for apart, expected in ((0.5, 0), (1.0, 3)):
        np.savez("scores.npz", **dict(zip(("members", "others"), scores(apart), strict=True)))
        assert claim(1.993, "--scores", "scores.npz", "--gaussian")[0] == expected


def test_scores_of_many_runs(claim: Claim) -> None:
    rng = np.random.default_rng(1)
    np.savez("scores.npz", members=rng.standard_normal(300) + 4, others=rng.standard_normal(500))
    code, out, _ = claim(1, "--scores", "scores.npz", "--many-runs")
    assert code == 3
    assert "Clopper-Pearson" in out
    code, _, err = claim(1, "--scores", "scores.npz")
    assert (code, err.startswith("members=300: beside 500 outside; ")) == (2, True)


@pytest.mark.parametrize(
    ("epsilon", "delta", "evidence", "said"),
    [
        ("x", 1e-5, (), "epsilon='x': give a number"),
        ("nan", 1e-5, (), "epsilon='nan': give a number above 0"),
        ("-1", 1e-5, (), "epsilon='-1': give a number above 0"),
        ("1", "1", (), "delta='1': give a number from 0 and below 1"),
        ("1", 0, ("--gaussian",), "delta=0.0: a Gaussian mechanism has a delta above 0; give such a number"),
        ("1", 0, ("--confidence", "1"), "confidence='1': give a number above 0.5 and below 1"),
        ("1", 0, (), "evidence='none': give it in one of the forms that fedveil audit claim --help lists"),
        ("1", 0, ("--guesses", "9"), "evidence='--guesses': give it in one of the forms"),
        (
            "1",
            0,
            ("--guesses", "9", "--correct", "8", "--many-runs"),
            "evidence='--correct, --guesses': give it",
        ),
        ("1", 0, ("--guesses", "9", "--correct", "x"), "correct='x': give a whole number"),
        ("1", 0, ("--guesses", "9", "--correct", "10"), "correct=10: give a number from 0 to the 9 guesses"),
        ("1", 0, ("--scores", "none.npz"), "scores='none.npz': cannot be read (No such file or directory)"),
        ("1", 0, ("--scores", "bad.npz"), "scores='bad.npz': needs the arrays members and others"),
        ("1", 0, ("--scores", "bad.csv"), "scores='bad.csv': needs the columns score and member, 1 or 0"),
        ("1", 0, ("--scores", "nan.csv"), "scores='nan.csv': each kind needs one row of finite numbers"),
        ("1", 0, ("--scores", "pickled.npz"), "scores='pickled.npz': needs the arrays members and others"),
        (
            "1",
            0,
            ("--in-scores", "bad.csv", "--out-scores", "bad.csv"),
            "scores='bad.csv': needs one number a line",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    claim: Claim, epsilon: str, delta: object, evidence: tuple, said: str
) -> None:
    Path("bad.npz").write_text("nothing")
    Path("bad.csv").write_text("a,b\n1,2\n")
    Path("nan.csv").write_text("score,member\nnan,1\n0,0\n")
    np.savez("pickled.npz", members=np.array([{}]), others=np.zeros(3))
    code, out, err = claim(epsilon, *evidence, delta=delta)
    assert (code, out) == (2, "")
    assert err.startswith(said) and len(err.splitlines()) == 1


def test_verb_help_lists_its_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedveil", "audit"])
    assert main() == 2
    assert "fedveil audit claim" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["fedveil", "audit", "claim", "--help"])
    assert main() == 0
    assert "4 too weak to tell" in capsys.readouterr().out


def test_an_attack_finds_a_task_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moons_of_mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = list[object]()

    def attack(*_: object, **__: object) -> int:
        found.append(find_spec("moons_of_mine"))
        return 0

    monkeypatch.setattr(membership_attacks, "membership", attack)
    assert audit_run(tmp_path, membership="loss") == 0 and found != [None]
