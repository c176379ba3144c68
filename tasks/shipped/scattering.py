"""Scattering features of small images: two layers of fixed wavelets, averaged at places four pixels apart.

Bruna and Mallat 2013 (arXiv:1203.1513); the wavelets are those of kymatio (Andreux et al. 2020, arXiv:1812.11214) with
J = 2 and 8 angles. Nothing is learned, so they cost no privacy (Tramèr and Boneh 2021, arXiv:2011.11660). Each image is
processed separately.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCALES, ANGLES = 2, 8
STRIDE = 2**SCALES
# The second layer goes from the fine scale to the coarse one.
CHANNELS = 1 + SCALES * ANGLES + ANGLES * ANGLES
GROUPS = 27  # of three channels each, as in Tramèr and Boneh's table of group normalisation
TINY = 1e-5  # added to a variance

# Width of a wavelet, in pixels at the fine scale.
WIDTH = 0.8
FREQUENCY = 3 * math.pi / 4  # radians a pixel, at the fine scale
SLANT = 4 / ANGLES  # width of a wavelet along its wave over that across it
AVERAGE = 0.8 * 2 ** (SCALES - 1)  # standard deviation of the averaging Gaussian, in pixels


def features(images: Tensor, batch: int = 25) -> Tensor:
    """Return each image's normalised coefficients, shape (n, CHANNELS * (h / 4) * (w / 4)) float16.

    Args:
      images: grey, shape (n, h, w), values 0 to 1; h and w are multiples of 4.
      batch: images at a time.
    """
    bank = Wavelets(images.shape[1], images.shape[2])
    return torch.cat([normalised(bank(part)).half() for part in images.split(batch)])


def normalised(coefficients: Tensor) -> Tensor:
    """Return coefficients, shape (n, CHANNELS, rows, columns), with each of an image's GROUPS scaled, shape (n, numbers).

    A group has mean zero and variance one.
    """
    groups = coefficients.unflatten(1, (GROUPS, -1)).flatten(2)
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    return ((groups - mean) / (variance + TINY).sqrt()).flatten(1)


class Wavelets:
    """Wavelet bank for images of one size, which are mirrored at their edges.

    Args:
      height: of an image, a multiple of 4.
      width: of an image, a multiple of 4.
    """

    def __init__(self, height: int, width: int) -> None:
        self.padded = height + 2 * STRIDE, width + 2 * STRIDE
        angles = [(ANGLES / 2 - 1 - turn) * math.pi / ANGLES for turn in range(ANGLES)]
        waves = [[_wavelet(self.padded, scale, angle) for angle in angles] for scale in range(SCALES)]
        self.fine, self.coarse = (torch.stack(each) for each in waves)  # transforms, (ANGLES, *padded)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the coefficients of images of shape (n, h, w), shape (n, CHANNELS, h / 4, w / 4)."""
        mirrored = torch.nn.functional.pad(images[:, None], (STRIDE,) * 4, mode="reflect")
        fourier = torch.fft.fft2(mirrored)
        fine = torch.fft.ifft2(fourier * self.fine).abs()
        coarse = torch.fft.ifft2(_every_second(fourier * self.coarse)).abs()
        fourier = torch.fft.fft2(fine)[:, :, None] * self.coarse  # each fine channel by each coarse wavelet
        second = torch.fft.ifft2(_every_second(fourier)).abs().flatten(1, 2)
        averages = [_averaged(each, STRIDE) for each in (mirrored, fine)]
        return torch.cat([*averages, *(_averaged(each, STRIDE // 2) for each in (coarse, second))], 1)


def _every_second(fourier: Tensor) -> Tensor:
    """Return, for an image's Fourier transform, that of the image subsampled to every second row and column."""
    rows, columns = fourier.shape[-2:]
    folded = fourier.unflatten(-1, (2, columns // 2)).mean(-2)
    return folded.unflatten(-2, (2, rows // 2)).mean(-3)


def _averaged(images: Tensor, stride: int) -> Tensor:
    """Return Gaussian averages in places `stride` pixels apart, without those of the mirrored edge.

    Args:
      images: shape (n, channels, rows, columns).
      stride: STRIDE divided by the factor by which the images are coarser than the input.
    """
    down, across = (_places(size, stride) for size in images.shape[-2:])
    return down @ images @ across.T


def _places(size: int, stride: int) -> Tensor:
    """Return the weights of a line's pixels in its averages, shape (places, size); they wrap around its ends.

    The Gaussian is that of the input; of a coarser line it lacks the frequencies that such a line does not have.
    """
    finer = size * STRIDE // stride
    reach = torch.arange(-2 * finer, 3 * finer, dtype=torch.float64)  # five periods, summed below
    bell = torch.exp(-(reach**2) / (2 * AVERAGE**2)) / (math.sqrt(2 * math.pi) * AVERAGE)
    spectrum = torch.fft.fft(bell.unflatten(0, (5, finer)).sum(0)).real
    frequencies = torch.cat([spectrum[: size // 2], spectrum[finer - size // 2 :]])
    kernel = torch.fft.ifft(frequencies).real
    offset = torch.arange(stride, size - stride, stride)[:, None] - torch.arange(size)
    return kernel[offset % size].float()


def _wavelet(size: tuple[int, int], scale: int, angle: float) -> Tensor:
    """Return a Morlet wavelet of mean zero in the Fourier domain, where it is real, shape `size`."""
    frequency = FREQUENCY / 2**scale
    envelope = _gabor(size, WIDTH * 2**scale, angle, 0.0)
    wave = _gabor(size, WIDTH * 2**scale, angle, frequency)
    return torch.fft.fft2(wave - wave.sum() / envelope.sum() * envelope).real.float()


def _gabor(size: tuple[int, int], width: float, angle: float, frequency: float) -> Tensor:
    """Return a plane wave under an elliptic Gaussian, wrapped around a torus of `size`."""
    # Five periods, summed below.
    reach = [torch.arange(-2 * each, 3 * each, dtype=torch.float64) for each in size]
    y, x = torch.meshgrid(*reach, indexing="ij")
    along = y * math.cos(angle) + x * math.sin(angle)
    aside = x * math.cos(angle) - y * math.sin(angle)
    bell = torch.exp(-(along**2 + (SLANT * aside) ** 2) / (2 * width**2)) * SLANT / (2 * math.pi * width**2)
    wave = torch.polar(bell, frequency * along)
    return wave.unflatten(1, (5, size[1])).sum(1).unflatten(0, (5, size[0])).sum(0)
