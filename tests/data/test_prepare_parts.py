"""One corpus prepared by many: parts on machines that share a disk, and Apache Beam."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.data.test_prepare import config, contents, write_corpus
from tinyllama_jax.data.embedded import library_root
from tinyllama_jax.data.prepare import finish_sources, prepare_part, prepare_sources
from tinyllama_jax.data.prepared import is_prepared

pytestmark = pytest.mark.usefixtures("one_file_each")
DOOR = [sys.executable, "-m", "tinyllama_jax.prepare", "--config=configs/tiny_debug.py"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Five files: five units."""
    return write_corpus(tmp_path_factory.mktemp("raw") / "books", files=5, documents=120)


@pytest.fixture(scope="module")
def whole(corpus, one_file_each, tmp_path_factory):
    """Prepared in one go."""
    data = config(corpus, tmp_path_factory.mktemp("whole"))
    return prepare_sources(data, workers=1)["books"]


def test_parts_make_the_same_bytes_as_one_machine(corpus, whole, tmp_path, capsys):
    data = config(corpus, tmp_path)
    for part in (2, 0, 1):
        with pytest.raises(ValueError, match=r"books: \d of 5 units are not prepared, the first"):
            finish_sources(data)
        assert prepare_part(data, part, 3, workers=1) == (2, 2, 1)[part]
        assert prepare_part(data, part, 3, workers=1) == 0  # it was done
    assert not is_prepared(data.sources[0], tmp_path / whole.name)
    assert finish_sources(data) == {"books": tmp_path / whole.name}
    assert contents(tmp_path / whole.name) == contents(whole)
    assert "MB of raw text, 1 processes\nit will take about 0.00" in capsys.readouterr().out


def test_what_no_part_has_done_is_done_without_any(corpus, whole, tmp_path):
    data = config(corpus, tmp_path)
    prepare_part(data, 1, 2, workers=1)
    prepare_sources(data, workers=1)
    assert contents(tmp_path / whole.name) == contents(whole)


@pytest.mark.parametrize("suffix", ["", ".documents"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_flipped_bit_is_found_and_written_anew(corpus, whole, tmp_path, suffix, finished):
    data = config(corpus, tmp_path)
    directory = tmp_path / whole.name
    shutil.copytree(whole, directory)
    if not finished:
        for split in ("train", "validation"):
            (directory / split / "manifest.json").unlink()
    file = directory / "train" / f"00003.arrayrecord{suffix}"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"00003\.arrayrecord.* has another sha256.* those 1 of 5"):
        finish_sources(data)
    prepare_sources(data, workers=1)
    assert finish_sources(data) == {"books": directory}
    assert contents(directory) == contents(whole)


def test_a_record_of_other_inputs_is_refused(corpus, whole, tmp_path):
    directory = tmp_path / whole.name
    shutil.copytree(whole, directory)
    (directory / "train/manifest.json").unlink()
    os.replace(directory / "units/00001.json", directory / "units/00002.json")
    with pytest.raises(ValueError, match=r"tells of 1 inputs, from part-01.jsonl on, where"):
        finish_sources(config(corpus, tmp_path))


def test_there_is_no_such_part(corpus, tmp_path):
    with pytest.raises(ValueError, match="no part 3 of 3: parts are numbered from 0"):
        prepare_part(config(corpus, tmp_path), 3, 3)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--part=3"], 'error: --part="3" is not K/N, as 0/8 for the first of 8'),
        (["--part=0/2", "--finish"], "error: --part goes without --finish"),
        (["--part=2/2"], "error: there is no part 2 of 2"),
        (["extra"], "error: ['extra'] are not flags"),
    ],
)
def test_the_door_refuses(flags, told, tmp_path):
    done = subprocess.run(
        [*DOOR, f"--config.data.prepared={tmp_path}", *flags], capture_output=True, text=True
    )
    assert done.returncode == 1 and told in done.stderr, done.stderr


def test_the_door_in_two_parts(tmp_path):
    door = [*DOOR, f"--config.data.prepared={tmp_path / 'parts'}", "--workers=1"]
    for source, package in (("code", "asyncio"), ("text", "email")):  # of the standard library
        files = library_root() / package / "*.py"
        door += [f"--config.data.sources.{source}.{setting}" for setting in
                 ("format=text", f"path={files}", "validation_fraction=0.1")]  # fmt: skip
    parts = [
        subprocess.Popen([*door, f"--part={part}/2"], stdout=subprocess.PIPE, text=True)
        for part in range(2)
    ]
    for number, part in enumerate(parts):
        printed, _ = part.communicate()
        assert part.returncode == 0 and f"part {number} of 2 is done (" in printed, printed
    done = subprocess.run([*door, "--finish"], capture_output=True, text=True)
    assert done.returncode == 0 and "next: python -m tinyllama_jax.train" in done.stdout
    again = subprocess.run([*door], capture_output=True, text=True)
    assert again.returncode == 0 and "processes" not in again.stdout  # nothing is left to do


def test_beam_makes_the_same_bytes(corpus, whole, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the [beam] extra")
    from tinyllama_jax.data import beam

    data = config(corpus, tmp_path)
    prepare_part(data, 1, 3, workers=1)  # and goes on where others ended
    directories = prepare_sources(data, workers=2, runner=beam.run_units)
    assert contents(directories["books"]) == contents(whole)
