"""A character model trained by 100 clients together, with planted PINs, in plain numpy.

Twelve characters of context, embeddings of 8, 96 hidden units (about 13 000 parameters); the text is Python's own
documentation. Six PINs each are planted 1, 4 and 16 times and not at all, every copy at some client.
"""

import numpy as np

from fedveil.privacy.audit.memorisation import Exposure, exposure

CONTEXT, EMBEDDED, HIDDEN, CLIENTS, PER_CLIENT = 12, 8, 96, 100, 120
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;"
REPEATS = (1, 4, 16, 0)
DIGITS = np.array([ALPHABET.index(str(digit)) for digit in range(10)])


def exposures(sigma: float | None, rounds: int, seed: int) -> dict[int, list[Exposure]]:
    """Return PINs' exposure by how often each was planted; `sigma` times a clip of 1 on the sum, or no noise."""
    rng = np.random.default_rng(seed)
    prefixes = [
        "id " + "".join(rng.choice(list("bcdfgjkqvwxz"), 5)) + " is " for _ in range(6 * len(REPEATS))
    ]
    pins = [f"{pin:04d}" for pin in rng.integers(0, 10_000, len(prefixes))]
    model = _train(_clients(prefixes, pins, rng), sigma, rounds, rng)
    found: dict[int, list[Exposure]] = {repeats: [] for repeats in REPEATS}
    for number, (prefix, pin) in enumerate(zip(prefixes, pins, strict=True)):
        losses = _pin_losses(model, prefix)
        others = np.delete(losses, int(pin))
        found[REPEATS[number // 6]].append(exposure(float(losses[int(pin)]), others))
    return found


def _codes(text: str) -> np.ndarray:
    return np.array([ALPHABET.find(char) if char in ALPHABET else 1 for char in text.lower()])


def _windows(text: str) -> tuple[np.ndarray, np.ndarray]:
    codes = _codes(" " * CONTEXT + text)
    views = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)
    return views[:, :-1], views[:, -1]


def _clients(
    prefixes: list[str], pins: list[str], rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    texts = [text[2000 * client :][:PER_CLIENT] for client in range(CLIENTS)]
    for number, (prefix, pin) in enumerate(zip(prefixes, pins, strict=True)):
        for client in rng.choice(CLIENTS, REPEATS[number // 6], replace=False):
            texts[client] += f"\n{prefix}{pin}."
    return [_windows(text) for text in texts]


def _train(clients: list, sigma: float | None, rounds: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Train by Adam on the mean of the clients' mean gradients."""
    size = len(ALPHABET)
    shapes = ((size, EMBEDDED), (CONTEXT * EMBEDDED, HIDDEN), (HIDDEN, size))
    model = [rng.standard_normal(shape) * scale for shape, scale in zip(shapes, (0.3, 0.1, 0.1), strict=True)]
    first, second = ([np.zeros(shape) for shape in shapes] for _ in range(2))
    for number in range(1, rounds + 1):
        total = [np.zeros(shape) for shape in shapes]
        for contexts, targets in clients:
            gradient = _gradient(model, contexts, targets)
            norm = np.sqrt(sum(float((part**2).sum()) for part in gradient))
            factor = 1.0 if sigma is None else min(1.0, 1 / norm)
            total = [old + factor * part for old, part in zip(total, gradient, strict=True)]
        if sigma is not None:
            total = [part + sigma * rng.standard_normal(part.shape) for part in total]
        mean = [part / len(clients) for part in total]
        first = [0.9 * old + 0.1 * part for old, part in zip(first, mean, strict=True)]
        second = [0.99 * old + 0.01 * part**2 for old, part in zip(second, mean, strict=True)]
        for part, one, two in zip(model, first, second, strict=True):
            part -= 0.01 * (one / (1 - 0.9**number)) / (np.sqrt(two / (1 - 0.99**number)) + 1e-8)
    return model


def _likelihoods(model: list[np.ndarray], contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    embedded = model[0][contexts].reshape(len(contexts), -1)
    hidden = np.tanh(embedded @ model[1])
    scores = hidden @ model[2]
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return embedded, hidden, powers / powers.sum(axis=1, keepdims=True)


def _gradient(model: list[np.ndarray], contexts: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    embedded, hidden, error = _likelihoods(model, contexts)
    error[np.arange(len(targets)), targets] -= 1
    error /= len(targets)
    back = (error @ model[2].T) * (1 - hidden**2)
    below = (back @ model[1].T).reshape(-1, EMBEDDED)
    table = np.zeros_like(model[0])
    np.add.at(table, contexts.ravel(), below)
    return [table, embedded.T @ back, hidden.T @ error]


def _pin_losses(model: list[np.ndarray], prefix: str) -> np.ndarray:
    """Return the loss of each of the 10 000 PINs after `prefix`, (10 000,), by one pass a digit."""
    losses = np.zeros(1)
    known = np.zeros((1, 0), np.int64)
    start = _codes(" " * CONTEXT + prefix)
    for _ in range(4):
        contexts = np.hstack([np.tile(start, (len(known), 1)), known])[:, -CONTEXT:]
        digits = -np.log(_likelihoods(model, contexts)[2][:, DIGITS] + 1e-300)
        losses = (losses[:, None] + digits).ravel()
        known = np.hstack([np.repeat(known, 10, axis=0), np.tile(DIGITS, len(known))[:, None]])
    return losses
