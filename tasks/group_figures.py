"""Figures of a model by group on public held-out data: its accuracy, and its rates of the second class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..configs.round_line import GROUPS

if TYPE_CHECKING:
    from torch import Tensor


def group_figures(
    outputs: Tensor, targets: Tensor, groups: Mapping[str, Tensor], words: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return by name each group's accuracy and, with two classes, its rates; a group without such rows has none.

    A numeric label has none either.

    Args:
      outputs: logits, shape (n, classes).
      targets: classes, shape (n,).
      groups: by attribute the number of each row's group, shape (n,), -1 where it is unknown.
      words: the groups of each attribute.
    """
    if outputs.dim() != 2 or targets.is_floating_point():
        return {}
    said, found = outputs.argmax(-1).cpu(), dict[str, float]()
    truth = targets.cpu()
    for attribute, codes in groups.items():
        for code, word in enumerate(words[attribute]):
            here = codes.cpu() == code
            rates = {"accuracy": (said == truth, here)}
            if outputs.shape[-1] == 2:
                rates |= {
                    "true positive rate": (said == 1, here & (truth == 1)),
                    "false positive rate": (said == 1, here & (truth == 0)),
                    "selection rate": (said == 1, here),
                }
            for name, (hit, asked) in rates.items():
                if bool(asked.any()):
                    found[f"{GROUPS}{attribute}={word}/{name}"] = float(hit[asked].double().mean())
    return found
