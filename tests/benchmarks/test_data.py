"""`bench data`: it compares what gives the same ids, and prints and keeps what it measured."""

import json

import numpy as np
import pytest

from tinyllama_jax import bench
from tinyllama_jax.benchmarks import data, report
from tinyllama_jax.config import SourceConfig
from tinyllama_jax.text.tokenizer import Tokenizer


@pytest.fixture
def text(tmp_path):
    lines = [json.dumps({"text": f"document {n} of the llama. " * (n % 9 + 1)}) for n in range(600)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path / "text.jsonl"


def test_what_it_measures(text, tmp_path, capsys):
    out = tmp_path / "figures.json"
    bench.main(["data", f"--path={text}", "--rounds=2", "--seq-len=64", f"--json={out}"])
    figures = json.loads(out.read_text())
    by_pass = {which: [r for r in figures["rows"] if r["pass"] == which]
               for which in ("encoding", "loading")}  # fmt: skip
    names = [row["contender"] for row in by_pass["encoding"]]
    absent = figures["absent"].keys()
    assert {*names, *absent} == {
        "ours", "SentencePiece", "Hugging Face tokenizers", "ours, once more",
    }  # fmt: skip
    assert len(by_pass["loading"]) == 3
    for row in by_pass["encoding"]:
        assert 0 < row["least"] <= row["mtokens_per_second"] <= row["most"]
    for row in by_pass["loading"]:
        assert 0 < row["least"] <= row["windows_per_second"] <= row["most"]
        assert row["tokens_per_cpu_second"] > 0
    assert 0 < figures["resume_seconds"] < 30 and abs(figures["adjacent_correlation"]) < 0.2
    printed = capsys.readouterr().out
    assert "950B tokens take" in printed and "0.7 Mtokens/s take" in printed
    table = report._table(figures["rows"])
    assert "Mtokens/s" in table and "Grain's ArrayRecord source" in table


def test_other_ids_are_not_timed(text, monkeypatch, tmp_path):
    source = SourceConfig(name="text", path=str(text))
    monkeypatch.setattr(
        data, "_of_memory_map", lambda flat, training, step: np.zeros((64, 64), np.int32)
    )
    with pytest.raises(ValueError, match="NumPy memory map gives other ids than ours"):
        data.loading(source, "", tmp_path / "p", seq_len=64, rounds=1)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [np.array([5])] * len(texts))
    with pytest.raises(ValueError, match="ours gives other ids than SentencePiece"):
        data.encoding(source, Tokenizer(), rounds=1)
    with pytest.raises(ValueError, match="too few for 700 rounds"):
        data.encoding(source, Tokenizer(), rounds=700)
