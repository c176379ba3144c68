"""Python face of fedveil: a federation simulated from a notebook or a script, planned, and read again from its folder."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base.bounded_decoding import INFINITY
from .base.extras import require_extra
from .base.refusal import Refusal
from .configs.round_line import TRAIN
from .run.files import CONFIG, METRICS, RESULT, locate_ledger

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy
    from numpy.typing import NDArray
    from torch import nn

    from .configs.schema import SimulationSettings
    from .run.build import RunObjects
    from .run.callbacks import Callback
    from .run.curve import Picture
    from .run.unit_plan import UnitPlan
    from .tasks import PooledTask, Task

WORDS = ("true", "false", "null", "nan", "inf")  # of Hydra's grammar; as text they need quotes


# --- results of a run ---------------------------------------------------------------------------------------------


class Temporary:
    """Folder that `simulate` chose; it is removed with the last `FinishedRun` that refers to it."""

    def __init__(self, folder: Path) -> None:
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        TEMPORARY[folder] = self


TEMPORARY = weakref.WeakValueDictionary[Path, Temporary]()  # by folder, for runs that are loaded or resumed


@dataclass(frozen=True)
class FinishedRun:
    """Results of a run, read from its folder when they are asked for.

    Returned by `simulate` and `load`.

    Attributes:
        folder: folder of the results. One that `simulate` chose is removed with the last object that reads it.

    Example:
        >>> import fedveil as fv
        >>> run = fv.simulate("digits", num_rounds=2, quiet=True)
        >>> run.status, len(run.history), run.epsilon <= 3
        ('completed', 2, True)
        >>> 0 < run.metrics["accuracy"] <= 1
        True
        >>> type(run.model).__name__
        'Linear'
    """

    folder: Path
    _task: Callable[[], Task] = field(repr=False)
    _temporary: Temporary | None = field(default=None, repr=False)

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json: versions, seed, audit and all that the other members show."""
        return json.loads((self.folder / RESULT).read_text(encoding="utf-8"))

    @property
    def status(self) -> str:
        """How it ended: `completed`, `exhausted` (budget), `interrupted`, `failed`, `alarmed` or `paused` (audit)."""
        return self.result["status"]

    @property
    def metrics(self) -> dict[str, float]:
        """Held-out metrics of the released model, by name; NaN where the model diverged.

        Figures of the training, `train/...`, are in `history`.
        """
        held_out = {k: value for k, value in self.result["metrics"].items() if not k.startswith(TRAIN)}
        return {name: math.nan if value is None else value for name, value in held_out.items()}

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """One dictionary a round, as `pandas.DataFrame` takes them.

        `round` counts from 1; metrics have their names as keys; `epsilon_client` and `epsilon_record` are spent so far,
        `inf` without privacy, None if there is no such unit.
        """
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [_with_infinity(json.loads(line)) for line in lines]

    @cached_property
    def privacy(self) -> list[dict[str, Any]]:
        """Privacy loss: one dictionary for each unit and adversary, with `epsilon` (`inf` allowed) at `delta`."""
        return [_with_infinity(row) for row in self.result["privacy"]]

    @property
    def epsilon(self) -> float:
        """Epsilon against every recipient of the model, `math.inf` without privacy.

        The larger one where both clients and records are hidden; `privacy` has each.
        """
        return max((row["epsilon"] for row in self.privacy if row["adversary"] == "model"), default=math.inf)

    @property
    def ledger(self) -> Path | None:
        """Ledger of the population, or folder of the clients' own ledgers; None if there is none."""
        path = self.result["ledger"]
        return None if path is None else locate_ledger(self.folder, path)

    @cached_property
    def model(self) -> nn.Module:
        """The released model, loaded and in evaluation mode.

        Raises:
            Refusal: the run's task was an object or is in your own module; pass it to `load`.
        """
        require_extra("client", "a run's model")
        from .run.released import model_of

        return model_of(self.folder, self._task())

    def predict(self, data: object) -> dict[str, NDArray[Any]]:
        """Return the released model's prediction for each row of the data.

        Args:
            data: of a run on tables a file, a folder or a data frame, with the columns of its schema; of a run on texts
              a file or a folder; of any other a file .npy, or an array, of the model's inputs, shape (n, ...).

        Returns:
            Columns of shape (n,), as `pandas.DataFrame` takes them: the label's likeliest word and its `probability`,
            or its number. Without a schema the `class` by its number, or each output of the model.

        Raises:
            Refusal: the data do not suit the model.
        """
        require_extra("client", "a prediction")
        from .run.released import predictions

        return predictions(self.model, self._task(), data, "accuracy" in self.metrics)

    def generate(self, text: str, *, tokens: int = 64, temperature: float = 0.8, seed: int = 0) -> str:
        """Return what the language model of a run with `task=text` writes after a text.

        If `epsilon` is infinite, it may repeat clients' texts word by word.

        Args:
            text: beginning, which is not returned.
            tokens: largest number of tokens, at least 1; the model may end the text before.
            temperature: randomness of the choice of a token, at least 0; with 0 it is the likeliest one.
            seed: equal seeds give equal texts; 0 or above.

        Raises:
            Refusal: the run has another task or classifies texts, or a value is out of its range.
        """
        require_extra("text", "a generated text")
        from .text.generate import Decoding, continuation

        return "".join(continuation(self.model, self._task(), text, Decoding(tokens, temperature, seed)))

    def plot(self) -> Picture:
        """Return accuracy and epsilon by round, and epsilon by delta, as curve.svg; a notebook shows it, and `save` writes it.

        Raises:
            Refusal: no round has ended.
        """
        from .run.curve import curve
        from .run.released import config_of

        config = config_of(self.folder)
        task = self.result.get("task", config["task"]["name"])
        title = f"{task}, privacy={config['privacy']['name']}: {self.status}"
        picture = curve(self.history, self.result["privacy"], title)
        if picture is None:
            raise Refusal(
                "folder",
                str(self.folder),
                "no round with a figure has ended there, so there is nothing to plot",
            )
        return picture


def load(
    folder: Path | str, *, task: Task | None = None, allow_modules: tuple[str, ...] | list[str] = ()
) -> FinishedRun:
    """Read a run that has ended from its folder.

    Args:
        folder: folder of a run, simulated or served.
        task: the task that the run trained, if it was an object; only `model` and `predict` need it.
        allow_modules: modules that may be imported for the task, if it is your own class.

    Returns:
        The results.

    Raises:
        Refusal: there is no run, or it has not ended.

    Example:
        >>> import tempfile
        >>> import fedveil as fv
        >>> folder = tempfile.mkdtemp() + "/first"
        >>> first = fv.simulate("digits", num_rounds=1, folder=folder, quiet=True)
        >>> fv.load(folder).metrics == first.metrics
        True
    """
    from .run.released import require_ended, task_of

    folder = Path(folder).absolute()
    require_ended(folder)
    make_task = (lambda: task_of(folder, tuple(allow_modules))) if task is None else (lambda: task)
    return FinishedRun(folder, make_task, TEMPORARY.get(folder))


# --- a run, and its plan ------------------------------------------------------------------------------------------


def simulate(
    task: Task | str | Mapping[str, Any] | None = None,
    *,
    privacy: object = None,
    cohort: object = None,
    strategy: Strategy | str | Mapping[str, Any] | None = None,
    num_rounds: int | None = None,
    seed: int | None = None,
    folder: Path | str | None = None,
    resume: Path | str | None = None,
    quiet: bool = False,
    callbacks: Sequence[Callback | str] = (),
    allow_modules: Sequence[str] = (),
    args: Mapping[str, Any] | None = None,
    **keys: Any,
) -> FinishedRun:
    """Train over the clients of a task on this machine, under a privacy budget.

    Whatever is left out has its value in the shipped configuration (`fedveil simulate --help` lists the keys). The
    caller's random state, torch threads, signal handlers and working folder are as before when it returns. Ctrl-C, or a
    notebook's stop button, ends the run after its round. So does SIGTERM, and then the caller's handler gets it: without
    one the program ends.

    Args:
        task: the name of a shipped task, such as "mnist5k", which it is if left out; an object with the members of
            `Task`; or a dictionary of its keys with `name`.
        privacy: mode of protection: `ClientCentral(...)`, `ClientDistributed(...)`, `Record(...)`,
            `RecordDistributed(...)`, `RecordAndClient(...)`, `NoPrivacy()`, or an option's name such as "record".
        cohort: draw of a round's clients: `Poisson(rate)`, `Fixed(size)`, `MinSeparation(...)`, `CyclicPoisson(...)`,
            `All()`, or a name.
        strategy: aggregation of updates: one of Flower's strategies or your own subclass as an object (it is copied, so
            that a second run starts fresh), or a name such as "fedadam".
        num_rounds: 1 to 100 000.
        seed: seed of draws, noise and training; None is 0 on simulated data. Refused on real data.
        folder: folder of the results; None keeps them for the lifetime of the returned object.
        resume: the folder of an earlier run to continue with its configuration; pass its task or strategy again if they
            were objects, and nothing else.
        quiet: whether to show no progress.
        callbacks: objects with the functions of `Callback`, or names such as "tensorboard".
        allow_modules: modules that may be imported for a task or strategy that is named "module:Class".
        args: keyword arguments of such a task's class: numbers, strings, booleans, None and lists of them.
        **keys: any other key of the configuration by its name, such as `local_epochs=2`; a group's keys as a dictionary,
            such as `engine={"workers": 2}` or `strategy={"name": "fedadam", "eta": 0.01}`.

    Returns:
        The results, for any ending of the run: see `status`.

    Raises:
        Refusal: a mistake, in one sentence each; nothing was written or spent.

    Example:
        >>> import fedveil as fv
        >>> run = fv.simulate(
        ...     "digits",
        ...     privacy=fv.ClientCentral(target_epsilon=2.0, target_delta=1e-3),
        ...     cohort=fv.Poisson(0.5),
        ...     num_rounds=2,
        ...     quiet=True,
        ... )
        >>> run.epsilon <= 2
        True
    """
    require_extra("simulation", "fedveil.simulate")
    from .run.build import build
    from .simulations.simulate import run_simulation

    callback_names = [each for each in callbacks if isinstance(each, str)]
    callback_objects = [each for each in callbacks if not isinstance(each, str)]
    options = {"privacy": privacy, "cohort": cohort, "num_rounds": num_rounds, "seed": seed}
    options |= {"callbacks": callback_names or None, **keys}
    if resume is not None and folder is not None:
        raise Refusal("folder", str(folder), "a resumed run uses its own folder; omit folder or resume")
    settings, objects = _settings(task, strategy, options, allow_modules, resume, args)
    if folder is not None and (Path(folder) / CONFIG).exists():
        remedy = "holds a run: fedveil.load(folder) reads it, resume=folder resumes it, or choose another"
        raise Refusal("folder", str(folder), remedy)
    federation = build(settings, objects=objects)
    chosen = folder if resume is None else resume
    run_folder = Path(tempfile.mkdtemp(prefix="fedveil-") if chosen is None else chosen).absolute()
    temporary = Temporary(run_folder) if chosen is None else TEMPORARY.get(run_folder)
    run = FinishedRun(run_folder, lambda: federation.task, temporary)
    outcome = run_simulation(federation, run_folder, quiet=quiet, callbacks=callback_objects)
    if outcome.signal == signal.SIGTERM:
        signal.raise_signal(signal.SIGTERM)  # the signal is for the whole program, not for one run of several
    return run


def plan(
    task: Task | str | Mapping[str, Any] | None = None,
    *,
    allow_modules: Sequence[str] = (),
    strategy: Strategy | str | Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
    **keys: Any,
) -> list[UnitPlan]:
    """Plan a run under a budget; nothing is trained, written or spent.

    Args:
        task: as in `simulate`.
        allow_modules: as in `simulate`.
        strategy: as in `simulate`.
        args: as in `simulate`.
        **keys: as in `simulate`: privacy, cohort, num_rounds and the others.

    Returns:
        One plan for each hidden unit; none without privacy.

    Raises:
        Refusal: a mistake, or no noise keeps the rounds within the budget.

    Example:
        >>> import fedveil as fv
        >>> found = fv.plan("digits", privacy="client_central", cohort=fv.Poisson(0.2), num_rounds=50)
        >>> found[0].unit, found[0].affordable_rounds >= 50
        ('client', True)
    """
    require_extra("simulation", "fedveil.plan")
    from .run.build import build
    from .run.unit_plan import unit_plans

    settings, objects = _settings(task, strategy, keys, allow_modules, args=args)
    return unit_plans(build(settings, objects=objects))


def ask(
    questions: Path | str | Mapping[str, Any],
    task: Task | str | Mapping[str, Any] | None = None,
    *,
    folder: Path | str = "questions",
    privacy: object = None,
    cohort: object = "all",
    allow_modules: Sequence[str] = (),
    args: Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Ask the clients of a task on this machine about their data, under a privacy budget.

    Each answer is one charge on the population's ledger, or with `Record` on each client's own. A repeated question of
    the same name is answered from the record in `folder` and costs nothing.

    Args:
        questions: a YAML file, or its content: `name`, `records`, `ask` and, optionally, `unit`, `purpose` and `why`.
        task: as in `simulate`; your own task has columns by its function `columns(client)`, or `label` alone.
        folder: folder of the records; in a simulation also of its ledger.
        privacy: mode of protection: `ClientCentral(...)`, `ClientDistributed(...)`, `Record(...)` or
            `RecordDistributed(...)`, or an option's name; by default the first, or the last if the questions have
            `unit: record`, as those of tables (`task="csv"`) have unless they or this mode say otherwise.
        cohort: draw of the clients that answer: `All()` or `Poisson(rate)`.
        allow_modules: as in `simulate`.
        args: as in `simulate`.
        **keys: `epsilon`, the cost of the answer alone, or `noise_multiplier` instead; `name`, `purpose`, `why`, `unit`
            and `records` to override those of the questions; any other as in `simulate`, such as seed.

    Returns:
        The record: for each question its figures with the ends of their 95 % intervals, and the cost of the answer.

    Raises:
        Refusal: a mistake, or an interval wider than the resolution that was asked for; nothing was charged.
        BudgetExhausted: it does not fit; nothing was charged.

    Example:
        >>> import tempfile
        >>> import fedveil as fv
        >>> asked = {"name": "digits", "records": 5, "ask": [{"kind": "mean", "of": "label", "low": 0, "high": 9}]}
        >>> task = {"name": "digits", "num_clients": 300}
        >>> record = fv.ask(asked, task, epsilon=1.0, folder=tempfile.mkdtemp())
        >>> rows, mean = record["answers"][0]["figures"]
        >>> mean["low"] < 4.5 < mean["high"]
        True
    """
    require_extra("simulation", "fedveil.ask")
    from .configs.question_file import COSTS, InquiryOptions, read_question_file
    from .privacy.statistics.inquiry import read_inquiry
    from .questions.ask import PRIVACY_OF_QUESTIONS, with_unit
    from .questions.pair_columns import schema_path, with_columns
    from .questions.question_plan import Spend
    from .questions.simulated import ask_here
    from .run.build import build
    from .run.released import model_run_of
    from .run.table_model import with_model_of_run

    plain = dict(questions) if isinstance(questions, Mapping) else read_question_file(Path(questions))
    inquiry_options = {each.name: keys.pop(each.name, None) for each in fields(InquiryOptions)}
    plain = InquiryOptions(**inquiry_options).over(plain)
    plain = with_unit(plain, _option(task), _option(privacy))
    plain = with_columns(plain, schema_path(task if isinstance(task, Mapping) else {}))
    cost = {key: plain.pop(key, None) for key in COSTS}
    model_run = model_run_of(plain)
    inquiry = read_inquiry(plain)
    keys = {"privacy": privacy or PRIVACY_OF_QUESTIONS[inquiry.unit], "cohort": cohort, **keys}
    settings, objects = _settings(task, None, keys, allow_modules, args=args)
    settings = with_model_of_run(settings, model_run)
    return ask_here(build(settings, objects=objects), inquiry, Spend(**cost), Path(folder), model_run)


# --- values of Python as overrides of the configuration -----------------------------------------------------------


def _settings(
    task: object,
    strategy: object,
    keys: Mapping[str, object],
    allow_modules: Sequence[str],
    resume: object = None,
    args: Mapping[str, Any] | None = None,
) -> tuple[SimulationSettings, RunObjects]:
    """Return the settings of these arguments of `simulate`, read as overrides, and the task and strategy that are objects."""
    from flwr.serverapp.strategy import Strategy

    from .configs.settings import settings_from_overrides
    from .run.build import OBJECT, RunObjects
    from .strategies.hints import hinted

    objects = RunObjects(_task_object(task), strategy if isinstance(strategy, Strategy) else None)
    modules, overrides = list(allow_modules), list[str]()
    for group, instance, value in (("task", objects.task, task), ("strategy", objects.strategy, strategy)):
        if instance is None:
            overrides += _overrides(group, value)
            continue
        modules.append(OBJECT)  # an object has the target "object:Class" in the settings, and needs no import
        if resume is None:
            overrides += _overrides(group, f"{OBJECT}:{type(value).__name__}")
    for key, value in keys.items():
        overrides += _overrides(key, value)
    if args and objects.task is not None:
        remedy = "the task is an object already; make it with them, or give module:Class"
        raise Refusal("args", dict(args), remedy)
    overrides += [f"task.args.{k}={_text(f'task.args.{k}', value)}" for k, value in (args or {}).items()]
    if resume is not None:
        overrides.append(f"resume={_text('resume', resume)}")
    elif modules:
        overrides.append(f"allow_modules={_text('allow_modules', modules)}")
    try:
        return settings_from_overrides(overrides), objects
    except Refusal as refusal:
        raise hinted(refusal) from None


def _task_object(value: object) -> Task | PooledTask | None:
    """Return a task that is an object; None for the name or the keys of one. Any other object is refused."""
    from .tasks import PooledTask, Task, as_task, lacking

    if isinstance(value, type):
        raise Refusal("task", value.__name__, f"is a class; give an object of it, as {value.__name__}()")
    task = as_task(value)
    if isinstance(task, Task | PooledTask):
        return task
    if (isinstance(task, str | None) or _is_group(task)) and not hasattr(task, "client_data"):
        return None
    raise Refusal("task", type(task).__name__, f"it lacks {', '.join(lacking(task))}")


def _overrides(path: str, value: object) -> Iterator[str]:
    """Yield the overrides that set the key or group at `path`; None leaves the shipped value, but within a group it is null."""
    if value is None:
        return
    if _is_group(value):
        option = _option(value)
        if option and ("." not in path or path == "task.adapter"):
            yield f"{path}={option}"
        for key, each in _fields(value).items():
            yield from [f"{path}.{key}=null"] if each is None else _overrides(f"{path}.{key}", each)
    elif path in ("task", "strategy") and ":" in str(value):
        yield f"{path}=custom"
        yield f"{path}.target={value}"
    else:
        yield f"{path}={_text(path, value)}"


def _is_group(value: object) -> bool:
    """Return whether a value stands for a group of keys: a dictionary, a model of the configuration or a cohort."""
    has_fields = is_dataclass(value) or hasattr(value, "model_fields_set")
    return isinstance(value, Mapping) or (has_fields and not isinstance(value, type))


def _option(value: object) -> str | None:
    """Return the name of the option that a group's value chooses; a cohort's is that of its class."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return value.get("name")
    if is_dataclass(value):
        return "_".join(re.findall("[A-Z][a-z]+", type(value).__name__)).lower()
    return getattr(value, "name", None) if _is_group(value) else None


def _fields(value: Any) -> dict[str, object]:
    """Return the keys that a group's value sets, without its option's name; of a cohort those without a default value."""
    if isinstance(value, Mapping):
        return {name: each for name, each in value.items() if name != "name"}
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value) if each.default is MISSING}
    return {name: getattr(value, name) for name in sorted(value.model_fields_set - {"name"})}


def _text(path: str, value: object) -> str:
    """Return a value in Hydra's grammar; `path` is its key, for a refusal."""
    from .configs.overrides import quoted

    match value:
        case bool():  # an Integral too
            return str(value).lower()
        case None:
            return "null"
        case Integral():
            return str(int(value))
        case Real():
            return repr(float(value))
        case str() | Path():
            text = str(value)
            plain = re.fullmatch(r"[A-Za-z_][\w.:-]*", text) and text.lower() not in WORDS
            return text if plain else quoted(text)
        case list() | tuple():
            return "[" + ",".join(_text(path, each) for each in value) + "]"
        case _:
            remedy = "give a name, a number, a dictionary of keys, or one of fedveil's own values"
            raise Refusal(path, value, remedy)


def _with_infinity(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of JSON with `math.inf` in place of the word for it."""
    return {name: math.inf if value == INFINITY else value for name, value in row.items()}
