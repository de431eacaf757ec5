"""NF4 fitted to a text: scales and codes that change the layers' outputs least, instead of the weights."""

from __future__ import annotations

from .model import calibrate_
from .work import LayerError

__all__ = ["LayerError", "calibrate_"]
