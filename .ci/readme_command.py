"""Print a command of the README, so that CI runs what newcomers are told to run.

    python .ci/readme_command.py test

A command is the code block that follows an HTML comment `<!-- command: NAME -->`.
"""

import re
import sys
from pathlib import Path

name = sys.argv[1]
readme = (Path(__file__).parent.parent / "README.md").read_text()
found = re.search(rf"<!-- command: {re.escape(name)} -->\s*```(?:sh|bash)\n(.*?)```", readme, re.S)
if found is None:
    sys.exit(f"README.md has no code block after <!-- command: {name} -->")
print(found.group(1).strip())
