"""Real documents in the published shapes, by Llama 2's tokenizer: prepared, read back, audited."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import zstandard

from configs import tinyllama_1b
from tinyllama_jax.config import Config, ModelConfig, freeze
from tinyllama_jax.data.audit import audit
from tinyllama_jax.data.corpus import open_prepared
from tinyllama_jax.data.prepare import prepare_sources
from tinyllama_jax.data.stream import Stream
from tinyllama_jax.model.presets import PRESETS
from tinyllama_jax.runs.metrics import read_metrics
from tinyllama_jax.text.tokenizer import Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space: in a text it comes back as one


@pytest.fixture(scope="module")
def data(test_data, tmp_path_factory):
    """As shipped, but for where things are."""
    config = tinyllama_1b.get_config()
    config.data.sources.slimpajama.path = str(test_data / "text/SlimPajama_shaped/train")
    config.data.sources.starcoder.path = str(test_data / "text/starcoder_shaped")
    config.data.tokenizer = str(test_data / "tokenizer/tokenizer.model")
    config.data.prepared = str(tmp_path_factory.mktemp("prepared"))
    return freeze(config).data


@pytest.fixture(scope="module")
def streams(data):
    return prepare_sources(data, workers=2)


def raw_documents(data):
    """(source, file, record) -> (subset, text), by other means than the package's own."""
    found = {}
    slim, code = (source.path for source in data.sources)
    for path in sorted(pathlib.Path(slim).rglob("*.zst")):
        name = path.relative_to(slim).as_posix()
        content = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read()
        for number, line in enumerate(content.decode().split("\n")):
            if line.strip():
                record = json.loads(line)
                key = ("slimpajama", name, number)
                found[key] = record["meta"]["redpajama_set_name"], record["text"]
    for path in sorted(pathlib.Path(code).rglob("*.parquet")):
        name = path.relative_to(code).as_posix()
        texts = pyarrow.parquet.read_table(path, columns=["content"])["content"].to_pylist()
        for number, text in enumerate(texts):
            found["starcoder", name, number] = name.split("/")[0], text
    return found


def test_every_document_comes_back_byte_for_byte(data, streams):
    tokenizer = Tokenizer(data.tokenizer)
    left = raw_documents(data)
    with_space_mark = []
    for name, directory in streams.items():
        source, _, subset = name.partition(".")
        for split in ("train", "validation"):
            stream = Stream(directory / split)
            for shard, entry in enumerate(stream.manifest.shards):
                for ids, table in stream.document_blocks(shard):
                    ends = np.cumsum(table["tokens"], dtype=np.int64)
                    for row, end in zip(table, ends, strict=True):
                        key = (source, entry.inputs[row["input"]], int(row["record"]))
                        of, text = left.pop(key)
                        part = ids[end - row["tokens"] : end]
                        assert of == subset and (part[0], part[-1]) == (1, 2)
                        if SPACE in text:
                            with_space_mark.append(key)
                        assert tokenizer.decode(part) == text.replace(SPACE, " "), key
    print(f"with U+2581, which comes back as a space: {with_space_mark}")
    assert {subset for subset, _ in left.values()} <= {
        "RedPajamaGithub"
    }  # and nothing else is left
    assert sum(subset == "RedPajamaGithub" for subset, _ in left.values()) == 100


def test_it_is_mixed_as_published(data, streams):
    config = Config(data=data, model=ModelConfig(), training=Config().training)
    training = open_prepared(config, Tokenizer(data.tokenizer)).training
    steps = -(-10_000_000 // config.batch_rows)
    counts = training.order.counts_at(steps)
    share = sum(n for name, n in counts.items() if name.startswith("slimpajama."))
    share /= steps * config.batch_rows
    assert share == pytest.approx(0.693584, abs=1e-6)


def test_the_audit_finds_nothing_wrong(data, streams):
    result = audit(pathlib.Path(data.prepared), tokenizer=Tokenizer(data.tokenizer), workers=1)
    assert [finding for finding in result.findings if finding.level != "ok"] == []


@pytest.mark.slow
def test_a_model_learns_from_it(data, streams, tmp_path):
    """The published run with 120M parameters: its config, by its command, for four short steps."""
    sources = {source.name: source.path for source in data.sources}
    settings = {
        **{f"data.sources.{name}.path": path for name, path in sources.items()},
        "data.tokenizer": data.tokenizer, "data.prepared": data.prepared, "data.seq_len": 64,
        "training.train_tokens": 1024, "training.global_batch_tokens": 256,
        "training.micro_batch_size": 4, "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 1, "evaluation.tokens": 1024, "logging.every_steps": 1,
        "sampling.max_new_tokens": 4,
    }  # fmt: skip
    model = dataclasses.asdict(PRESETS["tinyllama_120m"])
    default = dataclasses.asdict(PRESETS["tinyllama_1b"])
    settings |= {f"model.{name}": model[name] for name in model if model[name] != default[name]}
    command = [sys.executable, "-m", "tinyllama_jax.train", "--config=configs/tinyllama_1b.py"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    done = subprocess.run([*command, f"--workdir={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MB of raw text" not in done.stdout  # prepared once
    assert done.stdout.count("% of the rows") == len(streams)
    losses = [record["eval/loss"] for record in read_metrics(tmp_path) if "eval/loss" in record]
    assert losses[0] == pytest.approx(np.log(32_000), abs=0.4)
    assert losses[-1] < losses[0] - 0.7
