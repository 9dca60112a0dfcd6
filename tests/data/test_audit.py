"""The audit of a corpus finds every defect that TinyLlama's had, and passes one without."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.data.test_litpkds import pack
from tests.data.test_prepare import config as data_config
from tests.data.test_prepare import write_corpus
from tinyllama_jax.config import Config, ModelConfig, TrainingConfig
from tinyllama_jax.data import pages
from tinyllama_jax.data.audit import audit
from tinyllama_jax.data.audit_page import write_page
from tinyllama_jax.data.corpus import open_prepared
from tinyllama_jax.data.lookup import documents_with, seen_at, steps_that_see
from tinyllama_jax.data.prepare import prepare_sources
from tinyllama_jax.data.scan import files_met, grams_of
from tinyllama_jax.data.stream import Stream
from tinyllama_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_file_each")
TOKENIZER = Tokenizer()
S = 32


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("raw") / "books", files=4, documents=120)


@pytest.fixture(scope="module")
def whole(raw, one_file_each, tmp_path_factory):
    prepared = tmp_path_factory.mktemp("whole")
    prepare_sources(data_config(raw, prepared), workers=1)
    return prepared


@pytest.fixture
def prepared(whole, tmp_path):
    """A copy, to be damaged."""
    shutil.copytree(whole, tmp_path / "prepared")
    return tmp_path / "prepared"


def split_of(prepared, split="train"):
    (directory,) = prepared.glob(f"*/{split}")
    return directory


def rewrite(directory, change):
    """Writes a split anew, with the documents that `change(number, ids)` gives, truly sealed."""
    stream = Stream(directory)
    manifest, entries = stream.manifest, []
    for number, entry in enumerate(manifest.shards):
        documents = []
        for ids, table in stream.document_blocks(number):
            parts = np.split(ids, np.cumsum(table["tokens"])[:-1])
            documents += list(zip(parts, table, strict=True))
        (directory / entry.file).unlink()
        writer = pages.ShardWriter(directory / entry.file, manifest.vocab_size)
        for place, (ids, row) in enumerate(documents):
            for new in change((number, place), ids):
                writer.add(new, int(row["record"]), entry.inputs[int(row["input"])])
        entries.append(writer.close())
    pages.write_manifest(directory, dataclasses.replace(manifest, shards=tuple(entries)))


def problems(result):
    return [f"{f.subject}: {f.text}" for f in result.findings if f.level == "problem"]


def warnings(result):
    return [f"{f.subject}: {f.text}" for f in result.findings if f.level == "warning"]


def lines_of(result):
    return "\n".join(f"{f.subject}: {f.text}" for f in result.findings)


# --- prepared storage


def test_nothing_is_wrong_with_what_prepare_wrote(prepared, whole):
    result = audit(prepared, workers=2)
    assert problems(result) == [] and warnings(result) == []
    train, validation = sorted(result.streams, key=lambda stream: stream.name)
    stream = Stream(split_of(prepared))
    ids = stream.read(0, stream.num_tokens)
    assert train.scan.tokens == ids.size and train.scan.documents == stream.manifest.documents
    assert train.scan.token_counts.tolist() == np.bincount(ids, minlength=4096)[
        : len(train.scan.token_counts)
    ].tolist()  # fmt: skip
    assert train.scan.lengths.sum() == train.scan.documents
    # Bytes of text: each document's, and the space that the tokenizer puts before it.
    ends = np.flatnonzero(ids == 2) + 1
    texts = [TOKENIZER.decode(part) for part in np.split(ids, ends)[:-1]]
    assert train.text_bytes == sum(len(text.encode()) + 1 for text in texts)
    assert validation.name == "books validation" and validation.scan.encoded > 0


def twice(number, ids):
    return [ids, ids] if number[1] % 20 == 0 else [ids]


PLANTED = {
    "a run of BOS": (
        lambda n, ids: [np.concatenate([[1] * 40, ids])] if n == (2, 5) else [ids],
        r"00002\.arrayrecord: BOS is missing or too much at 40 places",
    ),
    "no EOS": (lambda n, ids: [ids[:-1]], r"EOS is missing or too much at [\d,]+ places"),
    "documents twice": (twice, r"copies: \d+ of [\d,]+ documents to train on are copies"),
}


@pytest.mark.parametrize("defect", PLANTED)
def test_defects_of_documents(prepared, defect):
    change, told = PLANTED[defect]
    rewrite(split_of(prepared), change)
    found = problems(audit(prepared))
    assert any(re.search(told, line) for line in found), found


def repeat_a_shard(train):
    manifest = pages.read_manifest(train)
    copy = dataclasses.replace(manifest.shards[1], file="00009.arrayrecord")
    for suffix in ("", ".documents"):
        shutil.copy(train / f"00001.arrayrecord{suffix}", train / f"00009.arrayrecord{suffix}")
    pages.write_manifest(train, dataclasses.replace(manifest, shards=(*manifest.shards, copy)))


def forget_a_shard(train):
    manifest = pages.read_manifest(train)
    pages.write_manifest(train, dataclasses.replace(manifest, shards=manifest.shards[:-1]))


def flip_a_bit(train):
    file = train / "00002.arrayrecord"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)


def a_pointer(train):
    (train / "00001.arrayrecord").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )


@pytest.mark.parametrize(
    "damage, told",
    [
        (repeat_a_shard, "the same bytes are there more than once: .*00001.* = .*00009"),
        (repeat_a_shard, "inputs were read into more than one shard: part-01.jsonl"),
        (repeat_a_shard, "documents to train on are copies"),
        (forget_a_shard, "shards that the manifest does not list.*: 00003.arrayrecord"),
        (forget_a_shard, "shards were written but no manifest lists them: train/00003.arrayrecord"),
        (lambda train: (train / "00001.arrayrecord").unlink(), "shards are missing: 00001.arrayr"),
        (flip_a_bit, "00002.arrayrecord has another sha256"),
        (a_pointer, "Git-LFS pointers in place of data: .*00001.arrayrecord"),
        (
            lambda train: (train.parent / "units/00001.json").unlink(),
            "units 1 have no record",
        ),
        (lambda train: (train / "manifest.json").write_text("{}"), "manifest.json is damaged"),
        (lambda train: (train.parent / "units/00003.json").unlink(), "tell of 3 inputs of 4"),
        (
            lambda train: (train.parent / "units/00003.json").unlink(),
            "no unit has a record of",
        ),
    ],
)
def test_defects_of_shards(prepared, damage, told):
    damage(split_of(prepared))
    found = problems(audit(prepared, tokenizer=TOKENIZER))
    assert any(re.search(told, line) for line in found), found


def test_each_damage_of_a_split_is_told_though_a_shard_is_missing(prepared):
    train = split_of(prepared)
    flip_a_bit(train)
    (train / "00001.arrayrecord").unlink()
    found = problems(audit(prepared, tokenizer=TOKENIZER))
    assert any("shards are missing: 00001" in line for line in found)
    assert any("00002.arrayrecord has another sha256" in line for line in found)


def test_the_same_text_prepared_in_two_ways_is_no_defect(prepared, raw):
    prepare_sources(data_config(raw, prepared, boundary="bos"), workers=1)
    result = audit(prepared)
    assert problems(result) == []
    config = Config(data=data_config(raw, prepared, boundary="bos"))
    chosen = audit(prepared, config=config, tokenizer=TOKENIZER)
    assert {stream.boundary for stream in chosen.streams} == {"bos"}
    with pytest.raises(ValueError, match="holds nothing that a run of the config reads"):
        audit(prepared, config=Config(data=data_config(raw, prepared / "elsewhere")))


def test_what_is_held_out_and_trained_on(prepared):
    held_out = Stream(split_of(prepared, "validation"))
    ids, table = next(held_out.document_blocks(0))
    leaked = ids[: table["tokens"][0]]
    rewrite(split_of(prepared), lambda n, own: [own, leaked] if n == (1, 7) else [own])
    (line,) = problems(audit(prepared))
    assert re.fullmatch(r"held out: 1 of \d+ documents are trained on too", line)


def test_another_tokenizer(prepared, tmp_path):
    from tinyllama_jax.data.train_tokenizer import train_tokenizer

    other = Tokenizer.from_bytes(train_tokenizer(["some other text entirely " * 9], 280))
    (line,) = problems(audit(prepared, tokenizer=other))
    assert "prepared with the one of sha256" in line and other.sha256 in line


def test_texts_of_an_evaluation(prepared, raw, tmp_path):
    lines = (raw / "part-02.jsonl").read_text().splitlines()
    words = max((json.loads(line)["text"].split() for line in lines), key=len)
    (tmp_path / "leaked.txt").write_text(f"Question: {' '.join(words[30:50]).upper()}?")
    (tmp_path / "clean.txt").write_text(" ".join(f"word{n}" for n in range(30)))
    files = [tmp_path / "leaked.txt", tmp_path / "clean.txt"]
    (line,) = problems(audit(prepared, evaluation_files=files))
    assert line.startswith("evaluation: documents share runs of 13 words of 2 files: ")
    assert line.endswith("/leaked.txt: 1 documents")
    result = audit(prepared, evaluation_files=files[1:])
    assert problems(result) == []
    assert "no document has any of the runs of 13 words of 1 files" in result.findings[-1].text
    with pytest.raises(ValueError, match="none has a run of 13 words to look for"):
        (tmp_path / "short.txt").write_text("too short")
        audit(prepared, evaluation_files=[tmp_path / "short.txt"])


def test_near_copies(prepared, raw):
    pytest.importorskip("datasketch", reason="needs the [audit] extra")
    result = audit(prepared, near_copies_among=100)
    assert "near copies: 0 of 100 documents are" in lines_of(result)
    train = split_of(prepared)
    _, table = next(Stream(train).document_blocks(0))
    long = next(place for place, row in enumerate(table) if 300 < row["tokens"] < 2000)

    def altered(number, ids):
        return [ids, np.delete(ids, 20)] if number == (0, long) else [ids]

    rewrite(train, altered)
    result = audit(prepared, near_copies_among=2 * long + 10)
    name = f"books: part-00.jsonl, record {table[long]['record']}, token "
    told = f"are nearly a copy of another: {name}\\d+ of {name}\\d+$"
    assert re.search(told, lines_of(result), re.MULTILINE)
    assert not any(f.subject == "copies" and f.level != "ok" for f in result.findings)


def test_runs_of_words_pass_over_case_and_marks():
    grams = grams_of({"a": "The quick, brown fox jumps"}, 3)
    assert files_met("a THE QUICK - brown cat", grams) == {"a"}
    assert files_met("the quick red brown fox", grams) == set()


# --- chunks that lit-gpt packed


@pytest.fixture(scope="module")
def packed(raw):
    """Documents as TinyLlama packed them, by two processes."""
    texts = [
        json.loads(line)["text"]
        for path in sorted(raw.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ][:400]
    ids = [np.array(TOKENIZER.encode(text)) for text in texts]
    return {"train_slim_0": ids[:230], "train_slim_1": ids[230:]}


def test_chunks_as_they_were_published(packed, tmp_path):
    pack(tmp_path, packed, chunk_size=20_000)
    result = audit(tmp_path, tokenizer=TOKENIZER)
    found = problems(result)
    assert len([line for line in found if "chunks were filled up with" in line]) == 2
    assert len([line for line in found if "documents do not end with EOS" in line]) == 2
    assert len(found) == 4
    assert sum(stream.scan.documents for stream in result.streams) == 400


def test_chunks_without_a_defect(packed, tmp_path):
    for prefix, documents in packed.items():
        size = sum(len(ids) + 2 for ids in documents)
        pack(tmp_path, {prefix: documents}, chunk_size=size, eos=True)
    result = audit(tmp_path, tokenizer=TOKENIZER)
    assert problems(result) == [] and warnings(result) == []


def test_chunks_that_are_missing_repeated_or_foreign(packed, tmp_path):
    pack(tmp_path, packed, chunk_size=9_000, eos=True)
    names = sorted(path.name for path in tmp_path.glob("*_1_*.bin"))
    (tmp_path / names[1]).unlink()
    shutil.copy(tmp_path / names[2], tmp_path / names[-1].replace(names[-1][-6:], "50.bin"))
    found = problems(audit(tmp_path, tokenizer=TOKENIZER))
    assert any(f"are missing: {names[1]}" in line for line in found)
    assert any("more than once" in line and names[2] in line for line in found)
    foreign = {"a": [np.arange(3, 500) * 7 % 4096]}
    pack(tmp_path / "foreign", foreign, chunk_size=499, eos=True)
    assert any(
        "give the same ids: they are of another tokenizer" in line
        for line in problems(audit(tmp_path / "foreign", tokenizer=TOKENIZER))
    )
    with pytest.raises(ValueError, match="chunks of ids, which say nothing of their tokenizer"):
        audit(tmp_path)


# --- what a step sees


@pytest.fixture(scope="module")
def training(raw, whole):
    data = dataclasses.replace(data_config(raw, whole), seq_len=S, skip="3:5")
    settings = TrainingConfig(train_tokens=50 * 8 * S, global_batch_tokens=8 * S)
    model = ModelConfig(vocab_size=4096, max_seq_len=S)
    return open_prepared(Config(data=data, training=settings, model=model), TOKENIZER).training


def test_the_documents_of_a_step_are_those_of_its_rows(training):
    for step in (0, 4, 11):
        batch = training.batch_at(step)
        rows = {}
        for seen in seen_at(training, step, TOKENIZER):
            stream = training.windows[seen.document.source].stream
            ids = stream.read(seen.document.start + seen.first, seen.tokens)
            rows.setdefault(seen.row, []).extend(ids.tolist())
            whole = stream.read(seen.document.start, seen.document.tokens)
            assert " ".join(TOKENIZER.decode(whole).split()).startswith(seen.begins[:40])
        for row in range(8):
            assert rows[row] == [batch.tokens[row, 0], *batch.targets[row]]


def test_a_document_is_found_with_its_steps(training, raw):
    steps = 50
    wanted = next(iter(seen_at(training, 9, TOKENIZER))).document
    line = (raw / wanted.input_file).read_text().splitlines()[wanted.record]
    text = json.loads(line)["text"][:200]
    tokens = []
    stream = training.windows["books"].stream
    (found,) = documents_with(stream, text, TOKENIZER, tokens.append)
    assert found == wanted and sum(tokens) == stream.num_tokens
    seen = steps_that_see(training, [found], steps)[found]
    expected = [
        step
        for step in range(steps)
        if any(found == s.document for s in seen_at(training, step, TOKENIZER))
    ]
    assert 9 in seen and seen == expected
    assert list(documents_with(stream, "no such text", TOKENIZER, tokens.append)) == []


# --- the door and the page


def door(*flags, **options):
    return subprocess.run(
        [sys.executable, "-m", "tinyllama_jax.audit", *flags], capture_output=True, text=True,
        **options,
    )  # fmt: skip


def test_the_door(prepared, raw, tmp_path):
    page = tmp_path / "out/audit.html"
    done = door(str(prepared), f"--html={page}", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert "problems: 0, warnings: 0" in done.stdout and "bytes a token" in done.stdout
    assert "Audit of" in page.read_text() and "http" not in page.read_text()
    os.truncate(split_of(prepared) / "00001.arrayrecord", 70_000)
    done = door(str(prepared), "--workers=1")
    assert done.returncode == 1 and "[FAIL] books train: " in done.stdout
    flags = ["--config=configs/tiny_debug.py", f"--config.data.prepared={prepared}"]
    done = door(*flags, "--step=1")
    assert done.returncode == 1 and "is not prepared in" in done.stderr
    flags = ["--config=tests/faults/staged_config.py", "--config.stages.stage1.ramp_tokens=5"]
    done = door(*flags, "--step=1")
    assert done.returncode == 1 and "stage1.ramp_tokens = 5, but it is the first" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_corpus_is_refused(raw):
    with pytest.raises(ValueError, match="holds no prepared corpus"):
        audit(raw)


def test_the_page_escapes_what_it_shows(prepared, tmp_path):
    result = audit(prepared)
    result.findings[0] = dataclasses.replace(result.findings[0], text="<script>")
    write_page(result, prepared, TOKENIZER, tmp_path / "audit.html")
    text = (tmp_path / "audit.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "data:image/png;base64," in text


def test_the_door_finds_what_a_step_sees(tmp_path):
    """A document is told of at once, then its steps, and each of those sees it."""
    flags = ["--config=configs/quickstart.py", f"--config.data.prepared={tmp_path}"]
    subprocess.run(
        [sys.executable, "-m", "tinyllama_jax.prepare", *flags], check=True, capture_output=True
    )
    done = door(*flags, "--find=def heappushpop(heap, item)")
    assert done.returncode == 0, done.stderr
    where, seen = done.stdout.splitlines()
    assert re.fullmatch(r"code: heapq\.py, record 0, \d+ tokens from \d+ on", where)
    name, steps = seen.split(": seen at steps ")
    assert where.startswith(name)
    for step in steps.split(", "):
        assert "code: heapq.py, record 0, tokens" in door(*flags, f"--step={step}").stdout
    done = door(*flags, "--find=no document holds this")
    assert done.stdout == 'no document to train on holds "no document holds this"\n'
    done = door(*flags, "--step=0")
    assert done.returncode == 1 and "--step=0 is none of the run's steps" in done.stderr
