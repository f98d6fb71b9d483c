"""The table and the picture of accuracy against size follow docs/accuracy.json."""

import json

import torch

from engine.baseline import create_network
from tools import accuracy_chart

ROWS = json.loads(accuracy_chart.RESULTS.read_text(encoding="utf-8"))


def test_the_page_has_the_table_of_the_file():
    page = accuracy_chart.PAGE.read_text(encoding="utf-8")
    assert accuracy_chart.with_table(page, ROWS) == page


def test_published_figures_name_their_source():
    assert {row["kind"] for row in ROWS} == {"measured", "published"}
    assert all(row["source"] and 0 < row["accuracy"] < 100 for row in ROWS)


def test_measured_networks_have_the_parameters_that_the_file_says():
    networks = {"CapsNet": "capsnet", "DeepCapsNet": "deep_capsnet", "CNN of like size": "cnn"}
    known = {row["network"]: row["parameters"] for row in ROWS if row["kind"] == "measured"}
    for title, name in networks.items():
        with torch.device("meta"):
            model = create_network(name)
        counted = [p.numel() for key, p in model.named_parameters() if "decoder" not in key]
        assert sum(counted) == known[title]


def test_the_picture(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(accuracy_chart.BEGIN + accuracy_chart.END)
    monkeypatch.setattr(accuracy_chart, "PAGE", page)
    assert accuracy_chart.main(["--output", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert f"| {ROWS[0]['network']} |" in page.read_text()
