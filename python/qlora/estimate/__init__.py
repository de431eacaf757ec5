"""`qlora.estimate_memory`: the GPU memory of a QLoRA training step, without a GPU and without weights.

`fake.py` builds the model from its configuration, `timeline.py` watches one training step of it, `attention.py` and
`workspace.py` stand for what the GPU does otherwise, `search.py` looks for what fits. docs/estimate.md says what the
terms are and how far the figures are right.
"""

from __future__ import annotations

from .estimator import Estimate, estimate_memory

__all__ = ["Estimate", "estimate_memory"]
