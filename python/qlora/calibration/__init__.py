"""NF4 fitted to a text: scales and codes that change the layers' outputs least, instead of the weights."""

from __future__ import annotations

from .model import Calibrated, calibrate_
from .report import CALIBRATED_ATTRIBUTE, mean_ratio, write_report
from .text import token_windows
from .work import LayerError

__all__ = [
    "CALIBRATED_ATTRIBUTE",
    "Calibrated",
    "LayerError",
    "calibrate_",
    "mean_ratio",
    "token_windows",
    "write_report",
]
