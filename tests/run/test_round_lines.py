"""Lines of a run's rounds: a run keeps the last of them in memory, and reads the others from their file."""

import json
from pathlib import Path

import pytest

from fedveil.run.files import METRICS
from fedveil.run.round_lines import History, RoundsOfArm


def lines(folder: Path, *rows: dict[str, object]) -> list[dict[str, object]]:
    """Append rows to the folder's file, and return them."""
    with open(folder / METRICS, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return [*rows]


def test_history_is_the_file_up_to_a_round_and_what_is_added(tmp_path: Path) -> None:
    assert not History(tmp_path, 5) and not [*History(tmp_path, 5)]
    written = lines(tmp_path, *({"round": number, "loss": number / 3} for number in range(1, 8)))
    history = History(tmp_path, 5)  # two were left by a crash
    assert ([*history], len(history), history.last) == (written[:5], 5, written[4])
    (tmp_path / METRICS).write_text("")
    lines(tmp_path, *written[:5])  # as the run's first callback does
    history.append(unwritten := {"round": 6, "loss": float("inf")})
    assert ([*history], len(history), history.last) == ([*written[:5], unwritten], 6, unwritten)
    assert [*history] == [*history]


def test_lost_lines_are_an_error_of_the_disk(tmp_path: Path) -> None:
    lines(tmp_path, *({"round": number} for number in range(1, 4)))
    history = History(tmp_path, 3)
    (tmp_path / METRICS).unlink()
    with pytest.raises(OSError, match="has lost 2 of the run's lines"):
        list(history)


def test_last_line_can_be_completed_before_it_is_written(tmp_path: Path) -> None:
    lines(tmp_path, {"round": 1}, {"round": 2})
    history = History(tmp_path, 2)
    history.last.update(evaluation={"answers": []})
    assert [*history] == [{"round": 1}, {"round": 2, "evaluation": {"answers": []}}]


def test_history_keeps_one_line_in_memory(tmp_path: Path) -> None:
    history = History(tmp_path, 0)
    for number in range(1, 100):
        history.append(*lines(tmp_path, {"round": number}))
    assert [each for each in vars(history).values() if isinstance(each, list | dict)] == [{"round": 99}]
    assert [row["round"] for row in history] == [*range(1, 100)]


def test_rounds_of_an_arm_are_those_that_led_to_its_model(tmp_path: Path) -> None:
    written = lines(tmp_path, {"round": 1, "arm": 1}, {"round": 2, "arm": 2}, {"round": 3})
    of_second = RoundsOfArm(History(tmp_path, 3), 2)
    assert [*of_second] == [*of_second] == written[1:]
