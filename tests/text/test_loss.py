import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedveil.text import loss
from fedveil.text.loss import IGNORED, mean_loss, products, scores

PEAK = """
import resource, sys
import torch
from fedveil.text import loss
hidden = torch.randn(4, 128, 16, requires_grad=True)
head, targets = torch.randn(49_152, 16), torch.randint(0, 49_152, (4, 128))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss.mean_loss(loss.scores(hidden, head, targets)).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states of 5 texts, a head, and targets, of which one text has none."""
    hidden, head = torch.randn(5, 7, 8), torch.randn(50, 8).to(dtype)
    targets = torch.randint(0, 50, (5, 7))
    targets[1, 3:] = IGNORED
    targets[2] = IGNORED
    return hidden.requires_grad_(), head, targets


def reference(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return each token's loss by torch, shape (n, tokens)."""
    logits = hidden @ head.float().t()
    return cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_values_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    hidden, head, targets = example(dtype)
    monkeypatch.setattr(loss, "LOGIT_BYTES", 4 * len(head) * rows)
    monkeypatch.setattr(loss, "WORDS", 16)
    monkeypatch.setattr(loss, "multiplies_bfloat16", lambda head: False)
    each = scores(hidden, head, targets)
    expected = reference(hidden, head, targets)
    tokens = (targets != IGNORED).sum(1)
    torch.testing.assert_close(each.nats, expected.sum(1))
    assert each.tokens.tolist() == tokens.tolist()
    hits = (hidden @ head.float().t()).argmax(-1) == targets
    assert each.hits.tolist() == hits.sum(1).tolist()

    mean = (expected.sum(1) / tokens.clamp(min=1)).mean()
    torch.testing.assert_close(mean_loss(each), mean)
    own, other = (torch.autograd.grad(value, hidden)[0] for value in (mean_loss(each), mean))
    torch.testing.assert_close(own, other)


def test_products_of_bfloat16_round_gradients_little(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = example(torch.bfloat16)
    monkeypatch.setattr(loss, "multiplies_bfloat16", lambda head: True)
    rounded = torch.autograd.grad(mean_loss(scores(hidden, head, targets)), hidden)[0]
    monkeypatch.setattr(loss, "multiplies_bfloat16", lambda head: False)
    exact = torch.autograd.grad(mean_loss(scores(hidden, head, targets)), hidden)[0]
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


def test_metrics_are_computed_in_float32() -> None:
    hidden, head, targets = example(torch.bfloat16)
    with torch.no_grad():
        each = scores(hidden, head, targets)
    torch.testing.assert_close(each.nats, reference(hidden, head, targets).sum(1))


def test_a_target_that_is_predicted_is_a_hit() -> None:
    hidden, head, _ = example()
    best = (hidden @ head.t()).argmax(-1)
    assert scores(hidden, head, best).hits.tolist() == [7] * 5


def test_large_logits_give_finite_losses() -> None:
    hidden, head, targets = example()
    large = (1e4 * hidden).detach().requires_grad_()
    each = scores(large, head, targets)
    torch.testing.assert_close(each.nats, reference(large, head, targets).sum(1))
    assert torch.autograd.grad(mean_loss(each), large)[0].isfinite().all()


def test_texts_without_targets_have_no_loss() -> None:
    hidden, head, targets = example()
    each = scores(hidden, head, torch.full_like(targets, IGNORED))
    assert float(mean_loss(each).detach()) == 0
    assert not torch.autograd.grad(mean_loss(each), hidden)[0].any()


def test_a_loss_does_not_depend_on_other_texts() -> None:
    hidden, head, targets = example()
    together = scores(hidden, head, targets).nats
    alone = torch.cat([scores(hidden[[n]], head, targets[[n]]).nats for n in range(5)])
    assert torch.equal(together, alone)


def test_logits_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return products(states, head)

    monkeypatch.setattr(loss, "products", counted)
    monkeypatch.setattr(loss, "LOGIT_BYTES", 4 * 50 * 16)
    hidden, head, targets = example()
    scores(hidden.repeat(4, 1, 1), head, targets.repeat(4, 1))
    assert len(sizes) > 4 and set(sizes) == {16}


def test_logits_are_never_whole_in_memory() -> None:
    whole = 4 * 128 * 49_152 * 4 / 2**20  # 96 MiB
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.75 * whole
