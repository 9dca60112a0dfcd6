"""What doors share: the settings they repeat, and progress where there is no terminal."""

import sys

import pytest

from tinyllama_jax import door
from tinyllama_jax.progress import Progress


@pytest.mark.parametrize(
    ("given", "repeated"),
    [
        (["--config=a.py", "--workers=2"], "--config=a.py"),
        (["--config", "a b.py", "--workers", "2"], "--config 'a b.py'"),
        (["--config=a.py", "--config.data.tokenizer=", "--workers=2"],
         "--config=a.py --config.data.tokenizer="),
        (["-config=a.py", "--config.x.y", "3", "--workdir=r"],
         "-config=a.py --config.x.y 3 --workdir=r"),
        ([], ""),
    ],
)  # fmt: skip
def test_settings_are_given_again(monkeypatch, given, repeated):
    monkeypatch.setattr(sys, "argv", ["door", *given])
    assert door.settings_given() == repeated


def test_plain_lines_count_in_one_unit(capsys):
    with Progress(25_400_000, "B", scale=True, interval=0) as progress:
        progress.advance(500_000, "1.0 Mtokens/s")
        progress.advance(12_000_000)
    with Progress(4, "steps", interval=0) as progress:
        progress.advance()
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("0.5/25.4 MB, 1.0 Mtokens/s, ") and first.endswith(" left")
    assert second.startswith("12.5/25.4 MB, 1.0 Mtokens/s, ")
    assert third.startswith("1/4 steps, ")
