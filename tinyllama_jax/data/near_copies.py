"""Documents that are nearly the same: MinHash and locality-sensitive hashing, by datasketch.

As SlimPajama was deduplicated (Jaccard similarity of 0.8 between sets of runs of words); exact
copies, which `audit` counts at no cost, are left aside. Needs the `[audit]` extra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tinyllama_jax.data.scan import words_of

SIMILARITY = 0.8
_RUN_WORDS = 5
_PERMUTATIONS = 128


def near_copies(
    texts: Iterable[tuple[str, str]], advance: Callable[[int], None] = lambda count: None
) -> list[tuple[str, str]]:
    """Pairs of documents that share about 80% of their runs of five words or more.

    Args:
      texts: names and texts; a later one is named with the first that it is like.
      advance: told of texts.

    Returns:
      Pairs (document, an earlier one). Of documents with a similarity near the threshold some are
      missed and some are found, as the method has it.

    Raises:
      ValueError: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise ValueError(
            f"near copies are found by datasketch ({error}): pip install 'tinyllama_jax[audit]'"
        ) from error
    index = MinHashLSH(threshold=SIMILARITY, num_perm=_PERMUTATIONS)
    seen: set[str] = set()
    pairs = []
    for name, text in texts:
        advance(1)
        words = words_of(text)
        if len(words) < _RUN_WORDS or text in seen:
            continue
        seen.add(text)
        runs = {
            " ".join(words[at : at + _RUN_WORDS]).encode()
            for at in range(len(words) - _RUN_WORDS + 1)
        }
        sketch = MinHash(num_perm=_PERMUTATIONS)
        sketch.update_batch(list(runs))
        if found := index.query(sketch):
            pairs.append((name, min(found)))
        else:
            index.insert(name, sketch)
    return pairs
