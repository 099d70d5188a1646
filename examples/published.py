"""What the authors report for long-tailed recognition, for scale: accuracy in percent, without and with BatchFormer.

Of large networks on large data, one run each, from the README of https://github.com/zhihou7/BatchFormer at commit
305efaa (4 May 2023). Classes are many-shot with more than 100 training images, few-shot with less than 20.
"""

from __future__ import annotations

SOURCE = "github.com/zhihou7/BatchFormer, README at 305efaa: one run each, no intervals"

LONG_TAILED: dict[str, dict[str, tuple[float, float]]] = {
    "ImageNet-LT, PaCo, ResNet-50": {
        "all": (57.0, 57.4), "many": (64.8, 62.7), "medium": (55.9, 56.7), "few": (39.1, 42.1),
    },
    "ImageNet-LT, RIDE, ResNet-50": {
        "all": (53.6, 54.1), "many": (64.9, 64.3), "medium": (50.4, 51.4), "few": (33.2, 35.1),
    },
    "iNaturalist 2018, RIDE": {
        "all": (72.5, 74.1), "many": (68.1, 65.5), "medium": (72.7, 74.5), "few": (73.2, 75.8),
    },
}  # fmt: skip
