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

STACKS = ("qlora", "bitsandbytes", "dense")


def load(stack: str, directory: Path, *, compute_dtype: torch.dtype, double_quant: bool) -> Any:
    """The model in NF4, block 64, on the GPU if there is one; all that is not 4-bit in `compute_dtype`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization_config: Any = None
    if stack == "qlora":
        import qlora

        quantization_config = qlora.QuantConfig(double_quant=double_quant, compute_dtype=compute_dtype)
    elif stack == "bitsandbytes":
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=quantization_config,
        dtype=compute_dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    ).eval()


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
    parser.add_argument("stack", choices=STACKS)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--no-double-quant", action="store_true")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    from qlora.calibration.text import begin_tokens, cut

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    windows = cut(tokens, begin_tokens(tokenizer), arguments.length)[: arguments.windows]
    if len(windows) < arguments.windows:
        parser.error(f"text: expected at least {arguments.windows} windows, got {len(windows)}")
    model = load(
        arguments.stack,
        arguments.model,
        compute_dtype=getattr(torch, arguments.compute_dtype),
        double_quant=not arguments.no_double_quant,
    )
    layer = type(model.get_submodule("model.layers.0.self_attn.q_proj"))
    result = {
        "stack": arguments.stack,
        "layer": f"{layer.__module__}.{layer.__qualname__}",
        "compute_dtype": arguments.compute_dtype,
        "double_quant": None if arguments.stack == "dense" else not arguments.no_double_quant,
        "windows": arguments.windows,
        "perplexity": round(perplexity(model, windows), 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
