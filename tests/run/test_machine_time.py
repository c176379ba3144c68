"""Time and energy of a run: counters of the processors where they can be read, and nothing where they cannot be believed."""

from pathlib import Path

import pytest

from fedveil.run.machine_time import Counter, Moment, time_since


def write(folder: Path, name: str, joules: float, turns: float = 200_000.0) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{int(turns * 1e6)}\n")


def moment(wall: float, **counters: float) -> Moment:
    shown = {name.replace("_", "-rapl:"): Counter(each, 200_000.0) for name, each in counters.items()}
    return Moment(wall, 0.0, shown)


def now() -> float:
    return time_since(Moment(0.0, 0.0)).wall


def test_energy_is_that_of_all_processors_and_of_no_part_twice(tmp_path: Path) -> None:
    write(tmp_path, "intel-rapl:0", 150.0)
    write(tmp_path, "intel-rapl:1", 20.0)  # has begun again since
    write(tmp_path, "intel-rapl:0:0", 70.0)  # the cores of the first
    used = time_since(moment(now() - 60, intel_0=100.0, intel_1=199_990.0), tmp_path)
    assert used.joules == pytest.approx(50.0 + 30.0) and used.wall == pytest.approx(60, abs=5)


def test_a_counter_that_may_have_turned_over_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path, "intel-rapl:0", 150.0)
    assert time_since(moment(now() - 60, intel_0=100.0), tmp_path).joules == pytest.approx(50.0)
    assert time_since(moment(now() - 300, intel_0=100.0), tmp_path).joules is None


def test_unreadable_counter_is_no_value(tmp_path: Path) -> None:
    assert time_since(moment(now()), tmp_path / "none").joules is None
    write(tmp_path, "intel-rapl:0", 150.0)
    assert time_since(moment(now()), tmp_path).joules is None  # it was not readable when the run began
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("many")
    assert time_since(moment(now(), intel_0=1.0), tmp_path).joules is None


@pytest.mark.campaign
@pytest.mark.filterwarnings("default")
def test_energy_is_that_of_codecarbon_on_the_same_run(tmp_path: Path) -> None:
    codecarbon = pytest.importorskip("codecarbon")
    import fedveil as fv
    from fedveil.evidence.content import report_of
    from fedveil.run.run_files import read_run

    plain = {"quiet": True, "privacy": fv.NoPrivacy()}
    fv.simulate(
        "digits", folder=tmp_path / "before", num_rounds=1, **plain
    )  # what is imported is no part of a run
    tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code="FRA",
        tracking_mode="process",
        measure_power_secs=1,
        save_to_file=False,
        log_level="error",
        force_mode_cpu_load=True,
    )
    tracker.start()
    fv.simulate("digits", folder=tmp_path / "run", num_rounds=400, **plain)
    tracker.stop()
    processor = next(each for each in tracker._hardware if hasattr(each, "_tdp"))
    watts_of_thread = processor._tdp / processor._cpu_count
    theirs = (
        1000 * tracker.final_emissions_data.cpu_energy * 4.0 / watts_of_thread
    )  # at the same watts, in Wh
    ours = next(
        each["value"]
        for each in report_of(read_run(tmp_path / "run"))["cost"]["work"]
        if each["what"].startswith("energy")
    )
    assert ours == pytest.approx(theirs, rel=0.1)
