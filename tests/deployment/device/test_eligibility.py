"""Conditions under which a device trains, read from the system's files."""

from datetime import datetime

import pytest

from fedveil.deployment.device.client_bundle import Eligibility
from fedveil.deployment.device.eligibility import obstacle

NIGHT, NOON = datetime(2026, 3, 1, 23), datetime(2026, 3, 1, 12)
BATTERY, CHARGER = "sys/class/power_supply/BAT0/", "sys/class/power_supply/AC/"
HEAT, MEMORY = "sys/class/thermal/thermal_zone{}/temp", "proc/meminfo"
ROUTES, MODEM = "proc/net/route", "sys/class/net/wwan0/uevent"
ROUTE = "Iface\tDestination\tGateway\n{}\t00000000\t0100A8C0"


@pytest.mark.parametrize(
    ("conditions", "files", "reason"),
    [
        ({"on_mains_power": True}, {}, None),
        (
            {"on_mains_power": True},
            {BATTERY + "type": "Battery", BATTERY + "status": "Discharging"},
            "battery",
        ),
        ({"on_mains_power": True}, {BATTERY + "type": "Battery", BATTERY + "status": "Full"}, None),
        (
            {"on_mains_power": True},
            {
                BATTERY + "type": "Battery",
                BATTERY + "status": "Discharging",
                CHARGER + "type": "Mains",
                CHARGER + "online": "1",
            },
            None,
        ),
        ({}, {BATTERY + "type": "Battery", BATTERY + "status": "Discharging"}, None),
        ({"max_temperature_celsius": 75.0}, {HEAT.format(0): "41000", HEAT.format(1): "76500"}, "76 degrees"),
        ({"max_temperature_celsius": 77.0}, {HEAT.format(0): "41000", HEAT.format(1): "76500"}, None),
        ({"max_temperature_celsius": 20.0}, {HEAT.format(0): "unknown"}, None),
        ({"min_free_mebibytes": 600}, {MEMORY: "MemTotal: 9 kB\nMemAvailable:  524288 kB"}, "512 MiB"),
        ({"min_free_mebibytes": 512}, {MEMORY: "MemTotal: 9 kB\nMemAvailable:  524288 kB"}, None),
        ({"unmetered": True}, {ROUTES: ROUTE.format("wwan0"), MODEM: "DEVTYPE=wwan"}, "metered"),
        ({"unmetered": True}, {ROUTES: ROUTE.format("eth0"), MODEM: "DEVTYPE=wwan"}, None),
        ({"hours": "22-06"}, {}, None),
        ({"hours": "06-22"}, {}, "06-22"),
        ({"hours": "23-00"}, {}, None),
    ],
)
def test_conditions_are_read_from_the_systems_files(tmp_path, conditions, files, reason):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    obstacle_in_words = obstacle(Eligibility(**conditions), NIGHT, tmp_path)
    assert bool(obstacle_in_words) == (reason is not None) and (reason or "") in obstacle_in_words


def test_hours_of_the_day_and_across_midnight():
    assert obstacle(Eligibility(hours="22-06"), NOON)
    assert not obstacle(Eligibility(hours="09-17"), NOON)
