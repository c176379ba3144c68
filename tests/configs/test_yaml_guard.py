"""Guard of YAML files: encodings, aliases, repeated keys and depth."""

from pathlib import Path

import pytest

from fedveil.base.refusal import Refusal
from fedveil.configs.preflight import preflight
from fedveil.configs.yaml_guard import MAX_BYTES, check_file
from fedveil.run.released import config_of
from fedveil.run.run_files import read_config


def refusal_of_file(folder: Path, content: bytes) -> str:
    (folder / "cohort").mkdir()
    (folder / "cohort" / "mine.yaml").write_bytes(content)
    with pytest.raises(Refusal) as caught:
        preflight(["--config-dir", str(folder), "cohort=mine"], writes=True)
    (sentence,) = str(caught.value).splitlines()
    assert "mine.yaml" in sentence or sentence.startswith("cohort")
    return sentence


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        pytest.param(b"name: poisson\nrate: 0.1\nrate: 0.9\n", "duplicate key", id="C13"),
        pytest.param(b"name: poisson\nrate: ???\n", "must be given a value", id="C14"),
        pytest.param(b"name: poisson\nrate: &x [*x]\n", "line 2: an alias refers to what holds it", id="C15"),
        pytest.param(b"name: poisson\nrate: !!python/object/apply:os.system [ls]\n", "line 2", id="C16"),
        pytest.param(
            b"name: poisson\nrate: 0.1\n_target_: os.system\n", "classes are not named here", id="C17"
        ),
        pytest.param(b"name: poisson\nrate: 10e-5x\n", "must be a number, not text", id="C19"),
        pytest.param(b"name: poisson\nrate: 0.1 #" + b"x" * MAX_BYTES, "larger than", id="C20"),
        pytest.param("name: poisson\nrate: 0.1 # é\n".encode("latin-1"), "not UTF-8", id="C21"),
        pytest.param(b"name: poisson\nrate: 0.1\nratee: 0.1\n", "did you mean 'rate'?", id="C12"),
        pytest.param(b"- poisson\n", "", id="a list"),
        pytest.param(b"name: [poisson\n", "line", id="broken"),
        pytest.param(b"rate: 0.1\n", "cohort.name", id="no name"),
        pytest.param(b"name: poisson\nrate: .inf\n", "finite", id="C2"),
    ],
)
def test_bad_file_is_refused(tmp_path: Path, content: bytes, remedy: str) -> None:
    assert remedy in refusal_of_file(tmp_path, content)


def test_aliases_that_explode_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("\n".join(lines))
    with pytest.raises(Refusal, match="aliases expand"):
        check_file(bomb)


def test_configuration_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: {name: digits}\nseed: 1\nseed: 2\n")
    for read in (read_config, config_of):
        with pytest.raises(Refusal, match="line 3: duplicate key seed"):
            read(tmp_path / "config.yaml" if read is read_config else tmp_path)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / "deep.yaml"
    deep.write_text("a: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(Refusal, match="cannot be read as YAML"):
        check_file(deep)
