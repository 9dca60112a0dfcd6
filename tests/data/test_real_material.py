"""Real documents in the published shapes, by Llama 2's tokenizer: prepared, read back, audited."""

import json
import pathlib

import numpy as np
import pyarrow.parquet
import pytest
import zstandard

from tinyllama_jax.config import Config, DataConfig, ModelConfig, SourceConfig
from tinyllama_jax.data.audit import audit
from tinyllama_jax.data.corpus import open_prepared
from tinyllama_jax.data.prepare import prepare_sources
from tinyllama_jax.data.stream import Stream
from tinyllama_jax.text.tokenizer import Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space: in a text it comes back as one


@pytest.fixture(scope="module")
def data(test_data, tmp_path_factory):
    return DataConfig(
        sources=(
            SourceConfig(
                name="slimpajama", path=str(test_data / "text/SlimPajama_shaped/train"),
                subset_key="meta.redpajama_set_name", subsets="-RedPajamaGithub", weight=0.693584,
            ),
            SourceConfig(
                name="starcoder", path=str(test_data / "text/starcoder_shaped"), weight=0.306416,
                text_key="content", subset_key="directory",
            ),
        ),
        tokenizer=str(test_data / "tokenizer/tokenizer.model"),
        prepared=str(tmp_path_factory.mktemp("prepared")),
    )  # fmt: skip


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
    with_space_mark = 0
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
                        with_space_mark += SPACE in text
                        assert tokenizer.decode(part) == text.replace(SPACE, " "), key
    print(f"{with_space_mark} documents hold U+2581, which comes back as a space")
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
