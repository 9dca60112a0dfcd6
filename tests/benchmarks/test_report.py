"""The README's tables are those of the results that the repository holds."""

import json
import pathlib

from tinyllama_jax import bench
from tinyllama_jax.benchmarks import report

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_readme_has_what_was_measured():
    assert list(report.RESULTS.glob("*.json"))
    between = README.read_text().partition("<!-- bench report -->\n")[2]
    assert between.partition("<!-- end -->")[0].strip() == report.markdown().strip(), (
        "run python -m tinyllama_jax.bench report and put its output between the README's marks"
    )


def test_results_tell_the_device_and_nothing_private():
    for path in report.RESULTS.glob("*.json"):
        content = json.loads(path.read_text())
        assert content["machine"]["versions"]["jax"] and content["machine"]["git_revision"]
        assert not {"host", "command", "variables"} & content["machine"].keys()


def test_the_door_prints_it(capsys):
    bench.main(["report"])
    printed = capsys.readouterr().out
    assert printed == report.markdown() and "`bench train` on " in printed
