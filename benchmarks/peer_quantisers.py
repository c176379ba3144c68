"""Quantisers of NVFLARE and APPFL on updates, run by a Python that has them: ``python peer_quantisers.py NVFLARE:float16``.

It reads arrays of updates from its standard input, one .npy after the other, shape (clients, outputs x inputs + outputs),
and writes for each what comes back of it and how many bytes it took, as two .npy. It stands outside the package: that
Python need not have the package installed.
"""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import io
import os
import struct
import sys
from collections.abc import Callable

import numpy as np

OUTPUTS = 10
LENGTH = struct.Struct("<q")
Arrays = dict[str, np.ndarray]
Coder = Callable[[Arrays], tuple[Arrays, int]]


def main(way: str) -> None:
    """Answer arrays until the input ends.

    Args:
      way: the peer, and how it quantises.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # bitsandbytes looks for kernels there, and does without
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    peer, _, how = way.partition(":")
    coder = {"NVFLARE": nvflare, "APPFL": appfl}[peer](how)
    while head := sys.stdin.buffer.read(LENGTH.size):
        updates = np.load(io.BytesIO(sys.stdin.buffer.read(LENGTH.unpack(head)[0])))
        back, sizes = zip(*(coded(coder, each) for each in updates), strict=True)
        for array in (np.stack(back), np.array(sizes)):
            packed = io.BytesIO()
            np.save(packed, array)
            answers.write(LENGTH.pack(packed.tell()) + packed.getvalue())
        answers.flush()


def coded(coder: Coder, update: np.ndarray) -> tuple[np.ndarray, int]:
    """Return what comes back of an update, and its bytes on the way."""
    inputs = len(update) // OUTPUTS - 1
    cut = OUTPUTS * inputs
    arrays = {"weight": update[:cut].reshape(OUTPUTS, inputs), "bias": update[cut:]}
    back, size = coder({name: each.astype(np.float32) for name, each in arrays.items()})
    return np.concatenate([back["weight"].ravel(), back["bias"].ravel()]), size


def nvflare(how: str) -> Coder:
    """Return NVFLARE's ModelQuantizer and ModelDequantizer, on the processor."""
    import torch
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

    torch.Tensor.cuda = lambda self, *_, **__: (
        self
    )  # it moves what it quantises to a GPU; bitsandbytes needs none
    quantiser, back, context = ModelQuantizer(how), ModelDequantizer(), FLContext()

    def coder(arrays: Arrays) -> tuple[Arrays, int]:
        values, state, types = quantiser.quantization(dict(arrays), context)
        parts = [*values.values(), *(each for of in state.values() for each in of.values())]
        size = sum(each.nbytes for each in parts if hasattr(each, "nbytes"))
        return back.dequantization(dict(values), state, how, types, context), size

    return coder


def appfl(how: str) -> Coder:
    """Return APPFL's ZFPCompressor with this error bound, relative to the range of a layer."""
    import torch
    from appfl.compressor import ZFPCompressor
    from omegaconf import OmegaConf

    asked = {"lossless_compressor": "blosc", "error_bounding_mode": "REL", "param_cutoff": 1024}
    compressor = ZFPCompressor(OmegaConf.create({**asked, "error_bound": float(how)}))

    def coder(arrays: Arrays) -> tuple[Arrays, int]:
        tensors = {name: torch.from_numpy(each) for name, each in arrays.items()}
        layer = torch.nn.Linear(arrays["weight"].shape[1], OUTPUTS)
        packed = compressor.compress_model(tensors)
        found = compressor.decompress_model(packed, layer)
        return {name: found[name].numpy() for name in arrays}, len(packed)

    return coder


if __name__ == "__main__":
    main(sys.argv[1])
