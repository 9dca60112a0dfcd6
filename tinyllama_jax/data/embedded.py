"""The corpus that needs no download: the standard library of the Python that runs.

Two kinds of documents: `code` has the library's modules, one document each; `text` has its natural
language, the docstrings of each module and the language reference's topics (`pydoc_data`). Since
docstrings stand in the code too, a module is held out for validation from both or from neither: by
a hash of its path, which is the same on every machine and Python version.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import os
import pathlib
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from typing import Any

KINDS = ("code", "text")
VALIDATION_FRACTION = 0.04  # of the modules, and of the topics

# Modules differ in size a thousandfold. With this salt the held-out ones have their share of the
# characters too: 4.4% of the code and 4.3% of the text of Python 3.11.
_SALT = "108"

_TOPICS = "pydoc_data/topics.py"  # English in one Python dict: part of the text, not of the code
_TEST_DIRECTORIES = frozenset({"test", "tests", "idle_test"})
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # of any statement, in order
_BUILT = ("config-", "_sysconfigdata")  # made by the interpreter's build, and different in each


@dataclasses.dataclass(frozen=True)
class EmbeddedDocument:
    text: str
    validation: bool


def library_files() -> list[str]:
    """The library's modules, as sorted paths relative to `library_root()`.

    Raises:
      ValueError: this Python has no library of `.py` files.
    """
    root = library_root()
    files = []
    for directory, subdirectories, names in os.walk(root):
        relative = pathlib.Path(directory).relative_to(root)
        subdirectories[:] = [name for name in subdirectories if not _excluded(name)]
        files += [
            (relative / name).as_posix()
            for name in names
            if name.endswith(".py") and not _excluded(name)
        ]
    if not files:
        raise ValueError(
            f"there are no .py files under {root}, so this Python has no embedded corpus; "
            f"set data.sources to files of your own"
        )
    return sorted(files)


def _excluded(name: str) -> bool:
    return name in _TEST_DIRECTORIES or name in _NOT_LIBRARY or name.startswith(_BUILT)


@functools.cache
def library_root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def documents(kind: str, file: str) -> Iterator[EmbeddedDocument]:
    """The documents that one module gives to the `code` or the `text` corpus; it may give none."""
    text = read_module(file)
    if file == _TOPICS:
        if kind == "text":
            for name, topic in sorted(_topics(text).items()):
                yield EmbeddedDocument(topic.strip() + "\n", held_out(f"{file}#{name}"))
    elif kind == "code":
        yield EmbeddedDocument(text, held_out(file))
    elif docstrings := _docstrings(text):
        yield EmbeddedDocument(docstrings, held_out(file))


def read_module(file: str) -> str:
    """A module's source text, in the encoding that it declares."""
    with tokenize.open(library_root() / file) as opened:
        return opened.read()


def held_out(name: str) -> bool:
    """Whether the module (or topic) of this name is for validation."""
    digest = hashlib.sha256(f"{_SALT}/{name}".encode()).digest()
    return int.from_bytes(digest[:8]) < VALIDATION_FRACTION * 2**64


def _topics(source: str) -> dict[str, str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            return ast.literal_eval(node.value)
    raise ValueError(
        f"{library_root() / _TOPICS} does not assign `topics`: this Python's library is not one "
        f"that the embedded corpus knows; set data.sources to files of your own"
    )


def _docstrings(source: str) -> str:
    """A module's docstrings in the order they stand, with an empty line between."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    found = []
    for node in _definitions(tree):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and docstring.strip():
            found.append(inspect.cleandoc(docstring).strip() + "\n\n")
    return "".join(found)


def _definitions(node: ast.AST) -> Iterator[Any]:
    """The module, class or function `node` and all in it, in the order they stand.

    Like `ast.walk`, but without visiting expressions, which cannot hold a definition: 10 times as
    fast.
    """
    if isinstance(node, _DOCUMENTED):
        yield node
    for block in _BLOCKS:
        for statement in getattr(node, block, ()):
            yield from _definitions(statement)
