"""Calls of a SuperLink's operator."""

import io
import zipfile

from fedveil.links.flower import control_calls


def test_a_run_is_no_app() -> None:
    with zipfile.ZipFile(io.BytesIO(control_calls._app())) as app:
        assert app.namelist() == ["pyproject.toml"]
