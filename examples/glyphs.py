"""Characters in many fonts: drawn from those that matplotlib ships, by Pillow, which it brings along."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

#: Lower-case letters that are not their capital made small.
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghmnqrty"
#: One file a style: serif, sans, monospaced, each upright or slanted, light or bold.
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmtt10", "cmmi10", "cmti10",
)  # fmt: skip
SIDE = 28


@lru_cache(maxsize=1)
def draw() -> Tensor:
    """Every character in every font, white on black, as large as fits in a margin: (fonts, characters, 28, 28)."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images = np.zeros((len(FONTS), len(CHARACTERS), SIDE, SIDE), dtype=np.float32)
    for font, name in enumerate(FONTS):
        face = ImageFont.truetype(str(folder / f"{name}.ttf"), 22)
        for character, text in enumerate(CHARACTERS):
            canvas = Image.new("L", (SIDE, SIDE))
            ImageDraw.Draw(canvas).text((SIDE / 2, SIDE / 2), text, fill=255, font=face, anchor="mm")
            images[font, character] = np.asarray(canvas) / 255
    return torch.from_numpy(images)


def distort(images: Tensor, random: torch.Generator, strength: float = 1.0) -> Tensor:
    """Each of (N, 28, 28) images turned, scaled, sheared, shifted and noisy: (N, 1, 28, 28), values in [0, 1].

    Args:
        strength: 1 turns by up to 30 degrees and shifts by up to 4 pixels; 0 leaves images as they are.
    """
    turn, zoom, shear, right, down = strength * (2 * torch.rand(5, len(images), generator=random) - 1)
    turn, zoom, shear = turn * math.pi / 6, 1.15 + 0.3 * zoom, 0.4 * shear
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    theta = torch.stack([cos, shear - sin, 0.28 * right, sin, cos, 0.28 * down], dim=1).view(-1, 2, 3)
    sources = images[:, None]
    views = F.grid_sample(sources, F.affine_grid(theta, sources.shape, align_corners=False), align_corners=False)
    return (views + 0.3 * strength * torch.randn(views.shape, generator=random)).clamp(0, 1)


@lru_cache(maxsize=1)
def load(per_class: int = 300) -> tuple[Tensor, Tensor]:
    """Distorted images (49 · per_class, 1, 28, 28) of every character, each in a random font, and labels."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(len(CHARACTERS)).repeat_interleave(per_class)
    fonts = torch.randint(len(FONTS), labels.shape, generator=random)
    return distort(draw()[fonts, labels], random), labels
