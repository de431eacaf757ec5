"""Modules over 4-bit weights, under bitsandbytes' class names."""

from __future__ import annotations

from .convert import dequantize_, quantize_
from .embedding import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from .group import link_groups, unlink_groups
from .linear import Linear4bit, LinearFP4, LinearNF4
from .module import Module4bit
from .params import Params4bit
from .quant_state import QuantState
from .report import Report, report
from .tensor import NonFiniteWeightError

__all__ = [
    "Embedding4bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "Module4bit",
    "NonFiniteWeightError",
    "Params4bit",
    "QuantState",
    "Report",
    "dequantize_",
    "link_groups",
    "quantize_",
    "report",
    "unlink_groups",
]
