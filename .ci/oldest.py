"""Print the oldest requirements that the package allows, for pip: each `>=` as `==`."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print("\n".join(requirement.replace(">=", "==") for requirement in project["dependencies"]))
