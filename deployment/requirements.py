"""Requirements of a device: a folder of wheels and a lock, with hashes; or, unverified, the local versions.

The owner of a name on a package index can run code on every machine that installs it by that name. A hash binds the name to bytes. The
project owns no name on an index: fedveil itself, and fedveil-privacy, are always files that the operator built.

On aarch64 torch must be 2.10: later wheels for Linux on aarch64 require NVIDIA's CUDA packages, gigabytes that no small
device can use.
"""

import re
import zipfile
from collections.abc import Iterable, Sequence
from email import message_from_string
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion

from ..base.refusal import Refusal
from ..configs.bundle_files import read_file
from ..run.manifest import sha256_of

PACKAGE, PRIVACY = (
    "fedveil",
    "fedveil-privacy",
)  # the second is in the wheel of the first, or, in a release, beside it
WHEELS = "wheels"  # folder of a device's wheels, beside which it installs
HASHES = re.compile(r"\s--hash=sha256:[0-9a-f]{64}(?=\s|$)")
CPU_TORCH = ">=2.10,<2.11"
CUDA = re.compile(r"(nvidia|cuda|triton)\b")
# Environment of a small device, for the markers of requirements.
DEVICE = {"platform_machine": "aarch64", "platform_system": "Linux", "sys_platform": "linux", "extra": ""}
TORCH = (  # for each kind of machine; `version` is the installed one
    f"torch{CPU_TORCH}; platform_machine == 'aarch64'",
    "torch=={version}; platform_machine != 'aarch64'",
)


def installed_requirements(extras: Sequence[str] = ("client",)) -> str:
    """Return pins of the packages that these extras of fedveil need, as installed here, without hashes or fedveil."""
    pins: dict[str, str] = {}
    _pin(PACKAGE, pins, extras)
    torch = pins.pop("torch")
    pins = {name: version for name, version in pins.items() if name not in (PACKAGE, PRIVACY)}
    lines = [
        "# Unverified: these names are bound to no bytes. Install fedveil from the wheel that you built, never by its name."
    ]
    lines += [f"{name}=={version}" for name, version in sorted(pins.items())]
    lines += [line.format(version=torch) for line in TORCH]
    return "\n".join([*lines, ""])


def wheel_requirements(folder: Path, lock: Path | None = None) -> str:
    """Return requirements with hashes: all wheels in `folder`, fedveil's by its file, and the others of a lock.

    Args:
      folder: of wheels. Without a lock it holds all that a device installs, offline.
      lock: requirements with hashes, as `.ci/lock` makes them; a wheel of the folder takes the place of a name in it.

    Raises:
      Refusal: fedveil's wheel is missing, a wheel is of CUDA or, on aarch64, requires it, or a name has no hash.
    """
    # By package and what pip takes, a version, of fedveil a file: the hashes of its wheels, one for each kind of machine.
    wheels: dict[str, dict[str, list[str]]] = {}
    for path in sorted(folder.glob("*.whl")):
        name, version = _device_wheel(path)
        version = f"./{WHEELS}/{path.name}" if name in (PACKAGE, PRIVACY) else f"{name}=={version}"
        wheels.setdefault(name, {}).setdefault(version, []).append(f"--hash=sha256:{sha256_of(path)}")
    lines = [] if lock is None else [line for line in _locked(lock) if _name_of(line) not in wheels]
    for _, versions in sorted(wheels.items()):
        if len(versions) > 1:
            raise Refusal("wheels", str(folder), f"holds {' and '.join(versions)}; keep one of them")
        lines += [" ".join([version, *hashes]) for version, hashes in versions.items()]
    if PACKAGE not in wheels:
        missing = "all that a device needs" if lock is None else "the one that you built"
        raise Refusal("wheels", str(folder), f"holds no wheel of fedveil; collect {missing}")
    (own,) = wheels[PACKAGE]
    names = {canonicalize_name(Requirement(each).name) for each in _requires(folder / Path(own).name)}
    if PRIVACY in names and PRIVACY not in wheels:
        remedy = f"holds no wheel of {PRIVACY}, which its fedveil requires; add it"
        raise Refusal("wheels", str(folder), remedy)
    if PRIVACY in wheels and PRIVACY not in names:
        remedy = f"holds {PRIVACY} beside a fedveil that has the same files; remove it, or take both of one release"
        raise Refusal("wheels", str(folder), remedy)
    return "\n".join([*lines, ""])


def unverified(requirements: str) -> str:
    """Return the first line without a hash, whose content the owner of the package name could change; empty if each has one."""
    return next((line for line in _logical(requirements) if not HASHES.search(line)), "")


def _locked(lock: Path) -> list[str]:
    """Return the lines of a lock; refuse a line without a hash, and fedveil, which is on no index."""
    try:
        text = read_file(lock).decode()
        names = {line: _name_of(line) for line in _logical(text)}
    except (UnicodeDecodeError, InvalidRequirement):
        raise Refusal("lock", str(lock), "lists no requirements; make it with: bash .ci/lock") from None
    if line := unverified(text):
        raise Refusal("lock", str(lock), f"has no hash for {line[:60]!r}; make it with: bash .ci/lock")
    if PACKAGE in names.values():
        raise Refusal("lock", str(lock), "names fedveil, which is on no index; give its wheel in --wheels")
    return list(names)


def _logical(text: str) -> list[str]:
    """Return the requirements in a text, one per line."""
    joined = (line.partition(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines())
    return [" ".join(line.split()) for line in joined if line and not line.startswith("#")]


def _name_of(line: str) -> str:
    """Return the normalised name of the package in a requirement."""
    return canonicalize_name(Requirement(HASHES.sub("", line)).name)


def _device_wheel(path: Path) -> tuple[str, str]:
    """Return name and public version of a wheel; refuse one that is of CUDA, or requires it on aarch64."""
    try:
        name, version, _, tags = parse_wheel_filename(path.name)
    except (InvalidWheelFilename, InvalidVersion):
        raise Refusal("wheels", str(path), "does not have the name of a wheel") from None
    if CUDA.match(name):
        remedy = f"is built for CUDA, which devices do not need; use torch{CPU_TORCH} or a CPU build"
        raise Refusal("wheels", str(path), remedy)
    if any("aarch64" in tag.platform for tag in tags) and (required := cuda_on_device(_requires(path))):
        raise Refusal("wheels", str(path), f"requires {required[0]} on aarch64; use torch{CPU_TORCH}")
    return name, version.public


def _requires(wheel: Path) -> list[str]:
    """Return the requirements that a wheel states, each of which can be parsed."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
            text = archive.read(name).decode()
        return [str(Requirement(each)) for each in message_from_string(text).get_all("Requires-Dist", [])]
    except (zipfile.BadZipFile, StopIteration, UnicodeDecodeError, InvalidRequirement):
        raise Refusal("wheels", str(wheel), "is not a readable wheel; download it again") from None


def cuda_on_device(requires: Iterable[str]) -> list[str]:
    """Return a distribution's requirements of CUDA that apply to Linux on aarch64."""
    requirements = [Requirement(each) for each in requires]
    return [
        each.name
        for each in requirements
        if CUDA.match(each.name) and (each.marker is None or each.marker.evaluate(DEVICE))
    ]


def _pin(name: str, pins: dict[str, str], extras: Iterable[str] = ()) -> None:
    """Add to `pins` the installed versions of `name` and of what it requires with these extras, except CUDA."""
    name = canonicalize_name(name)
    if CUDA.match(name) or (name in pins and not extras):
        return
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:  # for another system than this
        return
    pins[name] = distribution.version.partition("+")[0]
    for line in distribution.requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": each}) for each in ("", *extras)):
            _pin(requirement.name, pins, requirement.extras)
