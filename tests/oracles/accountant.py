"""Epsilons that other software and other people arrived at; nothing here is computed by fedveil."""

from typing import NamedTuple


class Row(NamedTuple):
    """One Poisson-sampled Gaussian run under add-or-remove-one, and what four accountants say of it."""

    name: str
    sample_rate: float
    noise_multiplier: float
    rounds: int
    delta: float
    pld: float  # dp_accounting 0.6, interval 1e-4
    rdp: float  # dp_accounting 0.6
    opacus_prv: float  # opacus 1.6, upper bound with eps_error 0.01
    lowest: float  # prv_accountant 0.2, eps_error 0.001: certified bracket
    highest: float


INF = float("inf")

ROWS = [
    Row("A", 0.01, 1.0, 1000, 1e-5, 1.8282, 2.1014, 1.8384, 1.8271, 1.8294),
    Row("B", 0.01, 4.0, 10000, 1e-5, 0.9470, 1.0355, 0.9569, 0.9458, 0.9479),
    Row("C", 256 / 60000, 1.1, 3515, 1e-5, 1.1337, 1.2811, 1.1438, 1.1326, 1.1348),
    Row("D", 256 / 60000, 1.1, 7031, 1e-5, 1.6361, 1.7933, 1.6462, 1.6350, 1.6372),
    Row("E", 256 / 60000, 1.1, 10546, 1e-5, 2.0358, 2.2239, 2.0459, 2.0346, 2.0369),
    Row("F", 256 / 60000, 1.1, 14062, 1e-5, 2.3817, 2.5966, 2.3917, 2.3805, 2.3827),
    Row("G", 250 / 60000, 1.3, 3600, 1e-5, 0.8530, 0.9422, 0.8630, 0.8519, 0.8540),
    Row("H", 1e-4, 1.0, 1500, 1e-6, 0.0188, 0.5860, 0.0283, 0.0171, 0.0191),
    Row("I", 1e-4, 1.0, 1500, 1e-9, 0.0371, 0.9923, 0.0468, 0.0358, 0.0378),
    Row("J", 1000 / 342477, 0.8, 1600, 1e-6, 1.4389, 2.1400, 1.4491, 1.4378, 1.4401),
    Row("K", 100 / 3400, 1.0, 1500, 1 / 3400, 5.9684, 6.6974, 5.9789, 5.9670, 5.9699),
    Row("L", 0.5, 5.0, 50, 1e-5, 3.0413, 3.3098, 3.0514, 3.0401, 3.0424),
    Row("M", 1.0, 10.0, 100, 1e-5, 4.3772, 4.7285, 4.3874, 4.3759, 4.3784),
    Row("N", 4096 / 50000, 3.0, 2500, 1e-5, 6.5789, 7.0985, 6.5892, 6.5776, 6.5802),
    Row("O", 32 / 500, 1.0, 160, 1e-5, 5.5533, 6.2452, 5.5637, 5.5520, 5.5547),
    Row("P", 1e-3, 0.5, 10000, 1e-5, 5.2268, 6.4184, 5.2373, 5.2253, 5.2283),
    Row("Q", 0.1, 0.7, 100, 1e-5, 14.5924, 16.4394, 14.6033, -INF, INF),  # prv_accountant raises
]

# A ledger of several kinds, as (sample rate, noise multiplier, rounds), at delta 1e-5; rate 1 is unsampled.
MIXED = [(0.01, 1.0, 500), (0.02, 1.2, 300), (1.0, 20.0, 4)]
MIXED_PLD, MIXED_RDP = 2.03043, 2.28060


class Published(NamedTuple):
    """Epsilon as printed, from RDP by the classic conversion rdp - log(delta) / (order - 1)."""

    source: str
    sample_rate: float
    noise_multiplier: float
    rounds: int
    delta: float
    epsilon: float
    integer_orders: bool = False


PUBLISHED = [
    Published("Abadi et al. 2016, section 5.1", 0.01, 4.0, 10000, 1e-5, 1.26),
    Published("Opacus, MNIST README", 0.004, 1.3, 3750, 1e-5, 1.16),
    Published("Opacus, MNIST README", 0.004, 1.1, 15000, 1e-5, 2.91),
    Published("Opacus, MNIST README", 0.004, 0.7, 11250, 1e-5, 6.86),
    Published("TensorFlow Privacy, MNIST tutorial", 256 / 60000, 1.12, 14062, 1e-5, 2.92),
    Published("McMahan et al. 2018, table 1", 5000 / 763430, 1.0, 5000, 1e-9, 4.634, integer_orders=True),
]

# Gboard's first model with a guarantee: zCDP rho 0.81 at delta 1e-10, announced as epsilon 8.9.
GBOARD_RHO, GBOARD_DELTA, GBOARD_RDP, GBOARD_EXACT = 0.81, 1e-10, 8.922, 8.549
