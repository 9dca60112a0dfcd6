"""Preparation gives the documents' stream, the same bytes however it is interrupted or divided."""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data import pages, prepare, units
from tinyllama_jax.data.prepared import is_prepared
from tinyllama_jax.data.sources import Tally, list_inputs, read_documents
from tinyllama_jax.data.stream import ShardReaders, Stream
from tinyllama_jax.text.tokenizer import SHIPPED_MODEL, Tokenizer

PREPARE = """
import sys
from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data.prepare import prepare_sources
path, prepared, workers = sys.argv[1:]
source = SourceConfig(name="books", path=path, validation_fraction=0.1)
prepare_sources(DataConfig(sources=(source,), prepared=prepared), workers=int(workers))
"""


def write_corpus(directory, *, files, documents, seed=0):
    """JSONL files of random documents; about 1.2 kB a document."""
    choose = random.Random(seed)
    words = [
        "".join(choose.choices("etaoinshrdlucmfw", k=choose.randrange(1, 9))) for _ in range(3000)
    ]
    directory.mkdir()
    for number in range(files):
        with open(directory / f"part-{number:02d}.jsonl", "w") as file:
            for _ in range(documents):
                text = " ".join(choose.choices(words, k=choose.randrange(10, 400)))
                file.write(json.dumps({"text": text}) + "\n")
    return directory


def config(path, prepared, **settings):
    source = SourceConfig(name="books", path=str(path), validation_fraction=0.1)
    return DataConfig(sources=(source,), prepared=str(prepared), **settings)


def contents(directory):
    """Every file below a directory by relative name."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def stream_of(directory, split):
    stream = Stream(directory / split, ShardReaders())
    return stream.read(0, stream.num_tokens)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six files of about 1 MB: six units."""
    return write_corpus(tmp_path_factory.mktemp("raw") / "books", files=6, documents=1100)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("small") / "books", files=3, documents=40)


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """The prepared directory of `corpus`, written in one go by this process."""
    prepared = tmp_path_factory.mktemp("reference")
    return prepare.prepare_sources(config(corpus, prepared), workers=1)["books"]


# --- what is written


@pytest.mark.parametrize("boundary", ["bos+eos", "bos", "eos"])
def test_the_stream_is_the_documents_with_their_boundaries(small, tmp_path, boundary):
    data = config(small, tmp_path, boundary=boundary)
    directory = prepare.prepare_sources(data, workers=1)["books"]
    tokenizer = Tokenizer()
    before = [1] if "bos" in boundary else []
    after = [2] if "eos" in boundary else []
    expected = {"train": [], "validation": []}
    for entry in list_inputs(data.sources[0]):
        for document in read_documents(data.sources[0], entry, Tally()):
            ids = [*before, *tokenizer.encode(document.text), *after]
            expected["validation" if document.validation else "train"].append(ids)
    for split, documents in expected.items():
        assert documents
        ids = stream_of(directory, split)
        assert ids.tolist() == [i for document in documents for i in document]
        manifest = pages.read_manifest(directory / split)
        assert (manifest.documents, manifest.tokens) == (len(documents), ids.size)
        assert (manifest.source, manifest.split) == ("books", split)
        assert (manifest.tokenizer_sha256, manifest.boundary) == (tokenizer.sha256, boundary)


def test_the_stream_decodes_to_the_documents(reference, corpus):
    source = config(corpus, "").sources[0]
    tokenizer = Tokenizer()
    expected = [
        document.text
        for entry in list_inputs(source)
        for document in read_documents(source, entry, Tally())
        if not document.validation
    ]
    ids = stream_of(reference, "train")
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    decoded = [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]
    assert decoded == expected


def test_no_run_of_bos_and_no_padding(reference):
    for split in units.SPLITS:
        ids = stream_of(reference, split)
        starts, ends = np.flatnonzero(ids == 1), np.flatnonzero(ids == 2)
        assert starts[0] == 0 and ends[-1] == ids.size - 1
        assert np.array_equal(starts[1:], ends[:-1] + 1)  # each BOS but the first follows an EOS
        assert (ends > starts + 1).all()  # no document is empty
        assert not (ids == 0).any()


def test_each_document_is_traced_to_its_file_and_line(reference, corpus):
    stream = Stream(reference / "train", ShardReaders())
    tokenizer = Tokenizer()
    for offset in (0, stream.num_tokens // 2, stream.num_tokens - 1):
        (document,) = stream.documents(offset, offset + 1)
        line = (corpus / document.input_file).read_text().split("\n")[document.record]
        ids = stream.read(document.start, document.tokens)
        assert tokenizer.decode(ids) == json.loads(line)["text"]


# --- the same bytes


def test_two_workers_write_the_bytes_of_one(corpus, reference, tmp_path):
    directory = prepare.prepare_sources(config(corpus, tmp_path), workers=2)["books"]
    assert directory.name == reference.name
    assert contents(directory) == contents(reference)
    assert len(pages.read_manifest(directory / "train").shards) == 6


def _wait_for(process, appears):
    deadline = time.monotonic() + 60
    while not appears():
        assert process.poll() is None, "it was not killed in time"
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "parent"])
def test_a_killed_run_continues_to_the_same_bytes(corpus, reference, tmp_path, whole_group):
    """SIGKILL while shards are written, then with units finished; workers killed or orphaned."""
    directory = tmp_path / reference.name
    command = [sys.executable, "-c", PREPARE, str(corpus), str(tmp_path), "2"]

    def records():
        return len(list(directory.glob("units/*.json")))

    moments = [
        lambda: any(directory.glob("units/*.work/*/*.partial")),
        lambda: records() >= 1,
        lambda: records() >= 3,
    ]
    for appears in moments:
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        _wait_for(process, appears)
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        assert not (directory / "train" / pages.MANIFEST_FILE).exists()
    kept = {path: path.stat().st_mtime_ns for path in directory.glob("units/*.json")}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if whole_group:  # finished units were not done again
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(directory) == contents(reference)


def test_a_lost_or_shortened_shard_is_written_again(corpus, reference, tmp_path):
    directory = tmp_path / reference.name
    shutil.copytree(reference, directory)
    os.truncate(directory / "train" / "00003.arrayrecord", 5000)
    (directory / "validation" / "00004.arrayrecord").unlink()
    assert not is_prepared(SourceConfig(name="books"), directory)
    prepare.prepare_sources(config(corpus, tmp_path), workers=1)
    assert contents(directory) == contents(reference)


# --- reuse


def test_a_second_run_reuses_what_is_there(small, tmp_path, monkeypatch):
    first = prepare.prepare_sources(config(small, tmp_path), workers=1)

    def refuse(*_):
        raise AssertionError("it was tokenized again")

    monkeypatch.setattr(prepare, "run_units", refuse)
    assert prepare.prepare_sources(config(small, tmp_path), workers=1) == first


def test_the_directory_follows_everything_that_changes_the_bytes(small, tmp_path):
    base = config(small, tmp_path)

    def name(data):
        return prepare.examine_source(data.sources[0], data, Tokenizer(data.tokenizer))[0].name

    def of_source(**changes):
        return dataclasses.replace(base, sources=(dataclasses.replace(base.sources[0], **changes),))

    copy = shutil.copytree(small, tmp_path / "moved")
    assert name(base) == name(of_source(path=str(copy), weight=3.0))
    assert name(base) == name(dataclasses.replace(base, seq_len=17, seed=3, prepared="elsewhere"))
    edited = copy / "part-01.jsonl"
    edited.write_bytes(edited.read_bytes().replace(b"e", b"a"))  # of the same size
    another = tmp_path / "another.model"  # the same pieces in another file
    another.write_bytes(SHIPPED_MODEL.read_bytes() + b"\x1a\x00")
    names = [
        name(base),
        name(of_source(path=str(copy))),
        name(of_source(text_key="body")),
        name(of_source(separator="--")),
        name(of_source(validation_fraction=0.2)),
        name(of_source(path=str(small / "part-0[01].jsonl"))),
        name(dataclasses.replace(base, boundary="eos")),
        name(of_source(format="text", path=str(small / "*.jsonl"))),
        name(dataclasses.replace(base, tokenizer=str(another))),
    ]
    assert len(set(names)) == len(names)


def test_a_large_vocabulary(small, tmp_path, test_data):
    llama = Tokenizer(str(test_data / "tokenizer" / "tokenizer.model"))
    path = str(test_data / "tokenizer" / "tokenizer.model")
    directory = prepare.prepare_sources(config(small, tmp_path, tokenizer=path), workers=1)["books"]
    (shard,) = pages.read_manifest(directory / "train").shards[:1]
    assert pages.read_manifest(directory / "train").vocab_size == llama.vocab_size == 32000
    assert shard.tokens > 1000


def test_the_raw_text_is_not_needed_where_it_was_prepared(small, tmp_path, capfd):
    """As on a machine with accelerators, to which only the prepared directory was brought."""
    raw = shutil.copytree(small, tmp_path / "raw")
    data = config(raw, tmp_path / "prepared")
    directory = prepare.prepare_sources(data, workers=1)["books"]
    shutil.rmtree(raw)
    assert prepare.prepare_sources(data, workers=1) == {"books": directory}
    assert f"books: its raw text is not here; taking {directory}" in capfd.readouterr().out
    for changed in (
        dataclasses.replace(data, boundary="eos"),
        dataclasses.replace(data, prepared=str(tmp_path / "elsewhere")),
    ):
        with pytest.raises(ValueError, match=r"\" does not exist.*or bring what was prepared"):
            prepare.prepare_sources(changed, workers=1)
    misspelt = config(tmp_path / "rwa", tmp_path / "prepared")  # must not give another's text
    with pytest.raises(ValueError, match=r"rwa\" does not exist.* is .* of path '.*raw': set path"):
        prepare.prepare_sources(misspelt, workers=1)
    shutil.copytree(directory, directory.with_name("books-copy"))
    with pytest.raises(
        ValueError, match=r"Several corpora were prepared of it.*remove all but one"
    ):
        prepare.prepare_sources(data, workers=1)
    shutil.rmtree(directory.with_name("books-copy"))
    (directory / "train" / pages.MANIFEST_FILE).unlink()  # not prepared to the end
    with pytest.raises(ValueError, match="or bring what was prepared"):
        prepare.prepare_sources(data, workers=1)


def test_two_starts_at_once_both_succeed(small, tmp_path):
    """Each may find the other's work in progress; neither fails, and the bytes are the same."""
    expected = contents(
        prepare.prepare_sources(config(small, tmp_path / "one"), workers=1)["books"]
    )
    for number in range(4):
        prepared = tmp_path / f"both{number}"
        command = [sys.executable, "-c", PREPARE, str(small), str(prepared), "1"]
        both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
        assert [process.wait() for process in both] == [0, 0]
        (directory,) = prepared.iterdir()
        assert contents(directory) == expected


def test_work_that_another_start_took_for_abandoned_is_begun_again(small, tmp_path, monkeypatch):
    """It may look between a directory's making and its locking."""
    locked = units._locked
    removed = []

    def late(path):
        if not removed and path.name.endswith(".work"):
            removed.append(path)
            shutil.rmtree(path)
        return locked(path)

    monkeypatch.setattr(units, "_locked", late)
    directory = prepare.prepare_sources(config(small, tmp_path), workers=1)["books"]
    assert removed and is_prepared(SourceConfig(name="books"), directory)
    assert not list(directory.glob("units/*.work"))


def test_a_document_of_10_mb_comes_back(tmp_path):
    text = " ".join(f"{i} {i * i % 7919}" for i in range(900_000))
    assert len(text) > 10_000_000
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps({"text": "before"}) + "\n" + json.dumps({"text": text}) + "\n")
    source = SourceConfig(name="books", path=str(raw), validation_fraction=0.0)
    data = DataConfig(sources=(source,), prepared=str(tmp_path))
    directory = prepare.prepare_sources(data, workers=1)["books"]
    tokenizer = Tokenizer()
    ids = stream_of(directory, "train")
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]] == ["before", text]


FEW_FILES = """
import pickle, resource, sys
from tinyllama_jax.data.prepare import prepare_sources
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
prepare_sources(pickle.load(sys.stdin.buffer), workers=1)
"""


def _prepared_with_few_files(data, limit):
    command = [sys.executable, "-c", FEW_FILES, str(limit)]
    return subprocess.run(command, input=pickle.dumps(data), capture_output=True)


def test_few_descriptors_are_enough_for_many_languages(tmp_path):
    """86, as Starcoderdata has, in one unit, each with documents to train on and to hold out."""
    for number in range(86):
        (tmp_path / f"raw/{number}").mkdir(parents=True)
        lines = [json.dumps({"text": f"{number} {document}"}) for document in range(40)]
        (tmp_path / f"raw/{number}/a.jsonl").write_text("\n".join(lines))
    source = SourceConfig(
        name="code", path=str(tmp_path / "raw"), subset_key="directory", validation_fraction=0.2
    )
    data = DataConfig(sources=(source,), prepared=str(tmp_path / "prepared"))
    done = _prepared_with_few_files(data, 256)
    assert done.returncode == 0, done.stderr
    streams = prepare.prepare_sources(data)
    assert len(streams) == 86
    documents = [
        Stream(directory / split).manifest.documents
        for directory in streams.values()
        for split in ("train", "validation")
    ]
    assert sum(documents) == 86 * 40 and min(documents) > 0


@pytest.mark.parametrize("files", [1, 300])
def test_more_subsets_than_files_may_be_open(tmp_path, files):
    """Whether a file to be read, or one to be written, is the one too many."""
    (tmp_path / "raw").mkdir()
    for number in range(files):
        records = [{"text": "a b c", "of": f"s{number + n}"} for n in range(300 // files)]
        lines = "\n".join(map(json.dumps, records))
        (tmp_path / f"raw/{number}.jsonl").write_text(lines)
    source = SourceConfig(name="code", path=str(tmp_path / "raw"), subset_key="of")
    data = DataConfig(sources=(source,), prepared=str(tmp_path / "prepared"))
    done = _prepared_with_few_files(data, 64)
    assert b"a process may have 64 files open here" in done.stderr
    assert b"Too many open files" in done.stderr and b"ulimit -n 4096" in done.stderr
    assert b"make room" not in done.stderr
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_record_of_a_unit_is_work_to_do(corpus, reference, tmp_path):
    directory = tmp_path / reference.name
    shutil.copytree(reference, directory)
    (directory / "units" / "00002.json").write_bytes(b"")
    (directory / "train" / pages.MANIFEST_FILE).unlink()
    prepare.prepare_sources(config(corpus, tmp_path), workers=1)
    assert contents(directory) == contents(reference)


# --- refusals and counts


def test_counts_are_printed(tmp_path, capfd):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": ""}\n{"text": "more"}\n')
    source = SourceConfig(name="books", path=str(raw), validation_fraction=0.0)
    prepare.prepare_sources(DataConfig(sources=(source,), prepared=str(tmp_path)), workers=1)
    printed = capfd.readouterr().out
    assert "books: 2 documents" in printed
    assert "books: skipped 1 empty documents" in printed
    assert "books: repaired 1 documents with bytes that are not UTF-8" in printed


def test_a_source_without_text(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"has no document to train on \(1 skipped"):
        prepare.prepare_sources(config(tmp_path / "a.txt", tmp_path), workers=1)


def test_documents_without_a_token_are_skipped_and_counted(tmp_path, capfd):
    """A model that normalises away all of a text would leave BOS beside BOS."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    words = ["hello world and more of it"] * 50
    SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=19, minloglevel=2
    )
    (tmp_path / "default.model").write_bytes(model.getvalue())
    raw = tmp_path / "raw.jsonl"
    documents = ["hello", "\u200b", "\u200b\ufeff", "world"]
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    source = SourceConfig(name="books", path=str(raw), validation_fraction=0.0)
    data = DataConfig(
        sources=(source,), prepared=str(tmp_path), boundary="bos",
        tokenizer=str(tmp_path / "default.model"),
    )  # fmt: skip
    directory = prepare.prepare_sources(data, workers=1)["books"]
    ids = stream_of(directory, "train")
    assert (ids == 1).sum() == 2 and not ((ids[1:] == 1) & (ids[:-1] == 1)).any()
    assert pages.read_manifest(directory / "train").documents == 2
    printed = capfd.readouterr().out
    assert "books: 2 documents" in printed and "skipped 2 documents without tokens" in printed


def test_a_separator_that_is_not_there_is_said(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("one document " * 10)
    source = SourceConfig(
        path=str(tmp_path / "a.txt"), name="books", separator="<|end|>", validation_fraction=0.0
    )
    data = DataConfig(sources=(source,), prepared=str(tmp_path))
    prepare.prepare_sources(data, workers=1)
    assert (
        "separator = '<|end|>' gave no more documents than there are files"
        in capfd.readouterr().out
    )


def test_no_validation_is_said(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("one short document")
    prepare.prepare_sources(config(tmp_path / "a.txt", tmp_path), workers=1)
    assert "none of its 1 documents fell into validation" in capfd.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_a_malformed_line_stops_everything_and_is_named(tmp_path, workers):
    raw = write_corpus(tmp_path / "raw", files=3, documents=900)
    with open(raw / "part-01.jsonl", "a") as file:
        file.write('{"text": "cut sho')
    data = config(raw, tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"part-01\.jsonl:901: this line is not JSON"):
        prepare.prepare_sources(data, workers=workers)
    assert not list((tmp_path / "prepared").rglob("*.partial"))
    assert not list((tmp_path / "prepared").glob("*/train/manifest.json"))


def test_more_than_the_caller_has_time_for(small, tmp_path):
    data = config(small, tmp_path)
    with pytest.raises(ValueError, match=r"not prepared yet.*run python -m tinyllama_jax.prepare"):
        prepare.prepare_sources(data, workers=1, max_bytes=100)
    directories = prepare.prepare_sources(data, workers=1)
    assert prepare.prepare_sources(data, workers=1, max_bytes=100) == directories


def test_a_tokenizer_without_the_boundary_piece(tmp_path, small):
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto.FromString(Tokenizer().model_proto)
    spec.trainer_spec.eos_id = -1
    del spec.pieces[2]
    spec.trainer_spec.vocab_size = 4095
    model = tmp_path / "no_eos.model"
    model.write_bytes(spec.SerializeToString())
    with pytest.raises(ValueError, match=r'data\.boundary = "bos\+eos", but .* no EOS piece'):
        prepare.prepare_sources(config(small, tmp_path, tokenizer=str(model)))
    assert prepare.prepare_sources(
        config(small, tmp_path, tokenizer=str(model), boundary="bos"), workers=1
    )


def test_a_worker_that_dies_is_reported(corpus, tmp_path, monkeypatch):
    from tinyllama_jax.data import workers

    start = workers._Worker.__init__

    def start_and_die(self, *arguments):
        start(self, *arguments)
        self._process.kill()

    monkeypatch.setattr(workers._Worker, "__init__", start_and_die)
    with pytest.raises(RuntimeError, match=r"a worker process ended with code -9.*fewer workers"):
        prepare.prepare_sources(config(corpus, tmp_path), workers=2)


def test_a_full_disk_stops_with_its_name_and_the_next_run_continues(corpus, reference, tmp_path):
    """On a real file system of 3 MB that is then enlarged, in a mount namespace of its own."""
    script = textwrap.dedent(f"""
        mount -t tmpfs -o size=3m tmpfs {tmp_path} || exit 77
        python="$1"; shift
        "$python" -c "$1" "$2" {tmp_path} 2 2>&1 && exit 1
        echo "left: $(find {tmp_path} -name '*.partial' -o -name '*.work' -o -name manifest.json)"
        echo records: $(ls {tmp_path}/*/units/*.json | wc -l)
        mount -o remount,size=64m {tmp_path} || exit 77
        "$python" -c "$1" "$2" {tmp_path} 2 > /dev/null || exit 2
        cp -r {tmp_path}/{reference.name} "$3"
    """)
    result_directory = pathlib.Path(str(tmp_path) + "-result")
    arguments = [sys.executable, PREPARE, str(corpus), str(result_directory)]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare, to mount a small disk")
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"may not mount a small disk here: {result.stderr.strip()[-200:]}")
    assert result.returncode == 0, result.stdout + result.stderr
    failure, kept = result.stdout.split("records:")
    failure, left = failure.split("left:")
    assert "OSError" in failure and str(tmp_path) in failure and "disk" in failure
    assert "start again" in failure
    assert not left.strip()  # no half shard
    assert 1 <= int(kept) < 6
    assert contents(result_directory) == contents(reference)


@pytest.mark.slow
def test_memory_does_not_follow_the_size_of_a_file(tmp_path):
    """60 MB more text in one file, and so in one unit, costs little beside its document index."""
    program = PREPARE + "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for documents in (4_000, 54_000):
        raw = write_corpus(tmp_path / f"raw{documents}", files=1, documents=documents)
        command = [sys.executable, "-c", program, str(raw), str(tmp_path), "1"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout.split()[-1]) * 1024)
    assert peaks[1] - peaks[0] < 30_000_000


def test_the_door(small, tmp_path):
    config_file = tmp_path / "mine.py"
    config_file.write_text(
        textwrap.dedent(f"""
        from tinyllama_jax.config import default_config, source

        def get_config():
            config = default_config()
            config.model.update(vocab_size=4096, max_seq_len=256)
            config.data.update(seq_len=256, prepared={str(tmp_path / "prepared")!r})
            config.training.update(
                train_tokens=10**6, global_batch_tokens=1024, micro_batch_size=4)
            config.optimizer.warmup_steps = 10
            config.data.sources.books = source(path={str(small)!r}, validation_fraction=0.1)
            return config
        """)
    )
    command = [sys.executable, "-m", "tinyllama_jax.prepare", f"--config={config_file}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    manifest = pages.read_manifest(next((tmp_path / "prepared").glob("books-*")) / "train")
    assert f"{manifest.tokens:,}" in result.stdout
    assert result.stdout.endswith(f"next: python -m tinyllama_jax.train --config={config_file}\n")

    result = subprocess.run(
        [*command, f"--config.data.sources.books.path={tmp_path}/absent"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "absent" in result.stderr and "Traceback" not in result.stderr
