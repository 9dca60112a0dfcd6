"""Pictures of runs, and the plot door."""

import base64
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from tinyllama_jax import plot
from tinyllama_jax.config import Config
from tinyllama_jax.runs.curves import (
    draw,
    final_numbers,
    read_curves,
    smooth,
    write_html,
    write_loss_picture,
)
from tinyllama_jax.runs.directory import write_config
from tinyllama_jax.runs.metrics import MetricsWriter

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(run_dir, steps=60, last_loss=4.0, tokens_per_step=1000):
    write_config(run_dir, Config())
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for step in range(steps + 1):
            at = {"step": step, "tokens_seen": step * tokens_per_step}
            loss = last_loss + 4 * math.exp(-step / 8)
            if step:
                writer.write(
                    at
                    | {"loss": loss, "grad_norm": 1 + 1 / step, "learning_rate": 1e-3}
                    | {"tokens_per_second": 100.0 * step}
                )
            if step % 20 == 0:
                writer.write(
                    at | {"eval/text/loss": loss + 0.5, "eval/a/b/loss": loss, "eval/loss": loss}
                )
    return run_dir


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "first")


def pixels_of(colour, path):
    """How many pixels of a picture are close to a colour."""
    from matplotlib.image import imread

    image = imread(path)[..., :3] * 255
    return int((np.abs(image - np.array(colour)).max(-1) < 12).sum())


def test_curves_of_a_run(run_dir):
    (run,) = read_curves([run_dir])
    assert run.label == "first"
    assert list(run.validation) == ["a/b", "text"]  # eval/loss is their mean, not a source
    assert run.validation["text"].tokens.tolist() == [0, 20000, 40000, 60000]
    assert len(run.loss.values) == 60 and run.loss.tokens[0] == 1000


def test_final_numbers(run_dir):
    (run,) = read_curves([run_dir])
    assert final_numbers(run) == {
        "run": "first",
        "steps": "60",
        "tokens": "60k",
        "training loss": f"{4.0 + 4 * math.exp(-60 / 8):.4f}",
        "validation loss (a/b)": f"{4.0 + 4 * math.exp(-60 / 8):.4f}",
        "validation loss (text)": f"{4.5 + 4 * math.exp(-60 / 8):.4f}",
        "tokens/s (median)": "3,050",
    }


def test_smoothing_is_a_mean_around_each_point():
    values = np.random.default_rng(0).normal(size=1000)
    smoothed = smooth(values)
    assert smoothed[0] == values[0]
    np.testing.assert_allclose(smoothed[500], values[490:511].mean())
    np.testing.assert_allclose(smoothed[3], values[0:7].mean())
    np.testing.assert_allclose(smoothed[-1], values[-11:].mean())
    np.testing.assert_allclose(smooth(np.linspace(9, 1, 500))[:480], np.linspace(9, 1, 500)[:480])


def test_smoothing_passes_over_what_is_not_finite():
    values = np.ones(400)
    values[200:202] = np.nan, np.inf
    np.testing.assert_allclose(smooth(values), 1.0)
    assert len(smooth(np.empty(0))) == 0


def test_a_run_is_drawn(run_dir):
    write_loss_picture(run_dir)
    picture = run_dir / "loss.png"
    assert picture.read_bytes().startswith(PNG)
    assert pixels_of((0, 114, 178), picture) > 500  # training
    assert pixels_of((213, 94, 0), picture) > 100  # each source
    assert pixels_of((0, 158, 115), picture) > 100
    assert [path.name for path in run_dir.iterdir() if "tmp" in path.name] == []


def test_runs_are_drawn_in_one_picture(run_dir, tmp_path):
    other = make_run(tmp_path / "second", last_loss=3.0)
    draw([run_dir, other], tmp_path / "pictures" / "both.png")
    assert pixels_of((213, 94, 0), tmp_path / "pictures" / "both.png") > 500
    draw([run_dir, other], tmp_path / "both.svg")
    svg = (tmp_path / "both.svg").read_text()
    assert "<svg" in svg


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / parent / "run", steps=2) for parent in ("a", "b")]
    assert [run.label for run in read_curves(runs)] == ["a/run", "b/run"]
    assert [run.label for run in read_curves([runs[0]])] == ["run"]
    assert len({run.label for run in read_curves([runs[0], runs[0]])}) == 2


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_just_begun_is_drawn(tmp_path, steps):
    run = make_run(tmp_path / "young", steps=steps)
    write_loss_picture(run)
    assert (run / "loss.png").read_bytes().startswith(PNG)


def test_a_run_that_diverged_is_drawn(tmp_path):
    run = make_run(tmp_path / "diverged", steps=5)
    with MetricsWriter(run, tensorboard=False) as writer:
        for step in (6, 7):
            writer.write(
                {"step": step, "tokens_seen": step * 1000, "loss": math.nan, "grad_norm": math.inf}
                | {"learning_rate": 1e-3}
            )
    write_loss_picture(run)
    assert (run / "loss.png").read_bytes().startswith(PNG)


def test_the_page_needs_nothing_else(run_dir, tmp_path):
    other = make_run(tmp_path / "<b>bold</b> & co", last_loss=3.0)
    page = tmp_path / "page.html"
    write_html([run_dir, other], page)
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert "http" not in text and "<script" not in text and "<b>" not in text
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(picture).startswith(PNG)
    assert "<td>4.0022</td>" in text and "<td>3.0022</td>" in text


def test_the_door_draws_and_says_what_it_wrote(run_dir, tmp_path, capsys):
    plot.main([str(run_dir)])
    printed = capsys.readouterr().out
    assert (run_dir / "loss.png").exists()
    assert "training loss 4.0022" in printed and f"wrote {run_dir / 'loss.png'}" in printed

    other = make_run(tmp_path / "second")
    out, page = tmp_path / "both.pdf", tmp_path / "both.html"
    plot.main([str(run_dir), str(other), "--out", str(out), "--html", str(page)])
    assert out.read_bytes().startswith(b"%PDF") and page.exists()


def test_a_run_that_was_killed_before_its_first_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty: no training step of this run was logged yet"):
        write_loss_picture(tmp_path)


def test_the_door_refuses_what_is_no_run(tmp_path):
    command = [sys.executable, "-m", "tinyllama_jax.plot", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path} is not a run directory")


def test_the_door_names_a_format_it_cannot_draw(run_dir, tmp_path):
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        plot.main([str(run_dir), "--out", str(tmp_path / "loss.xyz")])
    with pytest.raises(ValueError, match="has no ending"):
        plot.main([str(run_dir), "--out", str(tmp_path / "loss")])
