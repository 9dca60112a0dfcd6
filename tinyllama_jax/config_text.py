"""Settings that say more than one thing in a text, parsed."""

from __future__ import annotations


def chosen_subsets(text: str) -> tuple[frozenset[str], bool]:
    """What `data.sources.NAME.subsets` names, and whether those are the ones left out.

    Raises:
      ValueError: some of the names begin with "-" and some do not.
    """
    names = [name.strip() for name in text.split(",")] if text else []
    leaves_out = [name.startswith("-") for name in names]
    if len(set(leaves_out)) > 1 or not all(name.strip("-") for name in names):
        raise ValueError(
            f'"{text}" must name the subsets that are taken ("C4,Book"), or the ones that are left '
            f'out, each with a "-" before it ("-Github")'
        )
    # Nothing named: nothing is left out.
    return frozenset(name.removeprefix("-") for name in names), all(leaves_out)


def named_weights(text: str) -> dict[str, float]:
    """Weights by name, as `data.sources.NAME.subset_weights` and `stages.NAME.weights` give them.

    Raises:
      ValueError: it is not a list of NAME:WEIGHT with weights above 0.
    """
    weights = {}
    for part in text.split(",") if text else ():
        name, _, weight = part.strip().rpartition(":")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not (name and 0 < value < float("inf")):
            raise ValueError(
                f'"{part}" is not NAME:WEIGHT with a weight above 0; what is not to be read is not '
                f'named (a subset: as "-NAME" in subsets)'
            )
        if name in weights:
            raise ValueError(f'"{name}" has two weights; give it one')
        weights[name] = value
    return weights


def skipped_ranges(text: str) -> tuple[tuple[int, int], ...]:
    """The ranges of batches that `data.skip` leaves out, ascending, those that touch joined.

    Raises:
      ValueError: it is not a list of ranges A:B with A below B.
    """
    ranges = []
    for part in text.split(",") if text else ():
        first, colon, end = part.partition(":")
        if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
            raise ValueError(
                f'"{part}" is not a range of steps A:B, which leaves out A up to B - 1; as '
                f"1200:1250"
            )
        ranges.append((int(first), int(end)))
    joined: list[tuple[int, int]] = []
    for begin, stop in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((begin, stop))
    return tuple(joined)


def joined_skips(*texts: str) -> str:
    """Several values of `data.skip` as one."""
    ranges = skipped_ranges(",".join(filter(None, texts)))
    return ",".join(f"{first}:{end}" for first, end in ranges)
