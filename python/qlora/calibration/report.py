"""calibration.json and calibration.png: the output error of each layer before and after."""

from __future__ import annotations

import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import files
from .model import Calibrated
from .work import LayerError

#: What `calibrate_` did, on a model that `from_pretrained` calibrated.
CALIBRATED_ATTRIBUTE = "_qlora_calibrated"


def mean_ratio(errors: list[LayerError]) -> float:
    """Geometric mean of calibrated / absmax over the layers that have an error at all."""
    logs = [
        math.log(error.calibrated / error.absmax)
        for error in errors
        if error.calibrated > 0 and error.absmax > 0
    ]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0


def write_report(directory: Path, calibrated: Calibrated, about: dict[str, Any]) -> None:
    """Writes both files; `about` says what was calibrated how."""
    values = asdict(calibrated)
    errors = values.pop("errors")
    content = {
        **about,
        **values,
        "error": "sum |W y - Q x|^2 / sum |W y|^2 over the calibration text",
        "mean_ratio": mean_ratio(calibrated.errors),
        "layers": errors,
    }
    files.write_json(directory / "calibration.json", content)
    files.write_bytes(directory / "calibration.png", _plot(calibrated.errors))


def _plot(errors: list[LayerError]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(error.name.rpartition(".")[2] for error in errors))
    for number, kind in enumerate(kinds):
        of_kind = [error for error in errors if error.name.rpartition(".")[2] == kind]
        color = f"C{number % 10}"
        axes.plot([error.absmax for error in of_kind], color=color, linestyle=":", linewidth=1)
        axes.plot([error.calibrated for error in of_kind], color=color, linewidth=1.5, label=kind)
    title = f"dotted: absmax scales, solid: calibrated; geometric mean of the ratio {mean_ratio(errors):.2f}"
    axes.set(xlabel="decoder layer", ylabel="output error, share of the output", title=title)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
