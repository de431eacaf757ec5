"""Perplexity of a causal language model stored in 4 bits, one process per stack.

`python -m qlora.bench.perplexity STACK MODEL_DIR TEXT_FILE` prints one JSON line. STACK is `qlora`, `bitsandbytes` or
`dense` (the model as it is). The text is cut into windows that do not overlap, each with the bos token first where the
tokenizer sets one; perplexity is exp of the mean negative log-likelihood of every token but the first of each window.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from . import stacks


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp(mean loss) over int64 [num_windows, length] windows of tokens; softmax in float32."""
    total, count = 0.0, 0
    for window in windows:
        ids = window[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(window) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stacks.add_arguments(parser)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    from qlora.calibration.text import begin_tokens, cut

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    windows = cut(tokens, begin_tokens(tokenizer), arguments.length)[: arguments.windows]
    if len(windows) < arguments.windows:
        parser.error(f"text: expected at least {arguments.windows} windows, got {len(windows)}")
    model = stacks.load(arguments)
    result = {
        **stacks.describe(arguments, model),
        "windows": arguments.windows,
        "perplexity": round(perplexity(model, windows), 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
