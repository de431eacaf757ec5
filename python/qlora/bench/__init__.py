"""Measurements behind `qlora bench`: kernels (`kernels.py`) and a whole training step (`train_step.py`), beside the peers."""
