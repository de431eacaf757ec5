"""A few held-out prompts answered before and after training, beside the wanted answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

TEXT_PROMPT_WORDS = 24


@dataclass(frozen=True)
class Sample:
    prompt: str  # as the model sees it
    shown: str  # as a reader wants to see it
    wanted: str
    is_templated: bool = False  # `prompt` already holds its special tokens


def make_samples(examples: list[dict[str, Any]], tokenizer: Any, text_column: str = "text") -> list[Sample]:
    """Samples of TRL-ready examples: prompt/completion (texts or messages), whole conversations, or plain text."""
    samples = []
    for example in examples:
        if "prompt" in example:
            prompt, completion = example["prompt"], example["completion"]
            if isinstance(prompt, str):
                samples.append(Sample(prompt, prompt, completion))
            else:
                samples.append(_conversation(prompt, completion[-1]["content"], tokenizer))
        elif "messages" in example:
            *prompt, answer = example["messages"]
            if prompt and answer["role"] == "assistant":
                samples.append(_conversation(prompt, answer["content"], tokenizer))
        else:
            words = example[text_column].split(" ")
            prompt, wanted = " ".join(words[:TEXT_PROMPT_WORDS]), " ".join(words[TEXT_PROMPT_WORDS:])
            samples.append(Sample(prompt, prompt, wanted))
    return samples


def generate(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, *, is_templated: bool, **options: Any
) -> list[str]:
    """Continuations of all prompts in one batch, greedy unless `options` of generate say otherwise.

    `is_templated`: the prompts already hold their special tokens.
    """
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    was_training = model.training
    model.eval()
    try:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not is_templated)
        batch = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            output = model.generate(
                **batch,
                **{"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options},
                max_new_tokens=max_new_tokens,
            )
        answers = output[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
    finally:
        tokenizer.padding_side = side
        model.train(was_training)


def as_markdown(samples: list[Sample], before: list[str], after: list[str], title: str) -> str:
    """samples.md"""
    parts = [f"# {title}\n"]
    for number, (sample, old, new) in enumerate(zip(samples, before, after, strict=True), 1):
        parts.append(
            f"## {number}\n\n{_fenced(sample.shown)}\n\n"
            f"Wanted:\n\n{_fenced(sample.wanted)}\n\nBefore:\n\n{_fenced(old)}\n\nAfter:\n\n{_fenced(new)}\n"
        )
    return "\n".join(parts)


def _conversation(prompt: list[dict[str, str]], wanted: str, tokenizer: Any) -> Sample:
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return Sample(text, prompt[-1]["content"], wanted, is_templated=True)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
