"""Data of a client, read in batches: examples in memory (`Examples`), or read on access from a data set (`LazyExamples`).

A batch is (inputs, targets). Inputs are a tensor, or a dictionary or a tuple of tensors, and the model is called with
`model(tensor)`, `model(**dictionary)` or `model(*tuple)`. Other modules do not depend on how data are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, cast, overload

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..configs.round_line import GROUPS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .protocol import Task

    Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

TARGETS = ("labels", "label", "targets", "target", "y")  # default names of the target field, in order
SPLIT = "_fedveil_split"  # attribute of a task whose clients hold records out; splits a client's data, see `held_back`
BATCH = 256  # examples per batch in a pass over all data
LONGEST_TEXT = 500  # characters of an exception's text, which may contain whole tensors
FEW = 8  # rows per thread; with fewer, a matrix product uses another algorithm and rounds differently
MOST_LOOKED_AT = 1000  # synthetic clients checked before a run, at 0.1 ms each; others when sampled


# --- tensors, and dictionaries and tuples of them ------------------------------------------------------------------


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every tensor of a tree, as `jax.tree.map` does; other leaves stay unchanged.

    Args:
      change: function of a tensor that returns a tensor.
      tree: a tensor, or nested dictionaries, tuples and lists of tensors, such as a model's outputs.
    """
    if isinstance(tree, dict):
        fields = cast(dict[str, Any], tree)
        return type(tree)(**{name: mapped(change, value) for name, value in fields.items()})
    if isinstance(tree, tuple | list):
        parts = [mapped(change, value) for value in cast(tuple[Any, ...], tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return change(tree) if hasattr(tree, "dim") else tree


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
        more = count - len(tensor)
        if more <= 0 or not len(tensor):
            return tensor
        return torch.cat([tensor, tensor[-1:].expand(more, *tensor.shape[1:])])

    return mapped(longer, tree)


def leaves(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, depth first."""
    if isinstance(tree, dict | tuple | list):
        values = tree.values() if isinstance(tree, dict) else cast(Sequence[Any], tree)
        return [leaf for value in cast(Iterable[Any], values) for leaf in leaves(value)]
    return [tree] if hasattr(tree, "dim") else []


def _concatenated(trees: Sequence[Any]) -> Any:
    """Concatenate at least one tree, all of the same structure, along the first dimension of every tensor."""
    import torch  # takes a second, and a plan does not need it

    parts = iter(zip(*map(leaves, trees), strict=True))
    return mapped(lambda _: torch.cat(list(next(parts))), trees[0])


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
    """Return inputs with contiguous tensors, images in a memory format of their own.

    Args:
      inputs: inputs of a batch.
      layout: memory format of images, the tensors of four dimensions.
    """

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
            if not hasattr(value, "dim"):
                object.__setattr__(self, name, _tensors(value))

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, index: Tensor) -> tuple[Any, Tensor]:
        """Return (inputs, targets) of some examples.

        Args:
          index: positions of the examples, shape (b,), int64.
        """
        inputs = self.inputs
        return inputs[index] if hasattr(inputs, "dim") else rows_of(inputs, index), self.targets[index]


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
        """Return (inputs, targets) of some examples.

        Args:
          index: positions of the examples, shape (b,), int64.

        Raises:
          Refusal: the batch has no targets, or the wrong number of rows.
        """
        return self.collated(self.items(index.tolist()))

    def collated(self, items: list[Any]) -> tuple[Any, Tensor]:
        """Return (inputs, targets) of these items as one batch; errors as of `batch`."""
        from torch.utils.data import default_collate

        inputs, targets = self._parted((self.collate or default_collate)(items))
        for name, tree in (("inputs", inputs), ("targets", targets)):
            for tensor in leaves(tree):
                if tensor.dim() == 0 or len(tensor) != len(items):
                    value = f"{name} of shape {tuple(tensor.shape)} for {len(items)} examples"
                    raise Refusal("collate", value, "must return one row for each example")
        return inputs, targets

    def _target_of(self, fields: Mapping[str, Any]) -> str:
        """Return the name of the target field among the fields of a batch."""
        return self.targets or next((name for name in TARGETS if name in fields), "targets")

    def _parted(self, batch: Any) -> tuple[Any, Any]:
        """Split a collated batch into (inputs, targets)."""
        if isinstance(batch, Mapping):
            fields = dict(cast(Mapping[str, Any], batch))
            target, names = self._target_of(fields), self.inputs
            if names is None:
                names = [name for name in fields if name != target]
            for name in (target, *([names] if isinstance(names, str) else names)):
                if name not in fields:
                    raise Refusal("data", name, f"no such field; items have {', '.join(map(str, fields))}")
            if isinstance(names, str):
                return _tensors(fields[names], names), _tensors(fields[target], target)
            return {name: _tensors(fields[name], name) for name in names}, _tensors(fields[target], target)
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
        """Return (inputs, targets) of the records at these positions, in ascending order."""
        import torch

        bounds = torch.searchsorted(index, torch.tensor(self.first)).tolist()
        read = [
            part.batch(index[start:stop] - first)
            for part, first, start, stop in zip(self.parts, self.first, bounds, bounds[1:], strict=False)
            if stop > start
        ]
        return _concatenated([inputs for inputs, _ in read]), torch.cat([targets for _, targets in read])


Data = Examples | LazyExamples


@overload
def only(data: Examples, rows: NDArray[np.int64]) -> Examples: ...
@overload
def only(data: Data, rows: NDArray[np.int64]) -> Data: ...
def only(data: Data, rows: NDArray[np.int64]) -> Data:
    """Return the subset of data at some positions.

    Args:
      data: data of a client.
      rows: positions of the examples, shape (k,), int64.
    """
    persons = None if data.persons is None else [data.persons[row] for row in rows.tolist()]
    if isinstance(data, Examples):
        import torch  # takes a second, and a linear device does not need it

        index = torch.from_numpy(rows)
        groups = None if data.groups is None else {name: codes[index] for name, codes in data.groups.items()}
        return Examples(rows_of(data.inputs, index), rows_of(data.targets, index), persons, groups)
    whole, chosen = data.dataset, rows.tolist()
    if hasattr(whole, "select"):
        return replace(data, dataset=whole.select(chosen), persons=persons)
    from torch.utils.data import Subset

    return replace(data, dataset=Subset(whole, chosen), persons=persons)


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
    """Return one client's training data, converted from any form that `Task.client_data` supports.

    Args:
      task: task with the client.
      client: number of the client, 0 <= client < num_clients.
    """
    split = getattr(task, SPLIT, None)
    return data_of_all(task, client) if split is None else split.of(task, client)[0]


def drawn_data_of(task: Task, client: int) -> Data:
    """Return a sampled client's training data, and check them if the population is too large for checks before the run.

    Arguments as of `data_of`.

    Raises:
      Refusal: the data are invalid.
    """
    data = data_of(task, client)
    if task.simulated and task.num_clients > MOST_LOOKED_AT:
        check_size(task, client, data)
        check_data(data, f"client {client}")
    return data


def data_of_all(task: Task, client: int) -> Data:
    """Return one client's data including its held-out part; arguments as of `data_of`."""
    return as_data(task.client_data(client))


def size_of(task: Task, client: int, whole: bool = False) -> int:
    """Return one client's number of examples, from a `SizedTask` without creating them.

    Args:
      task: task with the client.
      client: number of the client, 0 <= client < num_clients.
      whole: whether to count held-out examples.
    """
    size = _size_function(task)
    if size is not None and (whole or not hasattr(task, SPLIT)):
        return size(client)
    return len((data_of_all if whole else data_of)(task, client))


def _size_function(task: Task) -> Callable[[int], int] | None:
    """Return a `SizedTask`'s `client_size`, or None; `isinstance` would check all members, which is slow."""
    return getattr(task, "client_size", None)


def check_size(task: Task, client: int, data: Data) -> None:
    """Refuse a `SizedTask` if `client_size` is not a client's number of examples; `data` is its training data."""
    if (size := _size_function(task)) is None:
        return
    count = len(data_of_all(task, client) if hasattr(task, SPLIT) else data)
    if size(client) != count:
        remedy = f"client_data makes {count} examples for client {client}; return that number"
        raise Refusal("client_size", size(client), remedy)


def held_out_of(task: Task) -> Data:
    """Return a task's held-out data."""
    return as_data(task.held_out())


def as_data(value: Any) -> Data:
    """Convert a task's value to data: a pair (inputs, targets), a dictionary of both, or a data set with a length.

    Raises:
      Refusal: the value has no supported form.
    """
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

    def whole(inputs: Any, targets: Any, field: str) -> Any:
        return {**inputs, name or field: targets} if isinstance(inputs, dict) else (inputs, targets)

    if isinstance(data, Examples):
        return Examples(whole(data.inputs, data.targets, TARGETS[0]), data.targets, data.persons)

    def collated(items: list[Any]) -> tuple[Any, Any]:
        from torch.utils.data import default_collate

        batch: Any = (data.collate or default_collate)(items)
        field = data._target_of(batch) if isinstance(batch, Mapping) else ""  # pyright: ignore[reportPrivateUsage]
        inputs, targets = data._parted(batch)  # pyright: ignore[reportPrivateUsage]
        return whole(inputs, targets, field), targets

    return LazyExamples(data.dataset, transform=data.transform, collate=collated, persons=data.persons)


def in_tensors(data: Data, field: str, value: object, remedy: str) -> Examples:
    """Return data unchanged if their inputs are one tensor in memory, and refuse any other data.

    Args:
      data: data of a client, or held-out data.
      field: name of the setting that needs such data, for a refusal.
      value: value of that setting.
      remedy: what to do instead.

    Raises:
      Refusal: the data are read lazily, or their inputs are several tensors.
    """
    if isinstance(data, Examples) and hasattr(data.inputs, "dim"):
        return data
    raise Refusal(field, value, f"it needs inputs that are one tensor in memory; {remedy}")


def figures_of(task: Task, outputs: Any, targets: Tensor) -> dict[str, float]:
    """Return a task's metrics of these outputs, each converted to a float."""
    return {name: float(value) for name, value in task.metrics(outputs, targets).items()}


def derived(task: Task, means: Mapping[str, float]) -> dict[str, float]:
    """Return a run's metrics from their means over held-out data; a task's `derived` may add some, such as perplexity."""
    own = getattr(task, "derived", None)
    return dict(means) if own is None else own(means)


def batches_of(data: Data) -> Iterator[tuple[Any, Tensor]]:
    """Yield all data in order: as one batch if they are in memory, in batches of `BATCH` if they are read lazily."""
    import torch

    if isinstance(data, Examples):
        yield data.inputs, data.targets
        return
    for rows in torch.arange(len(data)).split(BATCH):
        yield data.batch(rows)


def _tensors(value: Any, name: str = "data") -> Any:
    """Convert arrays to tensors: floats to float32, integers to int64; uint8 and bool stay unchanged.

    Raises:
      Refusal: a value is not an array of numbers.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype == torch.float64 else value
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        small = value.dtype in (np.uint8, np.bool_)
        kind = value.dtype if small else np.float32 if value.dtype.kind == "f" else np.int64
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

    Raises:
      Refusal: a batch is invalid; the refusal names the owner and the field.
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
    if not hasattr(targets, "dim"):
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
    invalid label in them raises an error in training.

    Args:
      data: data of a client.
      owner: name of the owner for a refusal, such as `client 3`.
      model: the model, in evaluation mode.
      loss: the task's function of outputs and targets.

    Raises:
      Refusal: the model or the loss fails; the text of its exception is included and stays on this machine.
    """
    import torch

    if not isinstance(data, Examples) or not len(data):
        return
    inputs, targets = data.batch(torch.tensor([0, len(data) - 1]))
    field, value, code = f"{owner}: inputs", "the first example and the last", "model, in evaluation mode,"
    try:
        with torch.no_grad():
            outputs = run_on(model, inputs)
            field, value, code = f"{owner}: targets", "its labels", "loss"
            loss(outputs, targets)
            labels = data.targets.unique() if _are_labels(data.targets, outputs) else targets[:0]
            for label in labels:
                loss(outputs[:1], label[None])
    except Exception as error:
        raise Refusal(field, value, f"the task's {code} fails on them: {text_of(error)}") from error


def text_of(error: Exception) -> str:
    """Return the text of an exception from a user's code in one line, with its type unless it is a refusal."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ..."
    return text if isinstance(error, Refusal) else f"{type(error).__name__}: {text}"


def _are_labels(targets: Tensor, outputs: Any) -> bool:
    import torch

    single = not targets.is_floating_point() and targets.dim() == 1
    return single and isinstance(outputs, torch.Tensor) and outputs.dim() == 2


def _check_tensor(tensor: Tensor, count: int, name: str) -> None:
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
    if isinstance(inputs, dict):
        return "a dictionary of " + ", ".join(sorted(cast(dict[str, Any], inputs)))
    return f"a tuple of {len(cast(tuple[Any, ...], inputs))}" if isinstance(inputs, tuple) else "a tensor"


def check_examples(examples: Examples, num_classes: int, name: str = "data") -> Examples:
    """Return examples for classification unchanged, after a check.

    Args:
      examples: examples to check.
      num_classes: number of classes; targets are in [0, num_classes).
      name: name of the examples for a refusal.

    Raises:
      Refusal: there are no examples, inputs and targets differ in number, an input is NaN or infinite, or a target is
        out of range.
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
            rates = {"accuracy": (predicted == truth, group)}
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
