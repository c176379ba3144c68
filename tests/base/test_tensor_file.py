"""Safetensors files part by part: the library reads every one, and what it could not read is never written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedveil.base.refusal import Refusal
from fedveil.base.tensor_file import safetensors_parts
from fedveil.server.checkpoint import NAME, Checkpoint, State, read, write


def written(tensors: dict[str, NDArray[Any]], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(safetensors_parts(tensors, metadata))


def test_a_models_file_has_the_bytes_that_the_library_writes() -> None:
    draw = np.random.default_rng(0)
    model = {
        "b.weight": draw.normal(size=(3, 5)).astype(np.float32),
        "a/naïve": draw.normal(size=7).astype(np.float32),
        "none": np.zeros((0, 2), np.float32),
        "half": draw.normal(size=3).astype(np.float16),
        "batches": np.array(3),
    }
    for metadata in (None, {"run": 'spring "1"'}):
        assert written(model, metadata) == save(model, metadata)


@pytest.mark.parametrize(
    "kind", ["?", "i1", "u1", "i2", "u2", "f2", "i4", "u4", "f4", "i8", "u8", "f8", "c8", ">f4"]
)
def test_the_library_reads_every_type(kind: str) -> None:
    value = np.arange(6).reshape(2, 3).astype(kind)
    found = load(written({"x": value, "y": np.ones(3, np.float32)}))["x"]
    assert found.dtype == value.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("kind", ["c16", "g", "U2"])
def test_unknown_array_is_refused_and_the_last_checkpoint_stays(tmp_path: Path, kind: str) -> None:
    model = {"w": np.ones(3, np.float32)}
    write(tmp_path, Checkpoint("run", State(1, model, {})))
    with pytest.raises(Refusal, match=rf"strategy/momenta='{np.dtype(kind)}': .*float64"):
        write(tmp_path, Checkpoint("run", State(2, model, {"momenta": np.zeros(2, kind)})))
    found = read(tmp_path)
    assert found is not None and found.state.round == 1
    assert [each.name for each in tmp_path.iterdir()] == [NAME]
