"""The TFDS data sets, built from files in the published shapes and read without TensorFlow."""

import subprocess
import sys

import pytest

from tests.data.test_subsets import document, slim_pajama, starcoder  # noqa: F401 - fixtures

READ = """
import json, sys
import tensorflow_datasets as tfds
from tinyllama_jax.config import DataConfig, SourceConfig
from tinyllama_jax.data import tfds_builders
from tinyllama_jax.data.prepare import prepare_sources

name, data_dir, prepared, settings = sys.argv[1:]
records = [r for r in tfds.data_source(name, data_dir=data_dir, split="train")]
source = SourceConfig(
    name="corpus", path=f"tfds:{data_dir}/{name}/1.0.0", **json.loads(settings)
)
streams = prepare_sources(DataConfig(sources=(source,), prepared=prepared), workers=1)
plain = json.loads(json.dumps(records, default=bytes.decode))
assert "tensorflow" not in sys.modules
print(json.dumps([plain, sorted(streams)]))
"""


def build_and_read(name, manual_dir, tmp_path, settings):
    import json

    build = [sys.executable, "-m", "tinyllama_jax.data.tfds_builders", name]
    build += [f"--manual_dir={manual_dir}", f"--data_dir={tmp_path / 'tfds'}"]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0 and "next: set the path" in built.stdout, built.stderr
    arguments = [name, str(tmp_path / "tfds"), str(tmp_path / "prepared"), json.dumps(settings)]
    done = subprocess.run([sys.executable, "-c", READ, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_slim_pajama(slim_pajama, tmp_path):  # noqa: F811
    (tmp_path / "SlimPajama-627B").symlink_to(slim_pajama.parent)
    settings = {"subset_key": "meta.redpajama_set_name", "subsets": "-RedPajamaGithub"}
    records, streams = build_and_read("tinyllama_slim_pajama", tmp_path, tmp_path, settings)
    expected = [document(number) for number in range(240)]
    assert [(r["text"], r["meta"]["redpajama_set_name"]) for r in records] == expected
    assert streams == ["corpus.RedPajamaBook", "corpus.RedPajamaC4"]


def test_starcoder(starcoder, tmp_path):  # noqa: F811
    (tmp_path / "starcoderdata").symlink_to(starcoder)
    settings = {"text_key": "content", "subset_key": "language", "subsets": "python,agda"}
    records, streams = build_and_read("tinyllama_starcoder", tmp_path, tmp_path, settings)
    assert [r["language"] for r in records] == ["agda"] * 3 + ["c-sharp"] * 30 + ["python"] * 60
    assert records[3]["content"].startswith("<reponame>c-sharp 0</s> ")
    assert records[3]["max_stars_repo_name"] == "someone/something"
    assert streams == ["corpus.agda", "corpus.python"]


def builder_of(tmp_path):
    from tinyllama_jax.data import tfds_builders

    return tfds_builders.TinyllamaSlimPajama(data_dir=str(tmp_path / "tfds"))


def build(builder, manual_dir, **options):
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir=str(manual_dir), **options)
    builder.download_and_prepare(download_config=config)


def test_written_a_few_at_a_time_in_many_shards(slim_pajama, tmp_path, monkeypatch):  # noqa: F811
    from tinyllama_jax.data import tfds_builders

    monkeypatch.setattr(tfds_builders, "_CHARS_AT_ONCE", 300)
    monkeypatch.setattr(tfds_builders, "_EXAMPLES_PER_SHARD", 7)
    (tmp_path / "SlimPajama-627B").symlink_to(slim_pajama.parent)
    builder = builder_of(tmp_path)
    build(builder, tmp_path)
    assert len(builder.info.splits["train"].shard_lengths) == 35
    records = builder.as_data_source(split="train")
    found = [(r["text"].decode(), r["meta"]["redpajama_set_name"].decode()) for r in records]
    assert found == [document(number) for number in range(240)]


def test_a_trial_of_a_few(slim_pajama, tmp_path):  # noqa: F811
    (tmp_path / "SlimPajama-627B").symlink_to(slim_pajama.parent)
    builder = builder_of(tmp_path)
    build(builder, tmp_path, max_examples_per_split=10)
    assert builder.info.splits["train"].num_examples == 10


def test_nothing_to_read_is_no_data_set(tmp_path):
    (tmp_path / "SlimPajama-627B").mkdir()
    with pytest.raises(ValueError, match=r"holds nothing to read\. Put the repository cerebras/Sl"):
        build(builder_of(tmp_path), tmp_path)
    (tmp_path / "SlimPajama-627B/train").mkdir()
    (tmp_path / "SlimPajama-627B/train/example_0.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the files of train hold nothing"):
        build(builder_of(tmp_path), tmp_path)
    assert not (tmp_path / "tfds/tinyllama_slim_pajama/1.0.0").exists()  # so it can be done again


def test_another_format_is_refused(tmp_path):
    from tinyllama_jax.data import tfds_builders

    with pytest.raises(ValueError, match="it is written as array_record, not riegeli"):
        tfds_builders.TinyllamaSlimPajama(data_dir=str(tmp_path), file_format="riegeli")


def test_what_was_not_downloaded(tmp_path):
    build = [sys.executable, "-m", "tinyllama_jax.data.tfds_builders", "tinyllama_starcoder"]
    build += [f"--manual_dir={tmp_path}", f"--data_dir={tmp_path / 'tfds'}"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 1
    assert "starcoderdata does not exist. Put the repository bigcode/starcoderdata" in done.stderr
