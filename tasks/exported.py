"""Exported model: a folder with a model in one format, its card and preprocessing; needs no torch if possible."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..base.tensor_file import read_npy
from ..configs.bundle_files import SCHEMA
from . import numpy_model
from .table_schema import Schema, read_schema

CARD, FORMAT = "card.json", "fedveil export 1"
# Values of --to, and their file names.
FILES: Mapping[str, str] = {
    "safetensors": numpy_model.MODEL,
    "onnx": "model.onnx",
    "torchscript": "model.pt",
    "int8": numpy_model.MODEL,
}
Model = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Exported:
    """Exported model: its folder, and its card as JSON."""

    folder: Path
    card: Mapping[str, Any]

    def predict(self, data: object) -> dict[str, NDArray[Any]]:
        """Return the model's outputs for each row, by column name, shape (n,) each.

        Args:
          data: a table, a folder of tables or a data frame if the export has a schema; otherwise a .npy file or an
            array of the model's inputs, shape (n, ...).

        Raises:
          Refusal: the data do not fit the model, the model is not that of the card, or a package is missing.
        """
        schema = self.schema
        inputs = read_array(data) if schema is None else schema_inputs(schema, data)
        model = read_model(self.folder, str(self.card["to"]), str(self.card["sha256"]))
        try:
            outputs = np.asarray(model(inputs.astype(self.card["inputs"]["dtype"])))
            if outputs.shape[:1] != inputs.shape[:1] or outputs.dtype.kind not in "fiub":
                raise ValueError(f"it gives {outputs.dtype} of shape {outputs.shape}")
        except Exception as error:  # noqa: BLE001 (each runtime raises its own)
            remedy = f"does not suit the model: {_first_line(error)}"
            raise Refusal("data", f"shape {tuple(inputs.shape)}", remedy) from None
        if schema is not None:
            return schema_predictions(schema, outputs)
        return numpy_model.columns(outputs, bool(self.card["classifies"]))

    @property
    def schema(self) -> Schema | None:
        """The schema of its tables; None if its inputs are arrays."""
        return read_schema(self.folder / SCHEMA) if (self.folder / SCHEMA).is_file() else None


def read_export(folder: Path) -> Exported | None:
    """Return the exported model of a folder, None if it has no card; refuse a card that cannot be read."""
    path = folder / CARD
    if not path.is_file():
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["format"] == FORMAT and card["to"] not in FILES:
            remedy = (
                f"holds a model for {card['to']}, which other programs read; name the run that it came from"
            )
            raise Refusal("RUN", str(folder), remedy)
        if card["format"] == FORMAT and card["sha256"] and card["inputs"]["dtype"]:
            return Exported(folder, card)
    raise Refusal("card", str(path), f"is not a card of {FORMAT!r}; make the export again")


def read_model(folder: Path, kind: str, digest: str) -> Model:
    """Return a function from inputs to outputs, shape (n, ...) each; refuse a missing file and a changed one.

    Args:
      folder: folder of the export.
      kind: format, one of `FILES`.
      digest: SHA-256 of the model's file, from the card.
    """
    path = folder / FILES[kind]
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise Refusal("model", str(path), "is not the model of its card; copy the whole folder again")
    reader = {"onnx": _of_onnx, "torchscript": _of_torchscript}.get(kind, _of_numpy)
    try:
        return reader(path)
    except Refusal:
        raise
    except Exception as error:  # noqa: BLE001 (each runtime raises its own)
        raise Refusal("model", str(path), f"cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _of_numpy(path: Path) -> Model:
    program, arrays = numpy_model.read_model(path)
    return lambda inputs: numpy_model.run(program, arrays, inputs)


def _of_onnx(path: Path) -> Model:
    require_extra("export", "a model in the format onnx")
    runtime: Any = import_module("onnxruntime")
    session: Any = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def outputs(inputs: NDArray[Any]) -> NDArray[Any]:
        return session.run(None, {name: inputs})[0]

    return outputs


def _of_torchscript(path: Path) -> Model:
    require_extra("opacus", "a model in the format torchscript")
    import torch

    module: Any = torch.jit.load(path, map_location="cpu")

    def outputs(inputs: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            return module(torch.from_numpy(inputs)).numpy()

    return outputs


def read_array(data: object) -> NDArray[Any]:
    """Return an array, or that of a .npy file, in float32 or int64; refuse a number that is not finite."""
    name = type(data).__name__
    try:
        if isinstance(data, str | Path):
            name = str(data)
            with Path(data).open("rb") as file:
                data = read_npy(file)
        array = np.asarray(data)
        kind = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.int64}[array.dtype.kind]
        with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and is refused below
            numbers = np.ascontiguousarray(array, dtype=kind)
    except (OSError, ValueError, KeyError):
        remedy = "this run has no schema; give an array of numbers, or a .npy file"
        raise Refusal("data", name, remedy) from None
    if kind is np.float32 and not (finite := np.isfinite(numbers)).all():
        row = int(np.argwhere(~finite)[0][0])
        raise Refusal("data", name, f"row {row} holds a number that is not finite in float32; replace it")
    return numbers


def schema_inputs(schema: Schema, data: object) -> NDArray[np.float32]:
    """Return the model's inputs, shape (n, schema.width), for a table, a folder of tables or a data frame."""
    from .table_files import RowSource, frame_inputs, read_rows

    if isinstance(data, str):
        data = Path(data)
    if isinstance(data, Path | RowSource):
        return read_rows(data, schema, labelled=False).inputs
    return frame_inputs(data, schema)


def schema_predictions(schema: Schema, outputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return predictions by column name, for outputs of shape (n, outputs), as the label's kind makes them.

    They are the label's most likely category and its probability, or its number.
    """
    return schema.outcome.predictions(outputs)
