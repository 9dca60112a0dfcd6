"""One way into every kind of model this package reads."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import jax

from tinyllama_jax.config import Config, DataConfig
from tinyllama_jax.conversion import hf, hf_config
from tinyllama_jax.conversion.hf_config import SpecialIds
from tinyllama_jax.conversion.output import fresh_directory
from tinyllama_jax.model.llama import Llama, Params
from tinyllama_jax.runs import checkpoint, directory, restore
from tinyllama_jax.text.tokenizer import Tokenizer

# Beside a run's config.json. The tokenizer is the run's own copy, so that a run can be moved; no
# such file: the run has no tokenizer. The origin is there for imported runs only.
TOKENIZER = "tokenizer.model"
ORIGIN = "origin.json"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with all that belongs to it.

    Attributes:
      config: a run's config; for other sources the defaults around the model's own.
      model: the functions.
      params: float32, on the default device.
      tokenizer: None where the source has none.
      ids: BOS and EOS as the source declares them.
      step: the run's optimizer step; 0 for other sources.
    """

    config: Config
    model: Llama
    params: Params
    tokenizer: Tokenizer | None
    ids: SpecialIds
    step: int

    @property
    def start_id(self) -> int | None:
        """The id that the model saw before a text in training."""
        return self.ids.bos if "bos" in self.config.data.boundary else self._eos

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids by which the model says that a text is over."""
        if "eos" in self.config.data.boundary:
            return self.ids.eos
        # Trained on BOS alone, it announces the next document's.
        return () if self.ids.bos is None else (self.ids.bos,)

    @property
    def _eos(self) -> int | None:
        return self.ids.eos[0] if self.ids.eos else None


def load(path: str | os.PathLike[str], step: int | None = None) -> Loaded:
    """Loads a model from a run directory or a Hugging Face directory.

    Args:
      path: the directory; which kind it is, is seen from its config.json.
      step: for a run, the checkpoint's step; None: the newest good one.

    Raises:
      ValueError: neither kind of directory, a model that this package cannot load, or no such step.
    """
    source = pathlib.Path(path)
    if not source.is_dir():
        kind = "a file" if source.exists() else "not there"
        raise ValueError(f"{source} is {kind}; give a run directory or a Hugging Face directory")
    directory.resolve_run(source)  # has the better words for what lacks a config.json
    if "model_type" in hf_config.read(source):
        if step is not None:
            raise ValueError(f"{source} is a Hugging Face directory: it has no steps to choose")
        return _load_hf(source)
    return _load_run(source, step)


def save_run(loaded: Loaded, run: pathlib.Path, origin: str) -> None:
    """Makes a run directory of a model that came from elsewhere, as its step 0.

    Args:
      loaded: the model.
      run: where; must not exist, or be empty.
      origin: where it came from, for people to read.

    Raises:
      ValueError: `run` exists and is not empty.
    """
    with fresh_directory(run) as partial:
        checkpoint.save_params(partial, loaded.params, {"origin": origin})
        if loaded.tokenizer is not None:
            (partial / TOKENIZER).write_bytes(loaded.tokenizer.model_proto)
        record = {
            "origin": origin,
            "tokenizer": "none" if loaded.tokenizer is None else TOKENIZER,
            "bos_token_id": loaded.ids.bos,
            "eos_token_ids": list(loaded.ids.eos),
        }
        (partial / ORIGIN).write_text(json.dumps(record, indent=2) + "\n")
        directory.write_config(partial, loaded.config)


def _load_hf(source: pathlib.Path) -> Loaded:
    declared = hf_config.read(source)
    model_config = hf_config.to_model_config(declared)
    config = Config(model=model_config, data=DataConfig(seq_len=model_config.max_seq_len))
    tokenizer = _tokenizer(source)
    return Loaded(
        config,
        Llama(model_config),
        hf.read_params(source, model_config),
        tokenizer,
        hf_config.special_ids(declared),
        step=0,
    )


def describe_run(run: pathlib.Path) -> tuple[Config, Tokenizer | None, SpecialIds]:
    """What a run knows of its model besides the params.

    Raises:
      ValueError: `run` is no run directory.
    """
    directory.resolve_run(run)
    if "model_type" in hf_config.read(run):
        raise ValueError(f"{run} is a Hugging Face directory already; give a run directory")
    tokenizer = _tokenizer(run)
    return directory.read_config(run), tokenizer, _run_ids(run, tokenizer)


def _load_run(run: pathlib.Path, step: int | None) -> Loaded:
    config, tokenizer, ids = describe_run(run)
    step, params = restore.restore_params(run, step)
    return Loaded(config, Llama(config.model), _to_device(params), tokenizer, ids, step)


def _to_device(params: Params) -> Params:
    """Moves params leaf by leaf, emptying the dict so that the host never keeps all of them."""
    return {
        key: _to_device(leaf) if isinstance(leaf, dict) else jax.device_put(leaf)
        for key in list(params)
        for leaf in [params.pop(key)]
    }


def _run_ids(run: pathlib.Path, tokenizer: Tokenizer | None) -> SpecialIds:
    if (run / ORIGIN).exists():
        origin = json.loads((run / ORIGIN).read_text())
        return SpecialIds(origin["bos_token_id"], tuple(origin["eos_token_ids"]))
    if tokenizer is None:
        return SpecialIds(None, ())
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return SpecialIds(bos if bos >= 0 else None, (eos,) if eos >= 0 else ())


def _tokenizer(source: pathlib.Path) -> Tokenizer | None:
    path = source / TOKENIZER
    return Tokenizer(str(path)) if path.exists() else None
