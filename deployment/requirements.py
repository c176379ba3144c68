"""Requirements of a device: the versions that run here, or the wheels of a folder with their hashes.

On aarch64 torch must be 2.10: later wheels for Linux on aarch64 require NVIDIA's CUDA packages, gigabytes that no small
device can use.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from email import message_from_string
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion

from ..privacy.refusal import Refusal

CPU_TORCH = ">=2.10,<2.11"
CUDA = re.compile(r"(nvidia|cuda|triton)\b")
DEVICE = {"platform_machine": "aarch64", "platform_system": "Linux", "sys_platform": "linux", "extra": ""}
TORCH = (
    f"torch{CPU_TORCH}; platform_machine == 'aarch64'",
    "torch=={version}; platform_machine != 'aarch64'",
)


def installed_requirements(extras: Sequence[str] = ("client",)) -> str:
    """Pins of fedveil and of all that these extras need, as installed here; without hashes, which only wheels have."""
    pins: dict[str, str] = {}
    _pin("fedveil", pins, extras)
    torch = pins.pop("torch")
    lines = ["# Pins only: fedveil provision --wheels FOLDER adds hashes."]
    lines += [f"{name}=={version}" for name, version in sorted(pins.items())]
    lines += [line.format(version=torch) for line in TORCH]
    return "\n".join([*lines, ""])


def wheel_requirements(folder: Path) -> str:
    """Pins, each with its hash, of all wheels in `folder`, which hold what a device installs offline.

    Raises:
      Refusal: there are none, fedveil's is missing, or one is of CUDA or, on aarch64, requires it.
    """
    hashes: dict[str, dict[str, list[str]]] = {}
    for path in sorted(folder.glob("*.whl")):
        name, version = _device_wheel(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        hashes.setdefault(name, {}).setdefault(version, []).append(f"--hash=sha256:{digest}")
    lines: list[str] = []
    for name, versions in sorted(hashes.items()):
        if len(versions) > 1:
            raise Refusal("wheels", str(folder), f"holds {name} {' and '.join(versions)}; keep one of them")
        lines += [" ".join([f"{name}=={version}", *each]) for version, each in versions.items()]
    if "fedveil" not in hashes:
        raise Refusal("wheels", str(folder), "holds no wheel of fedveil; collect all that a device needs")
    return "\n".join([*lines, ""])


def _device_wheel(path: Path) -> tuple[str, str]:
    """Return name and public version of a wheel that brings no CUDA along."""
    try:
        name, version, _, tags = parse_wheel_filename(path.name)
    except (InvalidWheelFilename, InvalidVersion):
        raise Refusal("wheels", str(path), "is not named as a wheel is") from None
    if CUDA.match(name):
        remedy = f"is of CUDA, which no device needs; take torch{CPU_TORCH} or a CPU build"
        raise Refusal("wheels", str(path), remedy)
    if any("aarch64" in tag.platform for tag in tags):
        _refuse_cuda(path)
    return name, version.public


def _refuse_cuda(wheel: Path) -> None:
    """Refuse a wheel that, installed on Linux on aarch64, would bring CUDA along."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
            text = archive.read(name).decode()
        bringing = cuda_on_device(message_from_string(text).get_all("Requires-Dist", []))
    except (zipfile.BadZipFile, StopIteration, UnicodeDecodeError, InvalidRequirement):
        raise Refusal("wheels", str(wheel), "is no wheel that can be read; fetch it again") from None
    if bringing:
        raise Refusal("wheels", str(wheel), f"requires {bringing[0]} on aarch64; take torch{CPU_TORCH}")


def cuda_on_device(requires: Iterable[str]) -> list[str]:
    """Those of a distribution's requirements that are of CUDA and hold for Linux on aarch64."""
    asked = [Requirement(each) for each in requires]
    return [
        each.name
        for each in asked
        if CUDA.match(each.name) and (each.marker is None or each.marker.evaluate(DEVICE))
    ]


def _pin(name: str, pins: dict[str, str], extras: Iterable[str] = ()) -> None:
    """Add the installed version of `name`, and of what it needs with these extras."""
    name = canonicalize_name(name)
    if CUDA.match(name) or (name in pins and not extras):
        return
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:  # for another system than this
        return
    pins[name] = found.version.partition("+")[0]
    for line in found.requires or []:
        asked = Requirement(line)
        if asked.marker is None or any(asked.marker.evaluate({"extra": each}) for each in ("", *extras)):
            _pin(asked.name, pins, asked.extras)
