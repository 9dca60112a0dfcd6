"""Every notebook runs from top to bottom, and is stored without outputs."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

PICTURES = {
    "quickstart": ["runs/tiny_debug/loss.png"],
    "history": ["runs/mended/loss.png", "both.png", "difference.png"],
}
NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    printed = [
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert any("nats per token after" in text for text in printed)
    for picture in PICTURES[path.stem]:
        assert (tmp_path / picture).exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
