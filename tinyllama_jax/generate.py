"""Continues a prompt with a trained model, printing as it goes.

python -m tinyllama_jax.generate RUN_OR_HF_DIRECTORY --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import sys
import time

from tinyllama_jax import door

# The settings that the command line may override, with what they mean.
_SETTINGS = {
    "prompt": (str, "the text to continue"),
    "max_new_tokens": (int, "tokens to draw at most"),
    "temperature": (float, "0: always the likeliest token"),
    "top_k": (int, "draw from the k likeliest; 0: off"),
    "top_p": (float, "draw from the likeliest that reach this probability together; 1: off"),
    "min_p": (float, "leave out what is this much less likely than the likeliest; 0: off"),
    "repetition_penalty": (float, "above 1: tokens of the text become less likely; 1: off"),
    "seed": (int, "of the draws"),
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllama_jax.generate",
        description="Continues a prompt; what is not given is taken from the run's config.",
    )
    parser.add_argument("model", type=pathlib.Path, help="a run or a Hugging Face directory")
    for name, (kind, meaning) in _SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=meaning)
    parser.add_argument("--stop", action="append", default=[], help="ends the text; repeatable")
    parser.add_argument("--step", type=int, help="of the run; default: the newest good one")
    arguments = parser.parse_args(argv)
    from tinyllama_jax.conversion.load import load
    from tinyllama_jax.inference.engine import Engine

    loaded = load(arguments.model, arguments.step)
    given = {name: getattr(arguments, name) for name in _SETTINGS}
    settings = dataclasses.replace(
        loaded.config.sampling,
        **{name: value for name, value in given.items() if value is not None},
    )
    engine = Engine(loaded.model, loaded.params, loaded.tokenizer, loaded.start_id, loaded.end_ids)
    if arguments.max_new_tokens is None:  # a default adapts to the context, an order is refused
        settings = engine.fitted(settings)
    stop = [text.replace("\\n", "\n").replace("\\t", "\t") for text in arguments.stop]
    updates = engine.stream([settings.prompt], settings, stop=stop)
    print(settings.prompt, end="", flush=True)
    first = completion = None
    for update in updates:
        first = first or time.perf_counter()
        print(update.text, end="", flush=True)
        completion = update.completion or completion
    assert first is not None and completion is not None
    seconds = time.perf_counter() - first
    rate = f", {(len(completion.tokens) - 1) / seconds:.1f} tokens/s" if seconds else ""
    why = {"eos": "the text ended", "stop": "a stop string", "length": "max_new_tokens"}
    print(f"\n\n{len(completion.tokens)} tokens{rate}; ended by {why[completion.finish]}")
    again = [str(arguments.model), "--prompt", settings.prompt, "--seed", str(settings.seed + 1)]
    print(f"next: python -m tinyllama_jax.generate {shlex.join(again)}")


if __name__ == "__main__":
    door.run(main, sys.argv[1:])
