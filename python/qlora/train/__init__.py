"""`qlora train` as a library: configuration, data, training session and its artifacts.

Training itself is TRL's SFTTrainer on transformers' Trainer; this package chooses good defaults, reads the common
data formats, reports speed and memory, and keeps every file on disk whole.
"""
