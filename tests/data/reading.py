"""Reading a file as a source does, and the memory that it takes."""

import subprocess
import sys
import textwrap

import pyarrow.ipc

from tinyllama_jax.config import SourceConfig
from tinyllama_jax.data.sources import Tally, list_inputs, read_documents


def read(path, **settings):
    source = SourceConfig(name="books", path=str(path), validation_fraction=0.0, **settings)
    tally = Tally()
    (entry,) = list_inputs(source)
    return list(read_documents(source, entry, tally)), tally


MEASURED = """
    import itertools, sys
    from tinyllama_jax.config import SourceConfig
    from tinyllama_jax.data.sources import Tally, list_inputs, read_documents
    import pyarrow.parquet, zstandard
    def status(name):
        lines = open("/proc/self/status").read().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024
    source = SourceConfig(path=sys.argv[1])
    (entry,) = list_inputs(source)
    # The peak that getrusage tells of begins with what the parent had.
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    try:
        for document in itertools.islice(read_documents(source, entry, Tally()), int(sys.argv[2])):
            pass
    except ValueError as error:
        print(error)
    print(status("VmHWM") - before)
"""


def megabytes_used(path, documents=10**9):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURED), str(path), str(documents)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *said, used = done.stdout.splitlines()
    return "\n".join(said), int(used)


def write_arrow(path, table, kind="file", **options):
    new = {"file": pyarrow.ipc.new_file, "stream": pyarrow.ipc.new_stream}[kind]
    packing = pyarrow.ipc.IpcWriteOptions(compression=options.pop("compression", None))
    with new(path, table.schema, options=packing) as writer:
        writer.write_table(table, **options)
