"""File of questions: YAML, read within its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml

from ..privacy.refusal import Refusal
from .yaml_guard import check_file

COSTS = ("epsilon", "noise_multiplier")  # keys that clients do not see


def read_question_file(path: Path) -> dict[str, Any]:
    """Return the keys of a YAML file of questions, as they stand.

    Args:
      path: of the file.

    Raises:
      Refusal: it cannot be read, or is no group of keys.
    """
    try:
        check_file(path)
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Refusal("questions", str(path), f"cannot be read as YAML ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise Refusal("questions", str(path), "is no group of keys: name, records and ask")
    return {str(key): value for key, value in cast(dict[Any, Any], found).items()}
