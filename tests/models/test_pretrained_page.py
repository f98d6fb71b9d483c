"""The programs in docs/pretrained.md run, in the order of the page."""

import re
from pathlib import Path

import pytest
import torch

from tritoncaps.models import PretrainedMixin

PAGE = (Path(__file__).parents[2] / "docs/pretrained.md").read_text(encoding="utf-8")


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    pillow = pytest.importorskip("PIL.Image")
    picture = torch.full((90, 70), 255, dtype=torch.uint8)
    picture[20:28, 15:55] = 0
    for row in range(28, 80):
        picture[row, 80 - row : 88 - row] = 0
    monkeypatch.chdir(tmp_path)
    pillow.fromarray(picture.numpy()).save("seven.png")
    pushed = []
    monkeypatch.setattr(PretrainedMixin, "push_to_hub", lambda model, name: pushed.append(name))
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    for program in programs:
        exec(program, names)
    assert capsys.readouterr().out.endswith("\n7\n")
    assert pushed == ["OWNER/pets"]
    assert names["SmallNet"](num_classes=3).init_arguments == {"num_classes": 3}
