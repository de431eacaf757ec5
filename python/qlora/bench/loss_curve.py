"""Loss curves of the same LoRA fine-tuning over each kind of base, one process per stack.

`python -m qlora.bench.loss_curve STACK MODEL_DIR --json FILE` trains LoRA adapters on the built-in docstrings, a fixed
sequence of batches, and writes the loss of each step and the held-out loss before and after. STACK is `qlora`,
`bitsandbytes` (with PEFT's own preparation) or `dense` (LoRA on the 16-bit model). `... plot PICTURE FILE ...` draws the
files of several stacks into one picture.

The stacks share the data, their order, the adapters' initial values and the optimiser, so curves differ by the base's
quantisation and by rounding alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import stacks

IGNORED = -100
HELD_OUT_EXAMPLES = 192
SMOOTHING = 0.9  # of the curves in the picture, exponential


def adapt(stack: str, model: Any, rank: int, seed: int) -> nn.Module:
    """The model with LoRA on every linear layer, as the stack's documentation builds it; A of one seed in all stacks."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if stack == "qlora":
        import qlora

        model = qlora.prepare(model, gradient_checkpointing=False)
    elif stack == "bitsandbytes":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5  # peft's own: Kaiming uniform with a = sqrt(5)
            with torch.no_grad():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return adapted


def tokenize(example: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a prompt with its completion, and labels: IGNORED on the prompt."""

    def ids_of(messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    prompt = ids_of(example["prompt"], add_generation_prompt=True)
    whole = ids_of(example["prompt"] + example["completion"])
    return whole, [IGNORED] * len(prompt) + whole[len(prompt) :]


def collate(rows: Sequence[tuple[list[int], list[int]]], device: torch.device) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right: ids, mask and labels, int64 [rows, longest]."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for i, (tokens, targets) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, : len(tokens)] = torch.tensor(targets)
        mask[i, : len(tokens)] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {key: value.to(device) for key, value in batch.items()}


def batches(rows: list[Any], size: int, steps: int, seed: int) -> Iterator[list[Any]]:
    """`steps` batches in a shuffled order of the seed, epoch after epoch."""
    order: list[int] = []
    shuffler = random.Random(seed)
    for _ in range(steps):
        if len(order) < size:
            order = list(range(len(rows)))
            shuffler.shuffle(order)
        yield [rows[i] for i in order[:size]]
        order = order[size:]


def train(
    model: nn.Module, rows: list[Any], arguments: argparse.Namespace, device: torch.device
) -> list[float]:
    """The loss of each step: AdamW, linear warm-up over a tenth of the steps, then cosine decay to 0."""
    from transformers import get_cosine_schedule_with_warmup

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, arguments.steps // 10), arguments.steps)
    losses = []
    model.train()
    for step, chosen in enumerate(batches(rows, arguments.batch, arguments.steps, arguments.seed), 1):
        loss = model(**collate(chosen, device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(loss.detach()), 5))
        if step % 20 == 0:
            print(f"step {step}/{arguments.steps}  loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return losses


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: list[Any], batch: int, device: torch.device) -> float:
    """Mean loss per trained token."""
    model.eval()
    total, count = 0.0, 0
    for begin in range(0, len(rows), batch):
        inputs = collate(rows[begin : begin + batch], device)
        num_targets = int((inputs["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**inputs).loss) * num_targets
        count += num_targets
    return total / count


def plot(picture: Path, files: Sequence[Path]) -> None:
    """The smoothed losses of several results of this command, with the held-out losses in the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    axes = figure.add_subplot()
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        smooth, value = [], result["losses"][0]
        for loss in result["losses"]:
            value = SMOOTHING * value + (1 - SMOOTHING) * loss
            smooth.append(value)
        label = (
            f"{result['stack']}: held-out {result['held_out_before']:.3f} to {result['held_out_after']:.3f}"
        )
        axes.plot(range(1, len(smooth) + 1), smooth, linewidth=1.2, label=label)
    axes.set(xlabel="optimiser step", ylabel="training loss per trained token (nats), smoothed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    if sys.argv[1:2] == ["plot"]:
        plot(Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stacks.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the result, losses and all, to FILE"
    )
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    from qlora.train import default_task

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    training, held_out = (
        [tokenize(example, tokenizer) for example in part] for part in default_task.examples(tokenizer)
    )
    held_out = held_out[:HELD_OUT_EXAMPLES]
    model = stacks.load(arguments)
    result: dict[str, Any] = stacks.describe(arguments, model)
    device = model.device
    adapted = adapt(arguments.stack, model, arguments.rank, arguments.seed)
    result |= {
        "steps": arguments.steps,
        "batch": arguments.batch,
        "rank": arguments.rank,
        "seed": arguments.seed,
    }
    result["held_out_before"] = round(held_out_loss(adapted, held_out, arguments.batch, device), 5)
    start = time.perf_counter()
    losses = train(adapted, training, arguments, device)
    result["train_s"] = round(time.perf_counter() - start, 1)
    result["held_out_after"] = round(held_out_loss(adapted, held_out, arguments.batch, device), 5)
    if arguments.json is not None:
        from qlora.files import write_json

        write_json(arguments.json, result | {"losses": losses})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
