"""Answers prompts with a model, an adapter on its base, or the last training's result.

qlora generate                             the last training's result, an example prompt
qlora generate DIR --prompt "Hello"        a model or adapter directory, or a hub name
qlora generate < prompts.txt               one prompt a line
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from qlora.cli.main import UsageError
from qlora.cli.trained import arguments_of, base_of, quantisation_of

NAME = "generate"
HELP = "answer prompts with a model or the last training's result"

EXAMPLE = """def chunks(values, size):
    for start in range(0, len(values), size):
        yield values[start : start + size]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="model or adapter (default: the last training output)"
    )
    parser.add_argument("--adapter", metavar="DIR", help="adapter to put on MODEL")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times (default: stdin)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, for models with a chat template")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling; default: %(default)s")
    parser.add_argument("--no-4bit", action="store_true", help="keep the model in 16 bit")


def run(arguments: argparse.Namespace) -> int:
    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: expected at least 1, got {arguments.max_new_tokens}")
    if arguments.temperature < 0:
        raise UsageError(f"--temperature: expected 0 or more, got {arguments.temperature}")
    base, adapter = find_model(arguments.model, arguments.adapter)
    prompts, system = _prompts(arguments, adapter)
    if not prompts:
        raise UsageError("expected --prompt or prompts on stdin, got none")

    import torch

    from qlora.cli.quiet import quiet_libraries
    from qlora.train import samples
    from qlora.train.model import pick_device

    quiet_libraries()
    torch.manual_seed(arguments.seed)
    model, tokenizer = load(base, adapter, device=pick_device(use_cpu=False), in_4bit=not arguments.no_4bit)
    is_templated = bool(tokenizer.chat_template) and not arguments.raw
    options: dict[str, Any] = {}
    if arguments.temperature > 0:
        options = {"do_sample": True, "temperature": arguments.temperature}
    for prompt in prompts:
        text = _render(prompt, system, tokenizer) if is_templated else prompt
        (answer,) = samples.generate(
            model, tokenizer, [text], arguments.max_new_tokens, is_templated=is_templated, **options
        )
        if len(prompts) > 1:
            print(f">>> {prompt}")
        print(answer, flush=True)
    return 0


def find_model(model: str | None, adapter: str | None) -> tuple[str, Path | None]:
    """The base model's directory or hub name, and the adapter's directory (None without one)."""
    from qlora.train import session

    if adapter is not None and not is_adapter(Path(adapter)):
        raise UsageError(f"--adapter: expected a directory with adapter_config.json, got {adapter}")
    if model is None and adapter is None:
        adapter = session.DEFAULT_OUTPUT_DIR
        if not is_adapter(Path(adapter)):
            raise UsageError(
                f"expected a MODEL: there is no training output in {adapter} (`qlora train` makes one)"
            )
    elif model is not None and adapter is None and is_adapter(Path(model)):
        model, adapter = None, model
    if adapter is None:
        assert model is not None
        return model, None
    if model is None:
        model = base_of(Path(adapter))
        if model is None:
            raise ValueError(f"{adapter}: adapter_config.json names no base model; give it as MODEL")
    return model, Path(adapter)


def is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def load(base: str, adapter: Path | None, *, device: Any, in_4bit: bool) -> tuple[Any, Any]:
    """Model (with its adapter) and tokenizer, ready to generate; the base stored as in the adapter's training."""
    from qlora.train import model as models
    from qlora.train.config import QloraArguments

    arguments = QloraArguments(**({} if adapter is None else quantisation_of(adapter)))
    arguments.load_in_4bit = in_4bit and arguments.load_in_4bit
    has_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    tokenizer = models.load_tokenizer(str(adapter) if has_tokenizer else base, None, False)
    dtype = models.default_dtype(device)
    model = models.load_model(base, arguments, device=device, dtype=dtype, trust_remote_code=False)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval(), tokenizer


def _prompts(arguments: argparse.Namespace, adapter: Path | None) -> tuple[list[str], str | None]:
    """The prompts and the system message. The built-in task has its own instruction, and an example."""
    system: str | None = arguments.system
    is_docstrings = adapter is not None and _is_built_in_task(adapter)
    if system is None and is_docstrings:
        from qlora.train.docstrings import INSTRUCTION

        system = INSTRUCTION
    if arguments.prompt is not None:
        return list(arguments.prompt), system
    if sys.stdin is None or sys.stdin.isatty():
        if not is_docstrings:
            return [], system
        print(f"{EXAMPLE}\n", flush=True)
        return [EXAMPLE], system
    lines = [line.rstrip("\n") for line in sys.stdin]
    prompts = [line for line in lines if line.strip()]
    return prompts or ([EXAMPLE] if is_docstrings else []), system


def _is_built_in_task(adapter: Path) -> bool:
    """Whether the training in this directory had no dataset of its own."""
    written = arguments_of(adapter)
    return bool(written) and written.get("dataset_name") is None


def _render(prompt: str, system: str | None, tokenizer: Any) -> str:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
