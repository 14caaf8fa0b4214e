"""Random crops and mirror images of a batch, on whatever device it is.

    out[n, c, i, j] = in[n, c, i + dy_n, j + dx_n]        dy_n, dx_n uniform in -pad .. pad, 0 outside the image

and, with ``flip``, half of the images mirrored left to right. Pixels are copied, never mixed: one gather for the whole
batch, no loop over images.

For standardised images 0 is the mean colour of the training images. Where we differ: JEI-DNN pads before it
normalises, so with black, and by 28 of 224 pixels; pad 4 of 32 is the same share. A border of the mean colour carries
no edge that stands out by its brightness.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crop_and_flip(images: Tensor, generator: torch.Generator, pad: int = 4, flip: bool = True) -> Tensor:
    """Shift every image at random, and mirror about half of them.

    Args:
        images: (N, C, H, W), any dtype and device.
        generator: of the draws; on any device. A CPU generator gives the same draws for every device of the images.
        pad: largest shift in pixels, each direction; 0 .. min(H, W) - 1.
        flip: mirror too; only where a mirror image keeps its label (``info["flip"]`` of the data set).

    Returns:
        (N, C, H, W), new memory; equal to ``images`` for pad 0 without flip.

    Raises:
        ValueError: not a batch of images, or a pad out of range.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
    n, n_channels, height, width = images.shape
    if not 0 <= pad < min(height, width):
        raise ValueError(f"pad={pad}: must be between 0 and {min(height, width) - 1} for {height} x {width} pixels")
    start = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device=generator.device).to(images.device)
    rows = torch.arange(height, device=images.device) + start[0]  # (N, H), in the padded image
    columns = torch.arange(width, device=images.device).expand(n, width)
    if flip:
        mirrored = torch.randint(2, (n, 1), generator=generator, device=generator.device).to(images.device).bool()
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + start[1]  # (N, W)
    image = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(n_channels, device=images.device)[:, None, None]
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
