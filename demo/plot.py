"""The picture of what each expert is used for."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from PIL import Image


def plot_experts(layers: Sequence[dict[str, Any]], classes: Sequence[str], path: Path) -> None:
    """Draw, per layer, each class's use of each expert relative to the mean, as a small palette PNG."""
    figure, axes = plt.subplots(2, (len(layers) + 1) // 2, figsize=(11, 6.2), sharey=True, layout="constrained")
    for index, (layer, axis) in enumerate(zip(layers, axes.flat, strict=False)):
        use = np.asarray(layer["use"])
        load = np.asarray(layer["load"])
        ratio = np.log2(np.maximum(use, 1e-6) / np.maximum(load, 1e-6))
        axis.imshow(ratio, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
        axis.set_title(
            f"layer {index}: {layer['type_information_bits']:.2f} bits "
            f"(shuffled vocabulary {layer['type_shuffled_bits_mean']:.2f})",
            fontsize=9,
        )
        ticks = [f"{expert}\n{100 * share:.0f}%" for expert, share in enumerate(load)]
        axis.set_xticks(range(len(load)), ticks, fontsize=7)
        axis.set_yticks(range(len(classes)), classes, fontsize=8)
    figure.supxlabel("expert, and its share of the layer's assignments", fontsize=9)
    figure.colorbar(axes.flat[0].images[0], ax=axes, label="log2 of use by the class over mean use", shrink=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, optimize=True)
