"""What tests of several rooms need: the real command, run in a child of this process. And which files go first."""

import gc
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from operator import attrgetter
from pathlib import Path
from typing import Any

import hypothesis
import pytest

gc.disable()  # until tests are collected: to look for garbage in what is imported took nearly half of that time
# Before torch is imported: a thread pool does not outlive a fork, and a forked command would wait for it for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FAULTS = Path(__file__).parent / "faults"
FORKS = FAULTS / "forked_commands.py"
SELDOM = FAULTS / "seldom_alarms.py"
free_port = runpy.run_path(str(FAULTS / "ports.py"))["free_port"]
SELDOM_TERMS = runpy.run_path(str(SELDOM))["seldom_terms"]
COMPOSED = runpy.run_path(str(FAULTS / "composed_once.py"))
# What most commands import: here once, and not in each child.
IMPORTED = (
    *("fedveil.__main__", "fedveil.cli.simulate", "fedveil.simulations.simulate", "hydra.core.utils"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "mlxtend.data"),
    "hydra._internal.core_plugins.basic_launcher",
)
SECONDS = 240.0
# Files that take longest, the longest first: one that begins last would keep one core busy while the others wait.
LONGEST = (
    "test_mutations.py",
    "test_docs.py",
    "end_to_end/test_federation.py",
    "engines/test_ray.py",
    "end_to_end/test_resume.py",
    "end_to_end/test_run.py",
    "questions/test_scaling.py",
    "questions/test_evaluation.py",
    "end_to_end/test_preconditions.py",
    "run/test_tuning.py",
    "deployment/device/test_receipts.py",
    "end_to_end/test_before_the_rooms.py",
    "cli/test_new.py",
    "test_examples.py",
    "questions/test_question_plan.py",
    "end_to_end/test_questions.py",
    "tasks/test_optimizers.py",
    "benchmarks/test_benchmarks.py",
    "messages/test_flower_adapter.py",
    "privacy/ledger/test_crash.py",
    "privacy/accounting/test_epsilon.py",
    "end_to_end/test_owner.py",
    "audit/test_observer.py",
    "end_to_end/test_masked.py",
    "audit/test_record_canaries.py",
    "deployment/test_serve.py",
    "adapters/test_flower_app.py",
    "cli/test_simulate.py",
    "configs/test_preflight.py",
    "privacy/mechanisms/test_distinguishing.py",
    "configs/test_compose.py",
    "links/flower/test_superlink.py",
    "campaigns/test_ledger.py",
    "end_to_end/test_device.py",
    "end_to_end/test_link_sum.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Try properties on the same examples in every run, however slow the machine is; campaigns draw others."""
    slow = hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture
    hypothesis.settings.register_profile(
        "repeated",
        hypothesis.settings(),
        derandomize=config.getoption("markexpr") == "not campaign",
        deadline=None,
        database=None,
        suppress_health_check=slow,
    )
    hypothesis.settings.load_profile("repeated")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what all tests of a process draw from: what one draws depends on none before it."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    for module, draws in (("numpy", "random.seed"), ("torch", "default_generator.manual_seed")):
        if module in sys.modules:
            attrgetter(draws)(sys.modules[module])(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the others, and the tests of each, stay in their order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(_file_of(item), len(places)))


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0].removeprefix("tests/")


def pytest_collection_finish() -> None:
    """Look for garbage from here on, as every process does, but not in what was imported and collected."""
    gc.freeze()
    gc.enable()
    gc.get_freeze_count = _some_are_frozen


@wraps(gc.get_freeze_count)
def _some_are_frozen() -> int:
    """Return a number above zero: a simulation asks no more, and to count so many takes as long as a round of it."""
    return 1


@lru_cache
def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    return lru_cache(maxsize=64)(function)


@pytest.fixture(scope="module")
def fast_runs() -> Iterator[None]:
    """Run as users do, but compose the same choices and compute the same distributions once.

    Files with many short runs ask for it by name. The others, those of whole federations among them, run what users run.
    """
    from dp_accounting.pld import privacy_loss_distribution as losses

    with pytest.MonkeyPatch.context() as patch:
        COMPOSED["remember"](patch)
        patch.setattr(losses, "from_gaussian_mechanism", _remembering(losses.from_gaussian_mechanism))
        yield


@pytest.fixture(scope="module")
def audits_seldom_alarm() -> Iterator[None]:
    """Let no correct run on real data end a test by a false alarm; with a seed it alarms always or never."""
    from fedveil.audit import observer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observer, "_terms", SELDOM_TERMS(observer._terms))
        yield


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Command:
    """A `fedveil` command in a forked child: the same code as in a process of its own, without the imports' time."""

    process: int
    out_file: Path
    err_file: Path

    def wait(self) -> int:
        """Return its exit code, or minus the signal that ended it."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        raise TimeoutError(self.err + self.out)

    def signal(self, number: int) -> None:
        os.kill(self.process, number)

    @property
    def out(self) -> str:
        return self.out_file.read_text()

    @property
    def err(self) -> str:
        return self.err_file.read_text()


@dataclass
class Commands:
    """Starts commands in this folder."""

    folder: Path
    count: int = 0

    def start(self, *argv: str, first: Callable[[], None] = _nothing) -> Command:
        """Start `fedveil *argv`; the child calls `first` before the command, to arrange its accidents."""
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        process = os.fork()
        if process:
            return Command(process, out, err)
        self._become(argv, out, err, first)
        return Command(0, out, err)

    def run(self, *argv: str, first: Callable[[], None] = _nothing) -> tuple[int, Command]:
        """Run a command to its end."""
        command = self.start(*argv, first=first)
        return command.wait(), command

    def _become(self, argv: tuple[str, ...], out: Path, err: Path, first: Callable[[], None]) -> None:
        code = 99
        try:
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.chdir(self.folder)
            code = _main(argv, first)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _main(argv: tuple[str, ...], first: Callable[[], None]) -> int:
    import logging

    main: Callable[[], int] = import_module("fedveil.__main__").main
    logging.getLogger().handlers.clear()  # pytest's own
    sys.argv = ["fedveil", *argv]
    first()
    return main()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny language model of two layers, not to be changed."""
    texts = import_module("shared.texts")
    return texts.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def five_devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The desk of five devices with data of their own, to be copied and not changed."""
    devices = runpy.run_path(str(FAULTS / "devices.py"))
    return devices["make_federation"](tmp_path_factory.mktemp("desk"))


@pytest.fixture
def made(five_devices: Path, tmp_path: Path) -> Path:
    """Return a copy of that desk, which a test may change."""
    return Path(shutil.copytree(five_devices, tmp_path / "made"))


@pytest.fixture
def commands(tmp_path: Path, audits_seldom_alarm: None) -> Commands:
    """`fedveil`, as a user starts it, in an empty folder."""
    for name in IMPORTED:
        import_module(name)
    return Commands(tmp_path)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a shell needs in its environment for `fedveil` to be a fork of a process that has imported already.

    That process has no gRPC and no threads, so that its forks may have both; `fedveil --script PATH` runs a script.
    """
    folder = tmp_path_factory.mktemp("forks")
    (folder / "fedveil").write_text(f'#!/bin/sh\nexec {sys.executable} -SE {FORKS} "$@"\n')
    (folder / "fedveil").chmod(0o755)
    starter = subprocess.Popen([sys.executable, str(FORKS), "--serve", str(folder / "socket")])
    while not (folder / "socket").exists():
        assert starter.poll() is None
        time.sleep(0.05)
    paths = (folder, Path(sys.executable).parent, os.environ["PATH"])
    yield {"FEDVEIL_FORKS": str(folder / "socket"), "PATH": os.pathsep.join(map(str, paths))}
    starter.terminate()
    starter.wait()


@dataclass(frozen=True)
class Processes:
    """`fedveil` as processes that run beside each other, in one folder; a port that is free."""

    folder: Path
    port: int
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "HOME": str(self.folder / "home")}
        command = [sys.executable, "-P", str(SELDOM), *words]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.begun.append(process)
        return process

    def ended(self, *words: str) -> tuple[int, str]:
        """Return the exit code of a command and what it said."""
        said, _ = (process := self.start(*words)).communicate(timeout=300)
        return process.returncode, said

    def ran(self, *words: str) -> str:
        """Return what a command said that did what it was asked for."""
        code, said = self.ended(*words)
        assert code == 0, said
        return said


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Processes that are ended with their test."""
    made = Processes(tmp_path, free_port())
    try:
        yield made
    finally:
        for process in made.begun:
            process.kill()
            process.communicate()


@pytest.fixture
def provisioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that provisions f.yaml, with free ports in the places of {link} and {port}, and returns the desk."""

    def not_synced(file: int) -> None:
        del file

    monkeypatch.setattr(os, "fsync", not_synced)

    def make(federation: str) -> Path:
        from fedveil.deployment.provision import provision

        (tmp_path / "f.yaml").write_text(federation.format(link=free_port(), port=free_port()))
        return provision(tmp_path / "f.yaml", tmp_path / "desk").folder

    return make


@pytest.fixture
def enrolling() -> Callable[[Path], AbstractContextManager[Any]]:
    """Return a function that opens the enrolment port of a desk's server, which is answered in a thread, as a context."""

    @contextmanager
    def opened(desk: Path) -> Generator[Any]:
        from fedveil.links.enrolment.server_end import EnrolmentPort
        from fedveil.links.server_bundle import read_server_bundle

        bundle, stop = read_server_bundle(desk / "server"), threading.Event()
        told: list[str] = []
        thread = threading.Thread(target=EnrolmentPort(bundle).serve, args=(stop, told.append))
        thread.start()
        while not told and thread.is_alive():  # it ends where its port was taken meanwhile
            time.sleep(0.01)
        try:
            yield bundle
        finally:
            stop.set()
            thread.join()

    return opened


@pytest.fixture(scope="session")
def compiled_package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package `fedveil_compiled`; skips where it cannot be built, or the processor has not what it needs."""
    compiler, source = shutil.which("cc"), Path(__file__).parents[1] / "compiled" / "fedveil_compiled.c"
    include = Path(sysconfig.get_paths()["include"])
    if compiler is None or not sys.platform.startswith("linux") or not (include / "Python.h").exists():
        pytest.skip("needs a C compiler on Linux, and Python's headers")
    library = tmp_path_factory.mktemp("compiled") / "fedveil_compiled.abi3.so"
    said = subprocess.run(
        [compiler, "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{include}", "-o", library, source],
        capture_output=True,
        text=True,
        check=False,
    )
    if "is for x86-64" in said.stderr:
        pytest.skip("needs a processor of the family x86-64")
    assert (said.returncode, said.stderr) == (0, "")
    spec = spec_from_file_location("fedveil_compiled", library)
    assert spec is not None and spec.loader is not None
    try:
        module = module_from_spec(spec)
    except ImportError as error:
        pytest.skip(str(error))
    spec.loader.exec_module(module)
    return module
