"""Fashion-MNIST: its files, their cache and their download."""

import gzip
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedveil.base.refusal import Refusal
from fedveil.tasks import load_task
from fedveil.tasks.shipped import fashion_mnist as fashion


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    generator = np.random.default_rng(1)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels, labels = (
            generator.integers(0, 256, (count, 28, 28), np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
        )
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(pixels)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(_idx(labels)))
    return tmp_path


def test_fashion_mnist_reads_its_files_and_stores_their_features(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", clothes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task = load_task("fashion_mnist", {"num_clients": 8})
    data = task.client_data(3)
    assert data.inputs.shape == (5, 3969) and data.inputs.dtype == torch.float32
    norms = data.inputs.norm(dim=1)
    assert norms.min() > 30 and norms.max() < 63.1
    assert task.held_out().targets.tolist() == list(range(10)) * 2
    monkeypatch.setattr(fashion, "features", None)  # what is kept is not made again
    again = load_task("fashion_mnist", {"num_clients": 8})
    assert torch.equal(again.client_data(3).inputs, data.inputs)
    pixels, path = np.zeros((1, 28, 28), np.uint8), clothes / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(_idx(pixels)))
    with pytest.raises(TypeError):  # other pictures have other features
        fashion.read_examples(clothes, "t10k")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw + b"\0", "too long"),
        (lambda raw: raw[:6], "not an IDX file"),
        (lambda raw: b"\0\0\x0d\x03" + raw[4:], "not an IDX file"),
        (lambda raw: raw[:8] + struct.pack(">I", 14) + raw[12:], "not an IDX file"),
    ],
)
def test_a_damaged_file_is_refused(clothes: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    path = clothes / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(Refusal, match=reason):
        fashion.read_idx(path, dimensions=3)


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b"abc" * 100, mtime=0)[:-9], None])
def test_a_file_that_cannot_be_unpacked_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Refusal, match="cannot be read"):
        fashion.read_idx(path, dimensions=1)


def test_without_files_one_sentence_names_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(Refusal, match=r"dataset-fashion-mnist .* or torchvision"):
        load_task("fashion_mnist")


def test_torchvision_downloads_into_the_cache(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(root: str, download: bool) -> None:
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for file in clothes.glob("*.gz"):
            (raw / file.name).write_bytes(file.read_bytes())

    torchvision = types.ModuleType("torchvision.datasets")
    torchvision.FashionMNIST = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", torchvision)
    monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load_task("fashion_mnist", {"num_clients": 4}).num_clients == 4
    assert (tmp_path / "cache" / "fedveil" / "FashionMNIST" / "raw").is_dir()
