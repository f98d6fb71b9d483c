"""The notebook runs from its first cell to its last, and prints what is saved in it."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks/quickstart.ipynb"


def printed(notebook):
    """What the cells print, one text for each, and the number of their pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = ["".join(output.text) for output in outputs if output.output_type == "stream"]
    return "".join(texts), sum("image/png" in output.get("data", {}) for output in outputs)


def test_it_runs_and_shows_what_was_saved(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    saved, pictures = printed(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    text, drawn = printed(notebook)
    assert drawn == pictures == 2
    # What a training reaches depends on the machine's roundings.
    exact, learnt = re.split("epoch 1", text)
    assert exact == re.split("epoch 1", saved)[0] and "360 of 360 test digits" in exact
    assert float(re.findall(r"([\d.]+) % of the test digits", learnt)[-1]) > 90
