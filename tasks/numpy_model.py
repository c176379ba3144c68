"""Interpreter of an exported model in pure NumPy: an export contains this file as `predict.py`.

    python predict.py inputs.npy > predictions.csv

The model is a file in the safetensors format: arrays and a program over them. A program is data: each of its operations
is one of `OPERATIONS`, so an untrusted file cannot run other code.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]
MODEL = "model.safetensors"
SCALE = ".scale"  # NAME.scale holds the scales of the int8 array NAME along its first dimension
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "<i1", "BOOL": "|b1"}


@dataclass(frozen=True)
class Program:
    """Operations in order.

    Attributes:
      inputs: name of the model's inputs.
      arrays: names of parameters in the file, by their names in the program.
      nodes: for each operation (name of its result, its own name, positional arguments, keyword arguments). An argument
        `{"node": NAME}` refers to an earlier result.
      outputs: name of the model's outputs.
    """

    inputs: str
    arrays: Mapping[str, str]
    nodes: Sequence[tuple[str, str, list[Any], dict[str, Any]]]
    outputs: str


def read_model(path: Path) -> tuple[Program, dict[str, Array]]:
    """Return the program and the arrays of a file, int8 ones times their scales; ValueError if it is damaged."""
    content = path.read_bytes()  # the header's length, the header, the arrays
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        program = program_of(header.pop("__metadata__")["program"])
        arrays = {name: _array(content[8 + length :], each) for name, each in header.items()}
        scales = {name: arrays.pop(name + SCALE) for name in [*arrays] if name + SCALE in arrays}
        for name, scale in scales.items():
            arrays[name] = arrays[name] * scale.reshape(-1, *[1] * (arrays[name].ndim - 1))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"it holds no exported model ({type(error).__name__}: {error})") from None
    return program, arrays


def program_of(text: str) -> Program:
    """Return the program of a text in JSON."""
    fields = json.loads(text)
    nodes = [tuple(node) for node in fields["nodes"]]
    return Program(fields["inputs"], fields["arrays"], nodes, fields["outputs"])


def _array(data: bytes, entry: Mapping[str, Any]) -> Array:
    """Return the array of an entry of the header, which gives its dtype, shape and place in the file's data."""
    begin, end = entry["data_offsets"]
    return np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])


def run(program: Program, arrays: Mapping[str, Array], inputs: Array) -> Array:
    """Return the model's outputs, shape (n, ...).

    Args:
      program: of the model.
      arrays: its parameters and buffers.
      inputs: shape (n, ...).

    Raises:
      ValueError: the program has an operation outside `OPERATIONS`, or the inputs do not fit it.
    """
    values: dict[str, Any] = {name: arrays[file] for name, file in program.arrays.items()}
    values[program.inputs] = inputs
    for name, operation, arguments, keywords in program.nodes:
        if operation not in OPERATIONS:
            raise ValueError(f"the operation {operation} is not supported")
        try:
            values[name] = OPERATIONS[operation](
                *[_value(each, values) for each in arguments],
                **{key: _value(each, values) for key, each in keywords.items()},
            )
        except (TypeError, IndexError, np.exceptions.AxisError) as error:
            raise ValueError(f"{operation}: {error}") from None
    return np.asarray(values[program.outputs])


def _value(argument: Any, values: Mapping[str, Any]) -> Any:
    """Return an argument of a node, with earlier results in place of references to them."""
    if isinstance(argument, dict):
        return values[argument["node"]]
    return [_value(each, values) for each in argument] if isinstance(argument, list) else argument


def columns(outputs: Array, classifies: bool) -> dict[str, Array]:
    """Return predictions by column name, shape (n,) each: the class and its probability, or every output.

    Args:
      outputs: of a model, shape (n, ...).
      classifies: whether they are logits of classes, given two dimensions and more than one output.
    """
    if classifies and outputs.ndim == 2 and outputs.shape[1] > 1:
        shares = _softmax(outputs.astype(np.float64))
        return {"class": shares.argmax(-1), "probability": shares.max(-1)}
    flat = outputs.reshape(len(outputs), -1).T if outputs.ndim > 1 else outputs[None]
    return {f"output_{index}": column.astype(np.float64) for index, column in enumerate(flat)}


# --- operations, by their names in torch's ATen ------------------------------------------------------


def _softmax(x: Array, dim: int = -1, dtype: object = None) -> Array:
    """Return exponentials that sum to one along a dimension."""
    raised = np.exp(x - x.max(dim, keepdims=True))
    return raised / raised.sum(dim, keepdims=True)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return a size for rows and one for columns, which ATen may give as one number."""
    first, last = (value, value) if isinstance(value, int) else (value[0], value[-1])
    return first, last


def _windows(
    x: Array, size: tuple[int, int], stride: Any, padding: Any, dilation: Any = 1, fill: float = 0.0
) -> Array:
    """Return the windows of images of shape (n, c, rows, columns), shape (n, c, windows down, windows across, *size)."""
    (down, across), (rows, columns) = _pair(stride), _pair(padding)
    row_step, column_step = _pair(dilation)
    if rows or columns:
        x = np.pad(x, ((0, 0), (0, 0), (rows, rows), (columns, columns)), constant_values=fill)
    extent = (row_step * (size[0] - 1) + 1, column_step * (size[1] - 1) + 1)
    windows = sliding_window_view(x, extent, (2, 3))
    return windows[:, :, ::down, ::across, ::row_step, ::column_step]


def _conv2d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Array:
    windows = _windows(x, (weight.shape[2], weight.shape[3]), stride, padding, dilation)
    pairs = zip(np.split(windows, groups, 1), np.split(weight, groups, 0), strict=True)
    axes = (1, 4, 5), (1, 2, 3)  # channels, rows and columns of a window and of a kernel
    parts = [np.tensordot(pixels, kernels, axes) for pixels, kernels in pairs]
    outputs = np.moveaxis(np.concatenate(parts, -1), -1, 1)
    return outputs if bias is None else outputs + bias[:, None, None]


def _max_pool2d(
    x: Array, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Array:
    if ceil:
        raise TypeError("windows that reach over the edge are not known here")
    return _windows(x, _pair(size), stride or size, padding, dilation, -np.inf).max((-2, -1))


def _avg_pool2d(
    x: Array,
    size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil: bool = False,
    padded: bool = True,
    by: object = None,
) -> Array:
    if ceil or by is not None or (not padded and any(_pair(padding))):
        raise TypeError("windows that reach over the edge are not known here")
    return _windows(x, _pair(size), stride or size, padding).mean((-2, -1))


def _adaptive_avg_pool2d(x: Array, size: Any) -> Array:
    if _pair(size) != (1, 1):
        raise TypeError("only one window per image is supported")
    return x.mean((-2, -1), keepdims=True)


def _standardised(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def _affine(x: Array, weight: Array | None, bias: Array | None, shape: Sequence[int]) -> Array:
    """Return x times weight plus bias, where there are any, both reshaped so that they broadcast."""
    for operation, operand in ((np.multiply, weight), (np.add, bias)):
        if operand is not None:
            x = operation(x, operand.reshape(shape))
    return x


def _shape_of_channels(x: Array) -> tuple[int, ...]:
    """Return the shape in which one number per channel broadcasts with x, whose second dimension are channels."""
    return (-1, *[1] * (x.ndim - 2))


def _group_norm(
    x: Array, groups: int, weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *_: Any
) -> Array:
    standardised = _standardised(x.reshape(len(x), groups, -1), (-1,), epsilon).reshape(x.shape)
    return _affine(standardised, weight, bias, _shape_of_channels(x))


def _batch_norm(x: Array, *arguments: Any) -> Array:
    weight, bias, mean, variance, training, _, epsilon, *_ = arguments  # in ATen's order
    if training:
        raise TypeError("the operation mixes the examples of a batch")
    shape = _shape_of_channels(x)
    standardised = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + epsilon)
    return _affine(standardised, weight, bias, shape)


def _gelu(x: Array, approximate: str = "none") -> Array:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return (0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(x.dtype)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _flatten(x: Array, start: int = 0, end: int = -1) -> Array:
    end = end % x.ndim
    return x.reshape(*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


def _reduced(
    reduce: Callable[..., Any], x: Array, dim: Any = None, keepdim: bool = False, dtype: object = None
) -> Array:
    axes = None if dim is None else tuple(np.atleast_1d(dim))
    return np.asarray(reduce(x, axes, keepdims=keepdim))


def _same(x: Array, *_: object, **__: object) -> Array:
    return x


def _dropout(x: Array, share: float, training: bool) -> Array:
    if training:
        raise TypeError("the operation is random")
    return x


# pyright: reportUnknownLambdaType=false
OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "add": lambda x, y, alpha=1: x + alpha * y if alpha != 1 else x + y,
    "alias": _same,
    "avg_pool2d": _avg_pool2d,
    "batch_norm": _batch_norm,
    "cat": np.concatenate,
    "clamp": lambda x, low=None, high=None: np.clip(x, low, high),
    "clone": _same,
    "contiguous": _same,
    "conv2d": _conv2d,
    "detach": _same,
    "div": np.true_divide,
    "dropout": _dropout,
    "elu": lambda x, alpha=1: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))),
    "embedding": lambda weight, index, *_: weight[index],
    "exp": np.exp,
    "feature_dropout": _dropout,
    "flatten": _flatten,
    "gelu": _gelu,
    "group_norm": _group_norm,
    "hardtanh": lambda x, low=-1, high=1: np.clip(x, low, high),
    "layer_norm": lambda x, shape, weight=None, bias=None, epsilon=1e-5, *_: _affine(
        _standardised(x, tuple(range(-len(shape), 0)), epsilon), weight, bias, shape
    ),
    "leaky_relu": lambda x, slope=0.01: np.where(x > 0, x, slope * x),
    "linear": lambda x, weight, bias=None: x @ weight.T if bias is None else x @ weight.T + bias,
    "matmul": np.matmul,
    "max_pool2d": _max_pool2d,
    "mean": partial(_reduced, np.mean),
    "mul": np.multiply,
    "neg": np.negative,
    "permute": np.transpose,
    "relu": partial(np.maximum, 0),
    "reshape": np.reshape,
    "select": lambda x, dim, index: np.take(x, index, dim),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "slice": lambda x, dim=0, start=None, end=None, step=1: x[
        (*[slice(None)] * (dim % x.ndim), slice(start, end, step))
    ],
    "softmax": _softmax,
    "squeeze": lambda x, dim: x.squeeze(tuple(each for each in np.atleast_1d(dim) if x.shape[each] == 1)),
    "sub": lambda x, y, alpha=1: x - alpha * y,
    "sum": partial(_reduced, np.sum),
    "sym_size": np.size,
    "tanh": np.tanh,
    "transpose": np.swapaxes,
    "unsqueeze": np.expand_dims,
    "view": np.reshape,
}


def main(words: Sequence[str]) -> int:
    """Print the predictions for the inputs of a file as CSV; return the exit code.

    Args:
      words: arguments of the command line: a .npy file of inputs, shape (n, ...).
    """
    if len(words) != 1:
        print("usage: python predict.py inputs.npy", file=sys.stderr)
        return 2
    folder = Path(__file__).parent
    program, arrays = read_model(folder / MODEL)
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    kind = card["inputs"]["dtype"]
    predictions = columns(run(program, arrays, np.load(words[0]).astype(kind)), card["classifies"])
    print(",".join(predictions))
    for row in zip(*(column.tolist() for column in predictions.values()), strict=True):
        print(",".join(f"{cell:.6g}" for cell in row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
