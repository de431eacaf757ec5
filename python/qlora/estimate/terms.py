"""Names of the terms of an estimate; docs/estimate.md says what each holds."""

from __future__ import annotations

WEIGHTS = "4-bit weights"
SCALES = "block scales"
NOT_QUANTISED = "kept in 16 or 32 bits"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
KEPT = "kept activations"
WORKING = "working memory of a layer"
LOSS = "logits and loss"
WORKSPACE = "workspace of kernels"
CUBLAS_WORKSPACE = "workspace of cuBLAS"

#: In the order of the table.
TERMS = (
    WEIGHTS,
    SCALES,
    NOT_QUANTISED,
    ADAPTERS,
    GRADIENTS,
    OPTIMIZER,
    KEPT,
    WORKING,
    LOSS,
    WORKSPACE,
    CUBLAS_WORKSPACE,
)
#: Those that come and go within a step.
MOVING = (GRADIENTS, KEPT, WORKING, LOSS, WORKSPACE)
