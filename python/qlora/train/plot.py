"""loss.png: the training loss by step, and the held-out loss before, during and after."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora import files


def write_loss_plot(
    path: Path, history: list[dict[str, Any]], held_out: list[tuple[int, float]], title: str
) -> None:
    """Draws the `loss` entries of the trainer's `history` and the (step, held-out loss) points.

    Nothing is written where there is nothing to draw.
    """
    training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    points = sorted(dict(held_out).items())
    if not training and not points:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    axes = figure.add_subplot()
    if training:
        axes.plot(*zip(*training, strict=True), color="tab:blue", linewidth=1.5, label="training loss")
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color="tab:orange", marker="o", linestyle="--" if len(points) > 2 else "none", linewidth=1.5, label="held-out loss",
        )  # fmt: skip
        for step, loss in (points[0], points[-1]) if len(points) > 1 else points:
            axes.annotate(
                f"{loss:.3f}",
                (step, loss),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                color="tab:orange",
            )
    axes.set(xlabel="optimiser step", ylabel="loss per trained token (nats)", title=title)
    axes.margins(x=0.05, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    files.write_bytes(path, buffer.getvalue())
