"""Pictures of the documents that are computed: `python docs/make_pictures.py` writes them anew."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from fedveil.privacy.accounting.gaussian import gaussian_mu

IMAGES = Path(__file__).parent / "images"
DELTA = 1e-5
EPSILONS = (1.0, 3.0, 8.0)


def guesses() -> Figure:
    """Return what a tester can reach: true against false positives, by epsilon, with Gaussian noise."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    false = np.linspace(0, 1, 400)
    for epsilon, style in zip(EPSILONS, ("-", "--", "-."), strict=True):
        true = norm.cdf(norm.ppf(false) + gaussian_mu(epsilon, DELTA))
        axes.plot(100 * false, 100 * true, style, label=f"epsilon {epsilon:g}")
    axes.plot([0, 100], [0, 100], ":", color="grey", label="a coin")
    axes.set_xlabel("units wrongly called members (%)")
    axes.set_ylabel("members that are recognised (%)")
    axes.set_title("The best test of membership that the noise allows")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    guesses().savefig(IMAGES / "guesses.png", dpi=130, metadata={"Software": None})
