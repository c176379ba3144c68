"""Eligibility of a device to train: power, temperature, memory, network and hours, read from the system's files.

Linux only. A missing file sets no condition: a board without a battery is on mains power.
"""

import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from .client_bundle import Eligibility

ROOT = Path("/")
DEFAULT_ROUTE = "00000000"  # destination of the default route in /proc/net/route
POINT_TO_POINT = "512"  # ARPHRD_PPP of linux/if_arp.h: a modem
EXTERNAL = ("Mains", "USB")  # types of a charger
NOT_DRAINING = ("Charging", "Full", "Not charging")  # states of a battery


def obstacle(eligibility: Eligibility, now: datetime, root: Path = ROOT) -> str:
    """Return a short reason why the device may not train; empty if it may."""
    return next(_obstacles(eligibility, now, root), "")


def _obstacles(eligibility: Eligibility, now: datetime, root: Path) -> Iterator[str]:
    if eligibility.hours is not None and not _within(now.hour, *map(int, eligibility.hours.split("-"))):
        yield f"outside the hours {eligibility.hours}"
    if eligibility.on_mains_power and not _on_mains_power(root):
        yield "on battery"
    hottest, limit = _hottest_celsius(root), eligibility.max_temperature_celsius
    if limit is not None and hottest > limit:
        yield f"{hottest:.0f} degrees, above {limit:g}"
    free = _free_mebibytes(root)
    if free < eligibility.min_free_mebibytes:
        yield f"{free} MiB of memory free, below {eligibility.min_free_mebibytes}"
    if eligibility.unmetered and _over_modem(root):
        yield "on a metered network"


def _within(hour: int, start: int, end: int) -> bool:
    """Return whether an hour is from `start` to before `end`; across midnight if `end` is not later."""
    return start <= hour < end if start < end else hour >= start or hour < end


def _on_mains_power(root: Path) -> bool:
    """Return whether a charger is plugged in, or no battery drains."""
    supplies = list(root.glob("sys/class/power_supply/*"))
    kinds = {supply: _text(supply / "type") for supply in supplies}
    if any(kind in EXTERNAL and _text(supply / "online") == "1" for supply, kind in kinds.items()):
        return True
    batteries = [supply for supply, kind in kinds.items() if kind == "Battery"]
    return all(_text(battery / "status") in NOT_DRAINING for battery in batteries)


def _hottest_celsius(root: Path) -> float:
    """Return the temperature of the hottest thermal zone; minus infinity if none can be read."""
    readings = [_text(zone) for zone in root.glob("sys/class/thermal/thermal_zone*/temp")]
    return max((int(text) / 1000 for text in readings if text.lstrip("-").isdigit()), default=-math.inf)


def _free_mebibytes(root: Path) -> float:
    """Return the memory that programs can still get; infinity if it cannot be read."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return math.inf


def _over_modem(root: Path) -> bool:
    """Return whether the default route uses a mobile modem; the system's files show no other metered network."""
    routes = [line.split() for line in _text(root / "proc/net/route").splitlines()[1:]]
    for interface in (route[0] for route in routes if len(route) > 1 and route[1] == DEFAULT_ROUTE):
        folder = root / "sys/class/net" / interface
        if "DEVTYPE=wwan" in _text(folder / "uevent") or _text(folder / "type") == POINT_TO_POINT:
            return True
    return False


def _text(path: Path) -> str:
    """Return the text of a system's file; empty if there is none."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
