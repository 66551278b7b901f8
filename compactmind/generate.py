"""Try a language model: let it go on with a text, or answer a question.

Run:   python -m compactmind.generate "The best thing about this film is"          (in this repository: python generate.py ...)
       python -m compactmind.generate --model models/llama_searched --chat "Why is the sky blue?" --max_new_tokens 100
       python -m compactmind.generate --json < prompts.txt            (a prompt per line)
Reads: any directory under models/ with a Llama, or any Hugging Face causal language model.
Prints: the text as it comes, tokens per second on standard error; with --json an object per line.
"""

if __name__ == "__main__":
    from compactmind.quick_start import quick_start

    with quick_start():  # what is imported below
        from compactmind import checkpoint, generation  # noqa: F401

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import TextStreamer

from compactmind.checkpoint import silence_libraries
from compactmind.console import errors_in_one_line, open_model, texts_of
from compactmind.errors import CompactMindError
from compactmind.generation import cache_for
from compactmind.limits import positions_of, require_known_ids


@torch.inference_mode()
def generate(model, tokenizer, prompt: str, args: argparse.Namespace) -> dict[str, object]:
    """Return `prompt`, `text` (what the model says), `new_tokens` and `seconds`; unless --json it is printed as it comes."""
    if args.chat:
        if tokenizer.chat_template is None:
            raise CompactMindError(f"{args.model} has no chat template: leave --chat out, and it goes on with the text")
        message = [{"role": "user", "content": prompt}]
        try:
            inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        except TemplateError as error:
            raise CompactMindError(f"the chat template of {args.model} does not take the text: {error}") from None
    else:
        inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    count = inputs["input_ids"].shape[1]
    if count < 1:
        raise CompactMindError(f"the prompt {prompt!r} has no tokens: write something")
    require_known_ids(model, inputs["input_ids"])
    longest = positions_of(model) or getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if count >= longest:
        raise CompactMindError(f"the prompt has {count} tokens, and the model was made for {longest} with what it says: shorten it")
    torch.manual_seed(args.seed)
    sampling = (
        {"do_sample": True, "temperature": args.temperature, "top_p": 0.95} if args.temperature > 0 else {"do_sample": False}
    )
    started = time.perf_counter()
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        **inputs, **sampling, past_key_values=cache_for(model), pad_token_id=padding,
        max_new_tokens=min(args.max_new_tokens, longest - count),
        streamer=None if args.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )[0, count:]  # fmt: skip
    seconds = time.perf_counter() - started
    return {
        "prompt": prompt, "text": tokenizer.decode(output, skip_special_tokens=True), "new_tokens": len(output), "seconds": seconds
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="texts; without any they are read from standard input, one per line")
    parser.add_argument("--model", type=Path, default=Path("models/llama_w8a8"), help="directory of the language model")
    parser.add_argument("--max_new_tokens", type=int, default=60, help="tokens to generate at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token; above: sampled")
    parser.add_argument("--chat", action="store_true", help="put the text into the model's chat template, as a question to it")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling")
    parser.add_argument("--json", action="store_true", help="print an object per line")
    args = parser.parse_args(arguments)
    if args.max_new_tokens < 1 or args.temperature < 0:
        parser.error(f"max_new_tokens {args.max_new_tokens} must be at least 1, temperature {args.temperature} at least 0")
    if not args.prompts and (sys.stdin is None or sys.stdin.isatty()):
        parser.error('no text: give one, or pipe it in, for example "Once upon a time"')
    silence_libraries()
    with errors_in_one_line():
        checkpoint = open_model(args.model, "CausalLM")
        for prompt in texts_of(args.prompts, sys.stdin and sys.stdin.buffer):
            answer = generate(checkpoint.model, checkpoint.tokenizer, prompt, args)
            if args.json:
                print(json.dumps(answer, ensure_ascii=False), flush=True)
            else:
                speed = answer["new_tokens"] / answer["seconds"]
                print(f"({answer['new_tokens']} tokens, {speed:.1f} per second)", file=sys.stderr)


if __name__ == "__main__":
    main()
