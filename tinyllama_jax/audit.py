"""Says whether a prepared corpus is what it should be, and which documents a step sees.

python -m tinyllama_jax.audit DIR [--config=FILE] [--tokenizer=FILE] [--html=audit.html]
    [--evaluation_files=FILE,...] [--near_copies=100000]
python -m tinyllama_jax.audit --config=FILE --step=K
python -m tinyllama_jax.audit --config=FILE --find="TEXT"

DIR is what data.prepared names, a part of it, or a directory of chunks that lit-gpt packed. Exit
code 1 where anything is wrong.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from tinyllama_jax import door
from tinyllama_jax.config import Config, freeze
from tinyllama_jax.config_rules import validate
from tinyllama_jax.data.audit import audit
from tinyllama_jax.data.audit_page import write_page
from tinyllama_jax.data.corpus import open_prepared
from tinyllama_jax.data.lookup import documents_with, seen_at, steps_that_see
from tinyllama_jax.data.stream import Document
from tinyllama_jax.data.workers import available_cores
from tinyllama_jax.findings import show
from tinyllama_jax.progress import Progress
from tinyllama_jax.text.tokenizer import Tokenizer

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "The .model file that it should be of.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.")
_HTML = flags.DEFINE_string("html", "", "A page to write as well.")
_FILES = flags.DEFINE_list("evaluation_files", [], "Texts that must not be in it.")
_NEAR = flags.DEFINE_integer("near_copies", 0, "Compare so many documents with each other.")
_STEP = flags.DEFINE_integer("step", -1, "Print the documents that this step sees (from 1 on).")
_FIND = flags.DEFINE_string("find", "", "Print which documents hold this, and at which steps.")


def main(argv: list[str]) -> None:
    config = freeze(_CONFIG.value) if _CONFIG.value is not None else None
    if config is not None:
        validate(config)
    name = _TOKENIZER.value or (config.data.tokenizer if config is not None else None)
    tokenizer = Tokenizer(name) if name is not None else None
    if _STEP.value >= 0 or _FIND.value:
        if config is None or tokenizer is None or len(argv) > 1:
            raise ValueError(
                "--step and --find look at what a run reads: give its --config, and no directory"
            )
        if _FIND.value:
            _find(config, tokenizer, _FIND.value)
        else:
            _print_step(config, tokenizer, _STEP.value)
        return
    if len(argv) != 2:
        raise ValueError(
            f"{len(argv) - 1} directories are named; name one: what data.prepared is set to, or a "
            f"directory of LITPKDS chunks"
        )
    directory = pathlib.Path(argv[1]).expanduser()
    if not directory.is_dir():
        raise ValueError(f"there is no directory {directory}")
    total = sum(
        path.stat().st_size
        for ending in ("*.arrayrecord", "*.bin")
        for path in directory.rglob(ending)
    )
    with Progress(total, "B", scale=True) as progress:
        result = audit(
            directory,
            config=config,
            tokenizer=tokenizer,
            evaluation_files=[pathlib.Path(name) for name in _FILES.value],
            near_copies_among=_NEAR.value,
            workers=_WORKERS.value or available_cores(),
            advance=progress.advance,
        )
    problems = show(result.findings)
    if _HTML.value:
        write_page(result, directory, tokenizer, pathlib.Path(_HTML.value))
        print(f"wrote {_HTML.value}, a page on its own: open it in a browser, or send it")
    if problems:
        sys.exit(1)


def _print_step(config: Config, tokenizer: Tokenizer, step: int) -> None:
    if not 1 <= step <= config.total_steps:
        raise ValueError(f"--step={step} is none of the run's steps, 1 to {config.total_steps}")
    training = open_prepared(config, tokenizer).training
    for seen in seen_at(training, step - 1, tokenizer):
        document = seen.document
        print(
            f"row {seen.row}: {document.source}: {document.input_file}, record {document.record}, "
            f"tokens {seen.first} to {seen.first + seen.tokens} of {document.tokens}: {seen.begins}"
        )


def _find(config: Config, tokenizer: Tokenizer, text: str) -> None:
    training = open_prepared(config, tokenizer).training
    total = sum(windows.stream.num_tokens for windows in training.windows.values())
    found: list[Document] = []
    with Progress(total, "tokens", scale=True) as progress:
        for windows in training.windows.values():
            found += documents_with(windows.stream, text, tokenizer, progress.advance)
    if not found:
        print(f'no document to train on holds "{text}"')
        return
    for document in found:  # at once: a long run's rows take hours to go through
        print(f"{document}, {document.tokens} tokens from {document.start} on", flush=True)
    counts = training.tokens_at(config.total_steps)
    sources = {document.source for document in found}
    rows = sum(counts[source] for source in sources) // config.data.seq_len
    with Progress(rows, "rows", scale=True) as progress:
        seen = steps_that_see(training, found, config.total_steps, progress.advance)
    for document, steps in seen.items():
        at = ", ".join(str(step + 1) for step in steps) or "none of the run"
        print(f"{document}: seen at steps {at}")


if __name__ == "__main__":
    door.run_with_flags(main, needs_config=False)
