"""Parameters with clipped sums: norms of examples, and what an engine leaves on them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedveil.client.dp_sgd.clipped import ClippedParameters


def test_norm_of_an_example_is_of_all_its_gradients() -> None:
    samples = [torch.randn(7, 3, 4), torch.randn(7, 5), torch.randn(7)]
    whole = torch.cat([each.reshape(7, -1) for each in samples], 1).double()
    norms = ClippedParameters([], 1.0).norms(samples)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, whole.norm(dim=1), rtol=1e-6, atol=0)


def test_sums_stay_until_they_are_cleared() -> None:
    parameters: list[Any] = list(nn.Linear(2, 3).parameters())
    clipped = ClippedParameters(parameters, 1.0)
    clipped.write(torch.full_like(p, 2.0) for p in parameters)
    assert all(bool((p.summed_grad == 2).all()) for p in parameters)
    with pytest.raises(ValueError, match="zip"):
        clipped.write([torch.zeros(3, 2)])
    parameters[0].grad = parameters[0].grad_sample = torch.zeros(3, 2)
    clipped.clear()
    assert all(p.grad is p.grad_sample is p.summed_grad is None for p in parameters)


def test_run_by_book_keeping_imports_no_opacus(tmp_path: Path) -> None:
    program = (
        "import sys, fedveil as fv\n"
        "run = fv.simulate('digits', privacy=fv.Record(target_epsilon=3.0), num_rounds=2, quiet=True,"
        " audit='off', folder='run')\n"
        "print(run.status, [each for each in ('opacus', 'sympy') if each in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["completed []"], done.stdout + done.stderr
