"""Examination of this machine: versions and extras, processor, clock, and access to ledgers."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from ..base.extras import MODULES, require_extra
from ..base.refusal import Refusal
from ..privacy.ledger.caps import default_folder
from ..privacy.mechanisms import discrete_gaussian
from ..privacy.secagg import masks
from ..run.display import hanging

WRONG = 1
# Processor flags of x86 and of ARM, by the name of the feature.
FEATURES = {"AES": ("aes",), "AVX2": ("avx2",), "AVX-512": ("avx512f",), "NEON": ("asimd", "neon")}
NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "fuse.sshfs", "9p", "ceph", "glusterfs")
FUTURE_SECONDS = 120.0  # tolerance for files that are newer than the clock says


@dataclass(frozen=True)
class Diagnosis:
    """Result of one check.

    Attributes:
      subject: what was checked.
      ok: whether it passed; None for information.
      finding: result in words, with the remedy if the check failed.
    """

    subject: str
    ok: bool | None
    finding: str


def doctor(choices: Sequence[str], as_json: bool) -> int:
    """Print what this machine has and lacks; return the exit code, 1 if something is wrong or a choice cannot run.

    Args:
      choices: options to try, such as ``task=heart``, ``engine=ray``, ``link=flower``.
      as_json: print a list of findings as JSON.

    Raises:
      Refusal: a word is no option of these groups.
    """
    trials = [_trial(word) for word in choices]
    findings = [
        *_python(),
        *_extras(),
        *_machine(),
        *_torch(),
        _clock(),
        *_ledgers(),
        *(each() for each in trials),
    ]
    wrong = sum(each.ok is False for each in findings)
    if as_json:
        fields = [{"subject": each.subject, "ok": each.ok, "said": each.finding} for each in findings]
        print(json.dumps(fields, indent=1))
        return WRONG if wrong else 0
    width = max(len(each.subject) for each in findings)
    marks = {True: "ok", False: "WRONG", None: ""}
    for each in findings:
        print(hanging(f"{marks[each.ok]:<5}  {each.subject:<{width}}  ", each.finding))
    print(f"{wrong} wrong" if wrong else "nothing is wrong")
    return WRONG if wrong else 0


def _python() -> Iterator[Diagnosis]:
    """Check Python, and that the packages that fedveil requires without extras are installed."""
    yield Diagnosis("fedveil", None, f"{version('fedveil')}, in {Path(__file__).parents[1]}")
    yield Diagnosis("python", sys.version_info >= (3, 11), f"{platform.python_version()}, {sys.executable}")
    for line in requires("fedveil") or []:
        if "extra ==" not in line:
            name = re.split(r"[<>=!~;\[ ]", line)[0]
            release = _version(name)
            yield Diagnosis(name, release is not None, release or f"is not installed: pip install '{name}'")


def _extras() -> Iterator[Diagnosis]:
    for extra, modules in MODULES.items():
        missing = [name for name in modules if not find_spec(name)]
        remedy = f"lacks {', '.join(missing)}: pip install 'fedveil[{extra}]'"
        yield Diagnosis(f"extra {extra}", None, remedy if missing else "installed")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Iterator[Diagnosis]:
    """Report the build of torch: CUDA takes gigabytes that a machine without a GPU does not use. torch is not imported."""
    spec = find_spec("torch")
    if not spec or not spec.origin:
        return
    text = (Path(spec.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda\b[^=]*= *[\"']([^\"']+)", text, re.MULTILINE)  # None for CPUs alone
    if match is None:
        yield Diagnosis("torch's build", True, "CPU only")
    elif _has_gpu():
        yield Diagnosis("torch's build", True, f"with CUDA {match[1]}")
    else:
        remedy = (
            "pip install torch --index-url https://download.pytorch.org/whl/cpu needs 1.2 GB instead of 5.7"
        )
        yield Diagnosis("torch's build", None, f"with CUDA {match[1]}, but there is no GPU: {remedy}")


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or bool(shutil.which("nvidia-smi"))


def _machine() -> Iterator[Diagnosis]:
    """Report the processor, and which implementations of masks and noise it uses; check that it has AES."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Diagnosis("processor", None, f"{platform.machine()}, {cores} cores for this process")
    flags = _flags()
    faster = {"avx512bw", "avx512vl", "vaes"} <= flags
    remedy = "; pip install ./compiled in a checkout: twice as fast" if faster else ""
    masks_source = "from fedveil-compiled" if masks.compiled() else "from cryptography" + remedy
    yield Diagnosis("masks", None, masks_source)
    noise_source = "from fedveil-compiled" if discrete_gaussian.compiled() else "from NumPy" + remedy
    yield Diagnosis("noise", None, noise_source)
    if not flags:
        return
    features = [name for name, names in FEATURES.items() if flags.intersection(names)]
    yield Diagnosis("instructions", None, ", ".join(features) or "none of AES, AVX2, AVX-512, NEON")
    remedy = "no AES instructions: secure aggregation is slow; use secagg.suite=4"
    yield Diagnosis("AES", "AES" in features, "in the processor" if "AES" in features else remedy)


def _flags() -> set[str]:
    """Return the processor's flags; none if the system does not list them."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("flags", "features")):
                return set(line.partition(":")[2].split())
    return set()


def _clock() -> Diagnosis:
    """Compare the clock with the newest of fedveil's own files, which were written in the past."""
    now = time.time()
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    clock = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if now < newest - FUTURE_SECONDS:
        remedy = "is before fedveil was installed; set the clock, which certificates need"
        return Diagnosis("clock", False, f"{clock} {remedy}")
    synchronized = Path("/run/systemd/timesync/synchronized").exists()
    return Diagnosis("clock", True, f"{clock}{', synchronized' if synchronized else ''}")


def _ledgers() -> Iterator[Diagnosis]:
    """Check the folder of the ledgers: whether it can be created, who may read or replace them, and its disk."""
    folder = default_folder()
    if not os.path.exists(folder):  # Path.exists would raise in a home that may not be entered
        above = next(each for each in folder.parents if os.path.exists(each))
        if os.access(above, os.W_OK):
            text = f"{folder}: does not exist yet; the first run on real data creates it"
            yield Diagnosis("ledgers", None, text)
        else:
            remedy = f"cannot be created because {above} is not writable: set HOME or ledger.dir"
            yield Diagnosis("ledgers", False, f"{folder}: {remedy}")
        return
    count = len(list(folder.glob("*.ledger")))
    mode, others = folder.stat().st_mode, stat.S_IRWXG | stat.S_IRWXO
    others_enter = bool(mode & (stat.S_IXGRP | stat.S_IXOTH))
    others_read = others_enter and any(path.stat().st_mode & others for path in folder.iterdir())
    if others_read or mode & (stat.S_IWGRP | stat.S_IWOTH):
        remedy = f"other users may read or replace them: chmod -R go= {folder}"
        yield Diagnosis("ledgers", False, f"{count} in {folder}; {remedy}")
    else:
        yield Diagnosis("ledgers", True, f"{count} in {folder}; only their owner may read them")
    kind = _file_system(folder)
    if kind.startswith(NETWORK_FILE_SYSTEMS):
        remedy = f"is {kind}, which may lose locks; set ledger.dir to a local disk"
        yield Diagnosis("ledger disk", False, remedy)


def _file_system(folder: Path) -> str:
    """Return the type of the file system that holds a folder; empty if the system does not say."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    path = str(folder.resolve())
    around = [(len(mount), kind) for mount, kind in mounts if path.startswith(mount)]
    return max(around)[1] if around else ""  # of the longest mount point, which is the innermost


def _trial(word: str) -> Callable[[], Diagnosis]:
    """Check a word, ``group=option``; return a function that tries the option, called when all words have been checked."""
    group, _, option = word.partition("=")
    if group not in TRIALS:
        raise Refusal("doctor", word, "give task=..., engine=... or link=...")
    options = sorted(path.stem for path in (Path(__file__).parents[1] / "configs" / group).glob("*.yaml"))
    if option not in options:
        raise Refusal(group, option, f"choose one of {', '.join(options)}")
    return lambda: TRIALS[group](option)


def _try_task(option: str) -> Diagnosis:
    """Load a shipped task, with its data."""
    subject = f"task={option}"
    if option == "custom":
        text = "is your own task: try it with fedveil plan task=custom task.target=module:Class"
        return Diagnosis(subject, None, text)
    try:
        from ..tasks import load_task

        task = load_task(option)
    except Refusal as refusal:
        return Diagnosis(subject, False, refusal.remedy)
    except ModuleNotFoundError as missing:
        return Diagnosis(subject, False, f"needs {missing.name}: pip install 'fedveil[simulation]'")
    return Diagnosis(subject, True, f"{task.num_clients} clients")


def _try_engine(option: str) -> Diagnosis:
    return _needs(f"engine={option}", "ray" if option == "ray" else "simulation")


def _try_link(option: str) -> Diagnosis:
    if option == "flower" and not shutil.which("flower-superlink"):
        return Diagnosis("link=flower", False, "needs flower-superlink on the PATH: pip install flwr")
    return _needs(f"link={option}", "server")


def _needs(subject: str, extra: str) -> Diagnosis:
    """Check that an extra is installed, without which the subject cannot run."""
    try:
        require_extra(extra, subject)
    except Refusal as refusal:
        return Diagnosis(subject, False, refusal.remedy)
    return Diagnosis(subject, True, "can run")


TRIALS: dict[str, Callable[[str], Diagnosis]] = {"task": _try_task, "engine": _try_engine, "link": _try_link}
