"""SlimPajama and Starcoderdata as TFDS data sets, in ArrayRecord and without TensorFlow.

    python -m tinyllama_jax.data.tfds_builders tinyllama_slim_pajama --manual_dir=DOWNLOADS

reads `DOWNLOADS/SlimPajama-627B/{train,validation,test}` or `DOWNLOADS/starcoderdata`, as they are
published. Afterwards, with this module imported, `tfds.data_source("tinyllama_slim_pajama")` gives
their records, and `tfds:tinyllama_slim_pajama` is a path of a source.

Preparing reads the published files themselves, by all cores, and needs none of this.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data import formats
from tinyllama_jax.data.parquet_pages import bounded_batches, open_parquet
from tinyllama_jax.data.sources import list_inputs

_SET = "redpajama_set_name"
_EXAMPLES_PER_SHARD = 1_000_000
_CHARS_AT_ONCE = 1 << 24


class _FromDownloads(tfds.core.GeneratorBasedBuilder):
    """A data set that is downloaded by hand, and kept in the order of its files."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: tfds.features.FeaturesDict
    DIRECTORY: str  # below the manual directory
    skip_registration = True

    def __init__(self, *, file_format: Any = "array_record", **options: Any):
        wanted = tfds.core.FileFormat.from_value(file_format)
        if wanted is not tfds.core.FileFormat.ARRAY_RECORD:
            raise ValueError(f"it is written as array_record, not {wanted.value}")
        super().__init__(file_format=wanted, **options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=self.FEATURES, disable_shuffling=True, description=self.__doc__
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Writes examples as they come, a few at a time.

        TFDS's own way holds a split in memory while it is written, and beyond 1 GB on disk, by
        TensorFlow.
        """
        info = self._info()  # of where it is written; its own knows of where it will be
        writer = tfds.core.SequentialWriter(info, _EXAMPLES_PER_SHARD, file_format="array_record")
        splits = self._split_generators(dl_manager)
        if not splits:
            raise ValueError(
                f"{self._directory(dl_manager)} holds nothing to read. "
                f"{self.MANUAL_DOWNLOAD_INSTRUCTIONS}"
            )
        writer.initialize_splits(list(splits))
        most = getattr(download_config, "max_examples_per_split", None)
        for split, examples in splits.items():
            batch, chars = [], 0
            for _, example in itertools.islice(examples, most):
                batch.append(example)
                chars += sum(len(value) for value in example.values())
                if chars >= _CHARS_AT_ONCE:
                    writer.add_examples({split: batch})
                    batch, chars = [], 0
            writer.add_examples({split: batch})
        writer.close_all()
        for split, found in info.splits.items():
            if not found.num_examples:
                raise ValueError(f"the files of {split} hold nothing")
        self.info.set_splits(info.splits)

    def _directory(self, dl_manager: Any) -> pathlib.Path:
        directory = pathlib.Path(dl_manager.manual_dir) / self.DIRECTORY
        if not directory.is_dir():
            raise ValueError(f"{directory} does not exist. {self.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        return directory


class TinyllamaSlimPajama(_FromDownloads):
    """SlimPajama-627B: deduplicated text of RedPajama, with the subset of each document."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the repository cerebras/SlimPajama-627B of the Hugging Face Hub into "
        "MANUAL_DIR/SlimPajama-627B: train/chunk*/example_*.jsonl.zst, and validation and test."
    )
    FEATURES = tfds.features.FeaturesDict(
        {"text": tfds.features.Text(), "meta": {_SET: tfds.features.Text()}}
    )
    DIRECTORY = "SlimPajama-627B"
    skip_registration = False

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        directory = self._directory(dl_manager)
        splits = [
            split for split in ("train", "validation", "test") if (directory / split).is_dir()
        ]
        return {split: self._generate_examples(directory / split) for split in splits}

    def _generate_examples(self, directory: pathlib.Path) -> Iterator[tuple[str, dict]]:
        keys = formats.Keys("text", f"meta.{_SET}")
        for entry in list_inputs(SourceConfig(name=self.name, path=str(directory))):
            records = formats.read_jsonl(
                entry.path, keys, collections.Counter(), lambda count: None
            )
            for record in records:
                text = formats.without_surrogates(record.text, collections.Counter())
                yield (
                    f"{entry.name}:{record.number}",
                    {"text": text, "meta": {_SET: record.subset}},
                )


class TinyllamaStarcoder(_FromDownloads):
    """Starcoderdata: permissively licensed code, with its language and repository."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the repository bigcode/starcoderdata of the Hugging Face Hub, whose terms must be "
        "accepted there, into MANUAL_DIR/starcoderdata: a directory of parquet for each language."
    )
    COLUMNS = ("content", "max_stars_repo_name", "max_stars_repo_path", "id")
    FEATURES = tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in (*COLUMNS, "language")}
    )
    DIRECTORY = "starcoderdata"
    skip_registration = False

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(self._directory(dl_manager))}

    def _generate_examples(self, directory: pathlib.Path) -> Iterator[tuple[str, dict]]:
        import pyarrow

        source = SourceConfig(name=self.name, path=str(directory), format="parquet")
        for entry in list_inputs(source):
            language, number = entry.name.partition("/")[0], 0
            with open_parquet(entry.path) as file:
                # Issues, commits and notebooks lack some of them.
                columns = [name for name in self.COLUMNS if name in file.schema_arrow.names]
                for batch in bounded_batches(entry.path, file, columns, formats.ROWS_PER_BATCH):
                    # As bytes: pyarrow does not check that strings are UTF-8.
                    texts = batch.cast(
                        pyarrow.schema([(name, pyarrow.large_binary()) for name in columns])
                    )
                    for row in texts.to_pylist():
                        values = {
                            name: (row.get(name) or b"").decode(errors="replace")
                            for name in self.COLUMNS
                        }
                        yield f"{entry.name}:{number}", {**values, "language": language}
                        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds a TFDS data set from downloaded files.")
    parser.add_argument("name", choices=[TinyllamaSlimPajama.name, TinyllamaStarcoder.name])
    parser.add_argument("--manual_dir", required=True, help="where the downloads are")
    parser.add_argument("--data_dir", help="where it is written; default: TFDS's own directory")
    options = parser.parse_args()
    try:
        builder = tfds.builder(options.name, data_dir=options.data_dir)
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=options.manual_dir)
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    splits = builder.info.splits.items()
    counts = ", ".join(f"{name} {split.num_examples:,}" for name, split in splits)
    print(f"{builder.data_dir}: {counts}")
    print(f"next: set the path of a source to tfds:{builder.data_dir}")


if __name__ == "__main__":
    main()
