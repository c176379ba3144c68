"""Export of a run's released model: one file in a runtime's format, its card, and its preprocessing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import timeit
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from ..base.extensions import extension, names
from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..run.files import MODEL, RESULT, SAVED, SINGLY
from ..run.manifest import sha256_of
from ..run.released import config_of, model_of, require_ended, task_of
from ..run.run_files import read_object
from ..server.tuning import LOSS
from ..tasks import Task, load_task, numpy_model
from ..tasks.data import as_data, derived, figures_of, placeholder
from ..tasks.exported import CARD, FILES, FORMAT, Model, read_array, read_model
from ..tasks.model_columns import read_released
from ..tasks.other_model import model_named
from ..tasks.protocol import PredictingTask
from ..tasks.shapes import SHAPES, shapes
from ..tasks.tables import additive, released
from .distil import check_public, distil
from .prune import NO_PRUNING, OPTION, Pruning, pruned, settle

TOLERANCE = 1e-4  # for the difference from torch, relative to the largest output (at least 1)
NUM_ROWS, SEED = 8, 0  # random rows for the comparison, and their seed
INT8 = 127  # the largest value; the range is symmetric about zero
LEVEL = 9  # of zlib: zeros of a pruned model take space until a file is compressed
REPEATS = 50  # predictions of one row, whose median time is reported
OF_CLIENTS = "personal/client-{:03d}.safetensors"  # own models of a simulation's clients, in the run folder
# Of a client's own model: it was trained on that client's data without noise.
NO_PRIVACY = "epsilon is infinite for this client's data, to whoever gets the model; for other clients' data it is that of the run"
OWN_ROW = {"adversary": "model", "unit": "client", "epsilon": "Infinity", "delta": 0.0, "said": NO_PRIVACY}
STATEMENT = "post-processing of the released model, on public inputs alone: epsilon is that of the run"


@dataclass(frozen=True)
class Order:
    """Request for an export.

    Attributes:
      to: format, a key of `FILES` or of the extension point of the run's task.
      student: `module:Class` of a smaller model to distil; None exports the released one.
      public: path of public inputs, to distil and to compare; None without any.
      out: folder to create; None takes `export` in the run folder.
      allow_modules: modules that may be imported for the run's task.
      keys: keys of the task whose values replace those of the run.
      personal: whether a client's own model is exported, which has no privacy towards whoever gets it.
      client: number of that client in a simulation; None for a device, which has one.
      prune: what is removed of the model; public inputs tune what remains.
    """

    to: str
    student: str | None = None
    public: Path | None = None
    out: Path | None = None
    allow_modules: tuple[str, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict[str, Any])
    personal: bool = False
    client: int | None = None
    prune: Pruning = NO_PRUNING


@dataclass(frozen=True)
class Source:
    """Model to export.

    Attributes:
      file: of its arrays.
      config: keys of the run's configuration, of which exports need those of the task.
      task: with its clients' data, where they are on this machine.
      model: in evaluation mode.
      privacy: rows of what the model cost, as in result.json.
      classifies: whether several outputs of a row are logits of classes.
      held_out_is_public: whether the task's held-out data are.
      public: inputs of `--public`, shape (n, ...); None without them.
      statement: sentence on the privacy of the export.
    """

    file: Path
    config: Mapping[str, Any]
    task: Task
    model: nn.Module
    privacy: Sequence[Mapping[str, Any]]
    classifies: bool
    held_out_is_public: bool
    public: Tensor | None = None
    statement: str = STATEMENT


def export(run: Path, order: Order) -> tuple[Path, dict[str, Any]]:
    """Create the folder of an exported model, which appears when it is complete; return it and the model's card.

    Raises:
      Refusal: the run or format does not exist, the public data are clients', the model does not suit the format, or
        the folder exists.
    """
    require_ended(run)
    if order.personal != (order.client is not None):
        remedy = "a simulation's clients have own models: give --personal and the number of one by --client"
        raise Refusal("--client", order.client, remedy)
    return export_from(run, config_of(run)["task"], order, lambda: _source_of_run(run, order))


def export_from(
    folder: Path, task: Mapping[str, Any], order: Order, load: Callable[[], Source]
) -> tuple[Path, dict[str, Any]]:
    """Create the folder of an exported model of any source, as `export` does of a run's.

    Args:
      folder: in whose `export` the model lies by default.
      task: keys of the task, with its name.
      order: what is written.
      load: returns the source, once the order has no mistake.
    """
    target = _target_folder(folder, task, order)
    source = load()
    if order.to not in FILES:
        return target, _complete(target, lambda temporary: _write_folder(temporary, source, order))
    if order.public is not None:
        public = _read_public(source.task, source.config, order.public)
        source = replace(source, public=public)
    model, entry = _smaller(source, order)
    return target, _complete(target, lambda temporary: _write_export(temporary, model, source, order, entry))


def _smaller(source: Source, order: Order) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model to write: the released one, its student, or what is left of it; and the card's entry of the latter."""
    model, entry = source.model, dict[str, Any]()
    if order.student is not None:
        model = model_named(order.student, "--student")
    if order.prune.share:
        model, entry = pruned(source.model, order.prune)
        entry["tuned"] = source.public is not None
    if model is not source.model and source.public is not None:
        distil(source.model, model, source.public, source.classifies)
    settle(model)
    return model, entry


def _source_of_run(run: Path, order: Order) -> Source:
    """Return the released model of a run, or the model of one of its simulated clients."""
    config, result = config_of(run), read_object(run / RESULT)
    if order.to in FILES:
        task = _task_with_data(run, config, order.allow_modules)
    else:
        task = task_of(run, order.allow_modules, order.keys)
    # No run evaluates its model on private held-out data, so a loss shows that they are public.
    is_public, classifies = LOSS in result["metrics"], _classifies(task, result["metrics"])
    source = Source(run / MODEL, config, task, model_of(run, task), result["privacy"], classifies, is_public)
    if order.client is None:
        return source
    file = run / OF_CLIENTS.format(order.client)
    if not file.is_file():
        raise Refusal(
            "--client", order.client, f"has no own model in {file.parent}; train with personal=after"
        )
    read_released(source.model, file.read_bytes())
    return own_source(source, file)


def own_source(source: Source, file: Path) -> Source:
    """Return the source of a client's own model, which is in `source.model`; `file` has its arrays."""
    return replace(source, file=file, privacy=(OWN_ROW,), statement=NO_PRIVACY)


def _complete(folder: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Create a folder, which appears when `write` has written all its files and returned the card; return the card."""
    existing = next(each for each in folder.parents if each.exists())
    temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=existing))
    try:
        card = write(temporary)
        (temporary / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return card


def formats_of(name: str) -> Iterable[str]:
    """Return the formats for a run on a task, by the task's name."""
    return names(f"export of {name}") or FILES


def _write_folder(folder: Path, source: Source, order: Order) -> dict[str, Any]:
    """Write the model by the writer of the format in its task's extension; return the card."""
    name = str(source.config["task"]["name"])
    write = extension(f"export of {name}", order.to, "--to", order.to)
    entries = write(folder, source.task, source.model, source.privacy)
    files = sorted(folder.iterdir())
    return {
        "format": FORMAT,
        "to": order.to,
        **entries,
        "sha256": sha256_of(folder / entries["file"]),
        "files": {each.name: sha256_of(each) for each in files},
        "released_sha256": sha256_of(source.file),
        "bytes": sum(each.stat().st_size for each in files),
        "privacy": source.privacy,
        "privacy_said": source.statement,
    }


def _target_folder(run: Path, task: Mapping[str, Any], order: Order) -> Path:
    """Check what needs neither the model nor data: format, extra, student, folder; return the folder to create."""
    formats, others = formats_of(task["name"]), sorted(order.keys.keys() - task.keys())
    if order.to not in formats:
        remedy = f"choose one of {', '.join(formats)}; another does not suit task={task['name']}"
        raise Refusal("--to", order.to, remedy)
    if others:
        raise Refusal(f"--{others[0]}", order.keys[others[0]], f"task={task['name']} has none; leave it out")
    if order.to not in FILES and (order.student or order.public or order.prune.share):
        raise Refusal("--to", order.to, "takes no student, no pruning and no public inputs; leave them out")
    if order.student and order.prune.share:
        raise Refusal(OPTION, str(order.prune), "is of the released model; leave it out, or --student")
    if order.to == "onnx":
        require_extra("export", "--to onnx, which torch writes with onnxscript,")
    if order.student is not None and order.public is None:
        remedy = "a student learns from the model's outputs on public inputs; name them with --public"
        raise Refusal("--student", order.student, remedy)
    default_name = order.to if order.student is None else f"{order.to}-{order.student.rpartition(':')[2]}"
    if order.prune.share:
        default_name += f"-pruned-{str(order.prune).replace(':', '-')}"
    if order.personal:
        number = "" if order.client is None else f"{order.client:03d}-"
        default_name = f"personal-{number}{default_name}"
    folder = order.out or run / "export" / default_name
    if folder.exists():
        raise Refusal("--out", str(folder), "exists; remove it, or name another folder")
    return folder


def _write_export(
    folder: Path, model: nn.Module, source: Source, order: Order, pruning: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a model, its preprocessing and its card into an empty folder; return the card.

    Args:
      folder: exists.
      model: the released one, its student, or what pruning has left of it.
      source: of the released model.
      order: for an export.
      pruning: entry of the card on it; empty without any.
    """
    sample = _sample(source.task, source.public)
    exported = write_model(folder, model, order.to, sample)
    file = folder / FILES[order.to]
    card = {
        "format": FORMAT,
        "to": order.to,
        "file": file.name,
        "sha256": sha256_of(file),
        "released_sha256": sha256_of(source.file),
        "student": order.student,
        "pruned": pruning,
        "classifies": source.classifies,
        "inputs": {"shape": list(sample.shape[1:]), "dtype": str(sample.dtype).removeprefix("torch.")},
        "bytes": file.stat().st_size,
        "compressed_bytes": len(zlib.compress(file.read_bytes(), LEVEL)),
        "released_bytes": source.file.stat().st_size,
        "milliseconds_a_row": _milliseconds(exported, sample[:1].numpy()),
        **_comparison(source, exported),
        **_label(source.task),
        "privacy": source.privacy,
        "privacy_said": source.statement,
    }
    if isinstance(source.task, PredictingTask):
        for name, content in source.task.beside_the_model().items():
            (folder / name).write_bytes(content)
    if (schema := additive(source.task)) is not None and order.student is None:
        parameters = {name: each.detach().numpy() for name, each in model.named_parameters()}
        text = json.dumps(shapes(schema, *(parameters[each] for each in schema.outcome.parameters)), indent=1)
        (folder / SHAPES).write_text(text + "\n", encoding="utf-8")
    if file.name == numpy_model.MODEL:  # a program for the interpreter in NumPy, which is put beside it
        shutil.copyfile(numpy_model.__file__, folder / "predict.py")
    return card


# --- inputs ---------------------------------------------------------------------------------------------


def _task_with_data(run: Path, config: Mapping[str, Any], allow_modules: tuple[str, ...]) -> Task:
    """Return the run's task with its clients' data, which `check_public` needs; tables that are not here are left out."""
    task = config["task"]
    if task["name"] == "custom":
        return task_of(run, allow_modules)
    if task["name"] != "csv":
        partition = dict(config.get("partition") or {})
        options = {"num_clients": task["num_clients"], "seed": config.get("seed")}
        options |= {"partition": partition.pop("name", None), **partition}
        options |= {name: task.get(name) for name in ("folder", "model", "hidden", "secrets")}
        options = {name: each for name, each in options.items() if each is not None}
        return load_task(task["name"], options, allow_modules)
    _, form = released(run, task)
    names = ("folder", "encoding", "simulated", "held_out_share", "held_out_file", "person")
    options = form | {name: task[name] for name in names if task.get(name) is not None}
    for name in {"folder", "held_out_file"} & options.keys():
        if not Path(options[name]).exists():
            del options[name]
    options["group_equal_rows"] = not read_object(run / SAVED).get(SINGLY)  # as the run held out rows
    return load_task("csv", options, allow_modules)


def _classifies(task: Task, metrics: Mapping[str, float]) -> bool:
    """Return whether outputs are logits of classes: of a table by its label, else by the metrics of the run."""
    classes = getattr(task, "classes", None)
    return "accuracy" in metrics if classes is None else classes > 0


def _read_public(task: Task, config: Mapping[str, Any], path: Path) -> Tensor:
    """Return the public inputs at a path, shape (n, ...); refuse those that are too few, infinite or of clients."""
    if not path.exists():
        raise Refusal("--public", str(path), "does not exist; name a table, a folder of them or a .npy file")
    inputs = task.encode(path) if isinstance(task, PredictingTask) else torch.from_numpy(read_array(path))
    if len(inputs) < 2:
        raise Refusal("--public", str(path), f"holds {len(inputs)} rows; at least two are needed")
    if not torch.isfinite(inputs).all():
        raise Refusal("--public", str(path), "holds numbers that are not finite; leave those rows out")
    check_public(task, config, path, inputs)
    return inputs


def _sample(task: Task, public: Tensor | None) -> Tensor:
    """Return two rows of inputs, by whose shape and type a model is traced; zeros if there are no public ones."""
    if public is not None:
        return public[:2]
    if schema := getattr(task, "schema", None):
        return torch.zeros(2, schema.width)
    sample = placeholder(as_data(task.held_out()), 2)
    if not isinstance(sample, Tensor):
        remedy = "has several or named inputs; an export needs one tensor"
        raise Refusal("model", type(task).__name__, remedy)
    return sample


def _label(task: Task) -> dict[str, Any]:
    """Return the card's entry of the label of a table that declares its kind."""
    schema = getattr(task, "schema", None)
    keys = {} if schema is None else dict(schema.outcome.keys)
    return {"label": keys} if keys else {}


def _comparison(source: Source, exported: Model) -> dict[str, Any]:
    """Return the entries of the card that compare the outputs of the released and of the exported model.

    They are compared on the run's held-out data if these are public, else on public inputs; without either all are None.
    """
    inputs, targets, data_name = source.public, None, "public data"
    if source.held_out_is_public and len(data := as_data(source.task.held_out())):
        inputs, targets = data.batch(torch.arange(len(data)))
        data_name = "held-out data"
    card: dict[str, Any] = dict.fromkeys(
        ("measured_on", "rows", "agreement", "largest_difference", "metrics")
    )
    if inputs is None:
        return card
    with torch.no_grad():
        before = source.model(inputs)
    after = torch.from_numpy(np.asarray(exported(inputs.numpy())))
    card |= {"measured_on": data_name, "rows": len(inputs)}
    card["largest_difference"] = float((before - after).abs().max())
    if source.classifies and before.dim() == 2 and before.shape[1] > 1:
        card["agreement"] = float((before.argmax(1) == after.argmax(1)).double().mean())
    if targets is not None:
        task, outputs = source.task, {"released": before, "exported": after}
        card["metrics"] = {
            name: derived(task, figures_of(task, each, targets)) for name, each in outputs.items()
        }
    return card


def _milliseconds(exported: Model, row: NDArray[Any]) -> float:
    """Return the median time of a prediction of one row, on one thread of this machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = timeit.repeat(lambda: exported(row), number=1, repeat=REPEATS)
    finally:
        torch.set_num_threads(threads)
    return round(1000 * float(np.median(seconds)), 4)


# --- the formats ---------------------------------------------------------------------------------------------------


def write_model(folder: Path, model: nn.Module, to: str, sample: Tensor) -> Model:
    """Write the model in a format, and return it as loaded by the format's runtime.

    Args:
      folder: existing folder of the file.
      model: model in evaluation mode.
      to: format, a key of `FILES`.
      sample: two rows of inputs.

    Raises:
      Refusal: the format cannot hold the model, or its runtime gives other outputs than torch.
    """
    path = folder / FILES[to]
    try:
        with _quiet():
            _WRITERS[to](path, model, sample)
        exported = read_model(folder, to, sha256_of(path))
        if to != "int8":  # its rounded weights give other outputs; `_save_int8` has checked the exact ones
            _check_same(model, exported, sample, to)
    except Refusal:
        raise
    except Exception as error:  # noqa: BLE001 (exporters and runtimes document no closed set)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Refusal("--to", to, f"cannot hold this model: {reason}") from None
    return exported


def _check_same(model: nn.Module, exported: Model, sample: Tensor, to: str) -> None:
    """Refuse the format `to` if the exported model's outputs differ from the model's by more than `TOLERANCE`."""
    for rows in _comparison_rows(model, sample):
        with torch.no_grad():
            outputs = model(rows)
        if not isinstance(outputs, Tensor):
            remedy = "has several or named outputs; an export needs one tensor"
            raise Refusal("model", type(model).__name__, remedy)
        expected, actual = outputs.numpy(), np.asarray(exported(rows.numpy()))
        tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
        if expected.shape != actual.shape or not np.abs(expected - actual).max() <= tolerance:
            remedy = f"gives other outputs than torch for {len(rows)} rows; use another format"
            raise Refusal("--to", to, remedy)


def _comparison_rows(model: nn.Module, sample: Tensor) -> Iterator[Tensor]:
    """Yield one, two and three rows, and random single rows, which may take branches that a trace of the sample lacks."""
    yield from (sample[:1], sample, torch.cat([sample, sample[:1]]))
    if sample.is_floating_point():
        draw = torch.Generator().manual_seed(SEED)
        rows = torch.randn(NUM_ROWS, *sample.shape[1:], generator=draw, dtype=sample.dtype)
        with torch.no_grad():
            # Rows without finite outputs are outside the model's domain, and show no fault of the format.
            finite = model(rows).reshape(NUM_ROWS, -1).isfinite().all(1)
        yield from (row[None] for row in rows[finite])


@contextmanager
def _quiet() -> Generator[None]:
    """Suppress the warnings of exporters, and the lines that torch logs."""
    torch_log = logging.getLogger("torch.onnx")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_log.setLevel(level)


def _save_float(path: Path, model: nn.Module, sample: Tensor) -> None:
    program, arrays = trace(model, sample)
    save_file(arrays, path, {"program": program})


def _save_int8(path: Path, model: nn.Module, sample: Tensor) -> None:
    """Write the model's program with its weights rounded, after a check of the program with exact weights."""
    program, arrays = trace(model, sample)
    operations = numpy_model.program_of(program)
    _check_same(model, lambda inputs: numpy_model.run(operations, arrays, inputs), sample, "int8")
    tensors: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if array.dtype.kind != "f" or array.ndim < 2:
            tensors[name] = array
        else:
            tensors[name], tensors[name + numpy_model.SCALE] = rounded(array)
    save_file(tensors, path, {"program": program})


def rounded(array: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return weights of shape (outputs, ...) as int8, and a scale for each output, by which they are multiplied again."""
    steps = np.abs(array.reshape(len(array), -1)).max(1) / INT8
    scale = np.where(steps > 0, steps, 1.0).astype(np.float32)
    scale_of_entries = scale.reshape(-1, *[1] * (array.ndim - 1))
    return np.clip(np.rint(array / scale_of_entries), -INT8, INT8).astype(np.int8), scale


def _save_onnx(path: Path, model: nn.Module, sample: Tensor) -> None:
    torch.onnx.export(
        model,
        (sample,),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("rows")},),
        input_names=["inputs"],
        output_names=["outputs"],
        external_data=False,
        verbose=False,
    )


_WRITERS: Mapping[str, Callable[[Path, nn.Module, Tensor], None]] = {
    "safetensors": _save_float,
    "int8": _save_int8,
    "onnx": _save_onnx,
    "torchscript": lambda path, model, sample: cast(Any, torch.jit.trace(model, sample)).save(path),
}


def trace(model: nn.Module, sample: Tensor) -> tuple[str, dict[str, NDArray[Any]]]:
    """Return the operations of a model as a program of `numpy_model`, in JSON, and its arrays by name.

    `model` is in evaluation mode; `sample` has two rows of inputs, since torch would take a single row for a constant.

    Raises:
      Refusal: the model has an operation that NumPy's interpreter does not know.
    """
    with _quiet():
        exported = torch.export.export(
            model, (sample,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=False
        )
    signature: Any = exported.graph_signature
    array_names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
    }  # by the name of their node
    array_names |= signature.inputs_to_lifted_tensor_constants
    nodes: list[list[Any]] = []
    for node in cast(Any, exported.graph.nodes):
        if node.op == "call_function":
            name = str(node.target).removeprefix("aten.").split(".")[0]
            if name not in numpy_model.OPERATIONS:
                remedy = f"has the operation {name}, which the interpreter in NumPy does not support; use --to onnx"
                raise Refusal("model", type(model).__name__, remedy)
            keywords = {key: _argument_json(each) for key, each in node.kwargs.items()}
            nodes.append([node.name, name, [_argument_json(each) for each in node.args], keywords])
    inputs, outputs = str(signature.user_inputs[0]), str(signature.user_outputs[0])
    program = {"inputs": inputs, "arrays": array_names, "nodes": nodes, "outputs": outputs}
    tensors: dict[str, Any] = {**exported.state_dict, **exported.constants}
    names = sorted({*array_names.values()})
    return json.dumps(program), {name: tensors[name].detach().cpu().contiguous().numpy() for name in names}


def _argument_json(argument: Any) -> Any:
    """Return an argument of an operation as JSON; a result of another operation by its name."""
    if isinstance(argument, torch.fx.Node):
        return {"node": argument.name}
    if isinstance(argument, list | tuple):
        return [_argument_json(each) for each in cast("list[Any]", argument)]
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    return str(argument)
