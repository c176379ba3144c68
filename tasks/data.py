"""Data of a client, read in batches: examples in memory (`Examples`), or read on access from a data set (`LazyExamples`).

A batch is (inputs, targets). Inputs are a tensor, or a dictionary or a tuple of tensors, and the model is called with
`model(tensor)`, `model(**dictionary)` or `model(*tuple)`. Other modules do not depend on how data are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, overload

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..configs.round_line import GROUPS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .protocol import SizedTask, Task

    Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

TARGETS = ("labels", "label", "targets", "target", "y")  # default names of the target field, in order
SPLIT = "_fedveil_split"  # attribute that `held_back` sets on a task; its value splits each client's data
BATCH = 256  # examples per batch in a pass over all data
LONGEST_TEXT = 500  # characters of an exception's text, which may contain whole tensors
FEW = 8  # rows per thread; with fewer, a matrix product uses another algorithm and rounds differently
MOST_LOOKED_AT = 1000  # simulated clients checked before a run, at 0.1 ms each; of more, each when sampled


# --- tensors, and dictionaries and tuples of them ------------------------------------------------------------------


def is_tensor(value: object) -> bool:
    """Return whether a value is a tensor, without the import of torch, which takes a second."""
    return hasattr(value, "dim")


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every tensor of a tree, as `jax.tree.map` does; other leaves stay unchanged.

    Args:
      change: function of a tensor that returns a tensor.
      tree: a tensor, or nested dictionaries, tuples and lists of tensors, such as a model's outputs.
    """
    if isinstance(tree, dict):
        fields = cast(dict[str, Any], tree)  # keywords, as the outputs of Hugging Face's models take them
        return type(tree)(**{name: mapped(change, value) for name, value in fields.items()})
    if isinstance(tree, tuple | list):
        parts = [mapped(change, value) for value in cast(tuple[Any, ...], tree)]
        is_namedtuple = hasattr(tree, "_fields")
        return type(tree)(*parts) if is_namedtuple else type(tree)(parts)
    return change(tree) if is_tensor(tree) else tree


def padded_size(rows: int) -> int:
    """Return the number of rows to which a batch is padded, at least `FEW` per thread.

    With that many rows, an additional row does not change the rounding of the others. Otherwise one record could affect
    the outputs of a malicious server's model for all others.
    """
    import torch

    return max(rows, FEW * torch.get_num_threads())


def padded(tree: Any, count: int) -> Any:
    """Pad a tree to `count` rows with copies of each tensor's last row; a tree without rows stays unchanged.

    Args:
      tree: tensors of shape (n, ...), nested as in `mapped`.
      count: number of rows; n or fewer leave the tree unchanged.
    """
    import torch

    def longer(tensor: Tensor) -> Tensor:
        missing = count - len(tensor)
        if missing <= 0 or not len(tensor):
            return tensor
        return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])

    return mapped(longer, tree)


def leaves(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in the order in which `mapped` visits them."""
    if isinstance(tree, dict | tuple | list):
        values = tree.values() if isinstance(tree, dict) else cast(Sequence[Any], tree)
        return [leaf for value in cast(Iterable[Any], values) for leaf in leaves(value)]
    return [tree] if is_tensor(tree) else []


def _concatenated(trees: Sequence[Any]) -> Any:
    """Concatenate at least one tree, all of the same structure, along the first dimension of every tensor."""
    import torch  # takes a second, and a plan does not need it

    leaves_of_all = iter(zip(*map(leaves, trees), strict=True))  # one tensor of each tree at a time
    return mapped(lambda _: torch.cat(next(leaves_of_all)), trees[0])


def rows_of(tree: Any, index: Any) -> Any:
    """Select rows of every tensor of a tree; a tensor without dimensions stays unchanged.

    Args:
      tree: tensors of shape (n, ...), nested as in `mapped`.
      index: rows, as a slice or a tensor of positions.
    """
    return mapped(lambda tensor: tensor[index] if tensor.dim() else tensor, tree)


def run_on(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Call a model with a tensor, the positional arguments of a tuple, or the keyword arguments of a dictionary."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def laid_out(inputs: Inputs, layout: torch.memory_format) -> Inputs:
    """Return inputs of a batch as contiguous tensors, those of four dimensions (images) in a memory format."""

    def contiguous(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor.contiguous()

    return mapped(contiguous, inputs)


class Batches(Protocol):
    """Data with a length that are read in batches, of one client or of several."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def batch(self, index: Tensor) -> tuple[Any, Tensor]:
        """Return inputs and targets of the examples at these positions, shape (b,), int64."""
        ...


def placeholder(data: Batches, count: int) -> Inputs:
    """Return zeros with the shapes and types of a batch's inputs; a batch of no rows if there are no examples.

    Args:
      data: examples, of which the first defines shapes and types.
      count: number of rows.
    """
    import torch  # takes a second, and a plan does not need it

    rows = torch.zeros(count if len(data) else 0, dtype=torch.int64)
    return mapped(torch.zeros_like, data.batch(rows)[0])


# --- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Examples in memory: inputs and targets as tensors. NumPy arrays are converted.

    Attributes:
      inputs: shape (n, ...), float32 or int64; or a dictionary or a tuple of such tensors.
      targets: shape (n, ...), int64 for classes, float32 for numbers.
      persons: identifier of each example's person, n numbers or strings, never an input of the model; None if unknown.
      groups: group number of each example by attribute, shape (n,), -1 if unknown; None without groups.

    Example:
      >>> import torch
      >>> import fedveil as fv
      >>> len(fv.Examples(torch.zeros(20, 8), torch.zeros(20, dtype=torch.int64)))
      20
    """

    inputs: Any
    targets: Any
    persons: Sequence[Any] | None = None
    groups: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "targets"):
            value = getattr(self, name)
            if not is_tensor(value):
                object.__setattr__(self, name, _tensors(value))

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Tensor) -> tuple[Any, Tensor]:
        """Return (inputs, targets) of the examples at these positions, shape (b,), int64."""
        return rows_of(self.inputs, index), self.targets[index]


@dataclass(frozen=True)
class LazyExamples:
    """Examples that are read on access from a data set of torch, Hugging Face or your own.

    A batch reads items, transforms each, collates them, and separates inputs from targets. `Task.client_data` may return
    the data set itself if items are pairs (input, target), or dictionaries with a default name of the target field.

    Attributes:
      dataset: object with `__len__` and `__getitem__`, which returns the item at a position.
      inputs: name of the input field, or several names; None uses all fields except the targets.
      targets: name of the target field; None uses the first of labels, label, targets, target and y that exists.
      transform: function applied to an item on every read; it may be random.
      collate: function that makes a batch of a list of items; None uses torch's `default_collate`.
      persons: identifier of each item's person, a number or string; None if unknown.

    Example:
      >>> import torch
      >>> import fedveil as fv
      >>> words = [{"length": torch.tensor([float(n)]), "label": n % 2} for n in range(20)]
      >>> len(fv.LazyExamples(words, inputs="length"))
      20
    """

    dataset: Any
    inputs: str | Sequence[str] | None = None
    targets: str | None = None
    transform: Callable[[Any], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    persons: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        plain = self.transform is None and self.collate is None
        if plain and hasattr(self.dataset, "with_format") and self.dataset.format["type"] is None:
            object.__setattr__(self, "dataset", self.dataset.with_format("torch"))

    def __len__(self) -> int:
        return len(self.dataset)

    def raw_items(self, rows: list[int]) -> list[Any]:
        """Return the items at these positions, before `transform`."""
        several = getattr(self.dataset, "__getitems__", None)
        return several(rows) if several else [self.dataset[row] for row in rows]

    def items(self, rows: list[int]) -> list[Any]:
        """Return the items at these positions, after `transform`."""
        items = self.raw_items(rows)
        return items if self.transform is None else [self.transform(item) for item in items]

    def batch(self, index: Tensor) -> tuple[Any, Tensor]:
        """Return (inputs, targets) of the examples at these positions, shape (b,), int64.

        Raises:
          Refusal: the batch has no targets, or the wrong number of rows.
        """
        return self.collated(self.items(index.tolist()))

    def collated(self, items: list[Any]) -> tuple[Any, Tensor]:
        """Return (inputs, targets) of these items as one batch; errors as of `batch`."""
        from torch.utils.data import default_collate

        inputs, targets = self.inputs_and_targets((self.collate or default_collate)(items))
        for name, tree in (("inputs", inputs), ("targets", targets)):
            for tensor in leaves(tree):
                if tensor.dim() == 0 or len(tensor) != len(items):
                    value = f"{name} of shape {tuple(tensor.shape)} for {len(items)} examples"
                    raise Refusal("collate", value, "must return one row for each example")
        return inputs, targets

    def target_name(self, fields: Mapping[str, Any]) -> str:
        """Return the name of the target field among the fields of a batch."""
        return self.targets or next((name for name in TARGETS if name in fields), "targets")

    def inputs_and_targets(self, batch: Any) -> tuple[Any, Any]:
        """Split a collated batch, a mapping of fields or a pair, into inputs and targets; refuse any other."""
        if isinstance(batch, Mapping):
            fields = dict(cast(Mapping[str, Any], batch))
            target, inputs = self.target_name(fields), self.inputs
            if inputs is None:
                inputs = [name for name in fields if name != target]
            for name in (target, *([inputs] if isinstance(inputs, str) else inputs)):
                if name not in fields:
                    raise Refusal("data", name, f"no such field; items have {', '.join(map(str, fields))}")
            targets = _tensors(fields[target], target)
            if isinstance(inputs, str):
                return _tensors(fields[inputs], inputs), targets
            return {name: _tensors(fields[name], name) for name in inputs}, targets
        if not isinstance(batch, list | tuple) or len(cast(list[Any], batch)) != 2:
            raise Refusal("data", type(batch).__name__, "give items (inputs, targets), or dictionaries")
        inputs, targets = cast(list[Any], batch)
        return _tensors(inputs), _tensors(targets, "targets")


@dataclass(frozen=True)
class Union:
    """Concatenated data of several clients, without a copy.

    Attributes:
      parts: data of each client.
      first: position of each client's first record, and then the number of all records.
    """

    parts: tuple[Data, ...]
    first: tuple[int, ...]

    def __len__(self) -> int:
        return self.first[-1]

    def batch(self, index: Tensor) -> tuple[Any, Tensor]:
        """Return (inputs, targets) of the records at these positions, which must ascend: each part is read once."""
        import torch

        bounds = torch.searchsorted(index, torch.tensor(self.first)).tolist()
        batches = [
            part.batch(index[start:stop] - first)
            for part, first, (start, stop) in zip(self.parts, self.first, pairwise(bounds), strict=False)
            if stop > start
        ]
        inputs, targets = zip(*batches, strict=True)
        return _concatenated(inputs), torch.cat(targets)


Data = Examples | LazyExamples


@overload
def only(data: Examples, rows: NDArray[np.int64]) -> Examples: ...
@overload
def only(data: Data, rows: NDArray[np.int64]) -> Data: ...
def only(data: Data, rows: NDArray[np.int64]) -> Data:
    """Return the subset of a client's data at some positions, shape (k,), int64."""
    persons = _persons_of(data, rows.tolist())
    if isinstance(data, Examples):
        import torch  # takes a second, and a linear device does not need it

        return _selected(data, torch.from_numpy(rows), persons)
    whole, chosen = data.dataset, rows.tolist()
    if hasattr(whole, "select"):
        return replace(data, dataset=whole.select(chosen), persons=persons)
    from torch.utils.data import Subset

    return replace(data, dataset=Subset(whole, chosen), persons=persons)


def stretch(data: Examples, rows: slice) -> Examples:
    """Return the examples of a slice, which share the memory of `data`."""
    return _selected(data, rows, _persons_of(data, range(rows.start, rows.stop)))


def _persons_of(data: Data, rows: Iterable[int]) -> list[Any] | None:
    return None if data.persons is None else [data.persons[row] for row in rows]


def _selected(data: Examples, index: Any, persons: Sequence[Any] | None) -> Examples:
    """Return the examples at some positions, a slice or a tensor, with these persons."""
    groups = None if data.groups is None else {name: codes[index] for name, codes in data.groups.items()}
    return Examples(rows_of(data.inputs, index), rows_of(data.targets, index), persons, groups)


def joined(parts: Sequence[Examples]) -> Examples:
    """Concatenate at least one part; persons and groups remain only if every part has them."""
    persons = [part.persons for part in parts if part.persons is not None]
    groups = [dict(part.groups) for part in parts if part.groups is not None]
    return Examples(
        _concatenated([part.inputs for part in parts]),
        _concatenated([part.targets for part in parts]),
        list(chain(*persons)) if len(persons) == len(parts) else None,
        _concatenated(groups) if len(groups) == len(parts) else None,
    )


def data_of(task: Task, client: int) -> Data:
    """Return one client's training data, without held-out ones, converted from any form of `Task.client_data`.

    Args:
      task: task with the client.
      client: number of the client, 0 <= client < num_clients.
    """
    split = getattr(task, SPLIT, None)
    return data_of_all(task, client) if split is None else split.of(task, client)[0]


def drawn_data_of(task: Task, client: int) -> Data:
    """Return a sampled client's training data; check them now if the clients were too many to check before a run."""
    data = data_of(task, client)
    if task.simulated and task.num_clients > MOST_LOOKED_AT:
        check_size(task, client, data)
        check_data(data, f"client {client}")
    return data


def data_of_all(task: Task, client: int) -> Data:
    """Return all data of one client of a task, with those that it holds out of training."""
    return as_data(task.client_data(client))


def size_of(task: Task, client: int, whole: bool = False) -> int:
    """Return one client's number of examples, of the `whole` data or without held-out ones.

    A `SizedTask` returns it without creating them. Other arguments as of `data_of`.
    """
    counts_all = whole or not hasattr(task, SPLIT)
    if counts_all and hasattr(task, "client_size"):  # `isinstance` would check all members, which is slow
        return cast("SizedTask", task).client_size(client)
    return len(data_of_all(task, client) if counts_all else data_of(task, client))


def check_size(task: Task, client: int, data: Data) -> None:
    """Refuse a `SizedTask` whose `client_size` is not a client's number of examples; `data` are its training data."""
    if not hasattr(task, "client_size"):
        return
    size = cast("SizedTask", task).client_size(client)
    count = len(data_of_all(task, client) if hasattr(task, SPLIT) else data)
    if size != count:
        remedy = f"client_data makes {count} examples for client {client}; return that number"
        raise Refusal("client_size", size, remedy)


def package_folders(module: str) -> list[Path]:
    """Return the folders of an installed package with data, without its import; empty if it is not installed."""
    package = find_spec(module)
    return [Path(folder) for folder in package.submodule_search_locations or ()] if package else []


def held_out_of(task: Task) -> Data:
    """Return a task's held-out data."""
    return as_data(task.held_out())


def as_data(value: Any) -> Data:
    """Convert a pair (inputs, targets), a dictionary of both, or a data set with a length; refuse any other value."""
    if isinstance(value, Examples | LazyExamples):
        return value
    if isinstance(value, tuple) and len(cast(tuple[Any, ...], value)) == 2:
        return Examples(*cast(tuple[Any, Any], value))
    if isinstance(value, Mapping):
        fields = {str(name): content for name, content in cast(Mapping[Any, Any], value).items()}
        if (name := next((each for each in TARGETS if each in fields), None)) is None:
            remedy = f"name its targets {', '.join(TARGETS[:-1])} or {TARGETS[-1]}, or give (inputs, targets)"
            raise Refusal("client_data", f"a dictionary of {', '.join(fields)}", remedy)
        return Examples({each: value for each, value in fields.items() if each != name}, fields[name])
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        return LazyExamples(value)
    remedy = "give (inputs, targets), fedveil.Examples, or a data set with a length and items by position"
    raise Refusal("client_data", type(value).__name__, remedy)


def with_targets(data: Data, name: str = "") -> Data:
    """Return data whose inputs include the targets, like batches of a `DataLoader`.

    The inputs are (inputs, targets), or a dictionary of all fields.

    Args:
      data: data of a client, or held-out data.
      name: name of the targets in a dictionary; "" keeps the data set's name, which is `labels` in memory.
    """

    def with_field(inputs: Any, targets: Any, field: str) -> Any:
        return {**inputs, name or field: targets} if isinstance(inputs, dict) else (inputs, targets)

    if isinstance(data, Examples):
        return Examples(with_field(data.inputs, data.targets, TARGETS[0]), data.targets, data.persons)

    def collated(items: list[Any]) -> tuple[Any, Any]:
        from torch.utils.data import default_collate

        batch: Any = (data.collate or default_collate)(items)
        inputs, targets = data.inputs_and_targets(batch)
        field = data.target_name(batch) if isinstance(batch, Mapping) else ""
        return with_field(inputs, targets, field), targets

    return LazyExamples(data.dataset, transform=data.transform, collate=collated, persons=data.persons)


def in_tensors(data: Data, field: str, value: object, remedy: str) -> Examples:
    """Return data unchanged if their inputs are one tensor in memory, and refuse any other data.

    Args:
      data: data of a client, or held-out data.
      field: name of the setting that needs such data, for a refusal.
      value: value of that setting.
      remedy: what to do instead.
    """
    if isinstance(data, Examples) and is_tensor(data.inputs):
        return data
    raise Refusal(field, value, f"it needs inputs that are one tensor in memory; {remedy}")


def figures_of(task: Task, outputs: Any, targets: Tensor) -> dict[str, float]:
    """Return a task's metrics of these outputs, each converted to a float."""
    return {name: float(value) for name, value in task.metrics(outputs, targets).items()}


def derived(task: Task, means: Mapping[str, float]) -> dict[str, float]:
    """Return a run's metrics from their means over held-out data; a task's `derived` may add some, such as perplexity."""
    own = getattr(task, "derived", None)
    return dict(means) if own is None else own(means)


def batches_of(data: Data, size: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield all data in order, in batches of at most `size`, and of at most `BATCH` if they are read lazily."""
    import torch

    if not isinstance(data, Examples):
        size = min(size, BATCH)
    elif len(data) <= size:
        yield data.inputs, data.targets
        return
    for rows in torch.arange(len(data)).split(size):
        yield data.batch(rows)


def mean_figures(batches: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Return the mean over examples of each figure, from the sizes of batches and their means.

    A figure that is undefined for some batches, such as the area under a curve for examples of one class, is the mean over
    the others.
    """
    sums, counts = dict[str, float](), dict[str, int]()
    for count, figures in batches:
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value * count
            counts[name] = counts.get(name, 0) + count
    return {name: total / counts[name] for name, total in sums.items()}


def _tensors(value: Any, name: str = "data") -> Any:
    """Convert arrays to tensors of float32 or int64, uint8 and bool as they are; refuse any other value."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype == torch.float64 else value
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        kind = np.float32 if value.dtype.kind == "f" else np.int64
        if value.dtype in (np.uint8, np.bool_):
            kind = value.dtype
        return torch.from_numpy(np.require(value, kind, ["C", "W"]))
    if isinstance(value, Mapping):
        return {str(key): _tensors(each, str(key)) for key, each in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, tuple | list) and value:
        return tuple(_tensors(each, name) for each in cast(Sequence[Any], value))
    what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise Refusal(name, what, "it is not a tensor; name the fields that are, or collate it into one")


# --- checks -----------------------------------------------------------------------------------------------------


def check_data(data: Data, owner: str, like: Data | None = None) -> None:
    """Refuse invalid data before any budget is spent; data without examples are valid.

    Tensors in memory are checked completely, and a lazily read data set at its first and last example.

    Args:
      data: data to check.
      owner: name of the owner for a refusal, such as `client 3`.
      like: held-out data, whose batches must have the same fields; None skips this check.
    """
    import torch

    count = len(data)
    if count == 0:
        return
    if isinstance(data, Examples):
        inputs, targets = data.inputs, data.targets
    else:
        try:
            inputs, targets = data.batch(torch.tensor([0, count - 1]))
        except Refusal as refusal:
            raise Refusal(f"{owner}: {refusal.field}", refusal.value, refusal.remedy) from None
        except Exception as error:
            what = f"reading the first and the last failed ({text_of(error)})"
            raise Refusal(f"{owner}: data", f"{count} examples", what) from error
    if not is_tensor(targets):
        raise Refusal(f"{owner}: targets", type(targets).__name__, "give one tensor")
    fields = inputs.items() if isinstance(inputs, dict) else [("inputs", inputs)]
    for name, tree in [*fields, ("targets", targets)]:
        for tensor in leaves(tree):
            _check_tensor(tensor, len(targets), f"{owner}: {name}")
    if like is None or not len(like):
        return
    if (form := _form(inputs)) != (other := _form(like.batch(torch.tensor([0]))[0])):
        raise Refusal(f"{owner}: inputs", form, f"held-out data have {other}; use the same fields everywhere")


def check_taken(data: Data, owner: str, model: Callable[..., Any], loss: Callable[..., Any]) -> None:
    """Refuse inputs on which the model fails, or labels on which the loss fails, before any budget is spent.

    The model runs on the first and the last example, the loss on all labels. Lazily read data are not checked: an
    invalid label in them raises an error in training. The refusal has the exception's text and stays on this machine.

    Args:
      data: data of a client.
      owner: name of the owner for a refusal, such as `client 3`.
      model: the model, in evaluation mode.
      loss: the task's function of outputs and targets.
    """
    import torch

    if not isinstance(data, Examples) or not len(data):
        return
    inputs, targets = data.batch(torch.tensor([0, len(data) - 1]))
    try:
        with torch.no_grad():
            outputs = run_on(model, inputs)
    except Exception as error:
        remedy = f"the task's model, in evaluation mode, fails on them: {text_of(error)}"
        raise Refusal(f"{owner}: inputs", "the first example and the last", remedy) from error
    try:
        with torch.no_grad():
            loss(outputs, targets)
            for label in data.targets.unique() if _are_classes(data.targets, outputs) else ():
                loss(outputs[:1], label[None])
    except Exception as error:
        remedy = f"the task's loss fails on them: {text_of(error)}"
        raise Refusal(f"{owner}: targets", "its labels", remedy) from error


def text_of(error: Exception) -> str:
    """Return the text of an exception from a user's code in one line, with its type unless it is a refusal."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ..."
    return text if isinstance(error, Refusal) else f"{type(error).__name__}: {text}"


def _are_classes(targets: Tensor, outputs: Any) -> bool:
    """Return whether targets are classes and outputs their logits: shapes (n,) and (n, classes)."""
    import torch

    are_single = not targets.is_floating_point() and targets.dim() == 1
    return are_single and isinstance(outputs, torch.Tensor) and outputs.dim() == 2


def _check_tensor(tensor: Tensor, count: int, name: str) -> None:
    """Refuse a tensor with NaN or infinity, or with another number of rows than `count`."""
    import torch

    if tensor.dim() == 0 or len(tensor) != count:
        remedy = f"inputs and targets must be equally many, and there are {count} targets"
        raise Refusal(name, tuple(tensor.shape), remedy)
    # The sum is nine times as fast as testing each number, and Python's `isfinite` three times as fast as torch's.
    if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return
    if broken := int((~torch.isfinite(tensor)).sum()):
        raise Refusal(name, f"{broken} NaN or infinite", "impute or remove these values before training")


def _form(inputs: Any) -> str:
    """Return the structure of a batch's inputs in words, for a comparison and for a refusal."""
    if isinstance(inputs, dict):
        return "a dictionary of " + ", ".join(sorted(cast(dict[str, Any], inputs)))
    return f"a tuple of {len(cast(tuple[Any, ...], inputs))}" if isinstance(inputs, tuple) else "a tensor"


def check_examples(examples: Examples, num_classes: int, name: str = "data") -> Examples:
    """Return examples for classification; refuse none, NaN, infinity, and labels out of range.

    Args:
      examples: examples to check.
      num_classes: number of classes.
      name: name of the examples for a refusal.
    """
    inputs, targets = examples.inputs, examples.targets
    if len(targets) == 0:
        raise Refusal(name, 0, "there are no examples; give at least one")
    _check_tensor(inputs, len(targets), name)
    outside = int(((targets < 0) | (targets >= num_classes)).sum())
    if outside:
        raise Refusal(name, f"{outside} labels out of range", f"labels run from 0 to {num_classes - 1}")
    return examples


def group_figures(
    outputs: Tensor, targets: Tensor, groups: Mapping[str, Tensor], words: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return each group's accuracy and, with two classes, its true positive, false positive and selection rates, by name.

    A rate of no rows is omitted, and there are no rates for numeric targets.

    Args:
      outputs: logits, shape (n, classes).
      targets: classes, shape (n,).
      groups: group number of each row by attribute, shape (n,), -1 if unknown.
      words: names of each attribute's groups, in the order of their numbers.
    """
    if outputs.dim() != 2 or targets.is_floating_point():
        return {}
    predicted, truth, figures = outputs.argmax(-1).cpu(), targets.cpu(), dict[str, float]()
    for attribute, codes in groups.items():
        for code, word in enumerate(words[attribute]):
            group = codes.cpu() == code
            rates = {"accuracy": (predicted == truth, group)}  # hits, and the rows that they are a share of
            if outputs.shape[-1] == 2:
                rates |= {
                    "true positive rate": (predicted == 1, group & (truth == 1)),
                    "false positive rate": (predicted == 1, group & (truth == 0)),
                    "selection rate": (predicted == 1, group),
                }
            for name, (hits, rows) in rates.items():
                if bool(rows.any()):
                    figures[f"{GROUPS}{attribute}={word}/{name}"] = float(hits[rows].double().mean())
    return figures
