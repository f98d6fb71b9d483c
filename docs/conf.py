"""Sphinx: the Markdown of this folder, and pages for the public API and the recipes.

    pip install -e ".[docs]" && sphinx-build -W docs docs/_build/html

The pages in `api/` and `recipes/` are written here, from each module's `__all__` and from
`examples/recipes/`. Links to files outside this folder become links to their pages, or downloads.
"""

import ast
import inspect
import re
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.writers.html5 import HTML5Translator

from tritoncaps import __version__

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "tritoncaps"
author = "The tritoncaps developers"
copyright = "the tritoncaps developers, MIT licence"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "furo"
html_title = "tritoncaps"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style = "friendly"
pygments_dark_style = "github-dark"
smartquotes_action = "D"  # dashes alone, so that a value such as "full" can be copied

myst_enable_extensions = ["attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_all_links_external = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
default_role = "py:obj"  # what is in single backquotes is code, and a link where it is known
html_math_renderer = "mathml"
# demo/build.py puts the page there, after Sphinx.
linkcheck_ignore = ["^demo/"]

MODULES = ["ops", "layers", "losses", "models", "data", "export", "reference", "testing"]
# Files outside this folder that have a page of their own.
PAGES = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "kernels/README.md": "kernels.md",
}


def public_names(module: object) -> list[str]:
    """What a module offers: its `__all__`, or the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    here = inspect.getmodule(module)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and inspect.getmodule(value) is here
    ]


def first_sentence(value: object) -> str:
    """The first line of a docstring, the choices of a type, or the entries of a table."""
    if choices := get_args(value):
        return "One of " + ", ".join(f"``{choice!r}``" for choice in choices) + "."
    if not callable(value):
        return "Holds " + ", ".join(f"``{entry}``" for entry in value) + "."  # type: ignore[attr-defined]
    return escaped((inspect.getdoc(value) or "").split("\n")[0])


# Between backquotes, or a character that means something in reStructuredText and nothing in ours.
SPECIAL = re.compile(r"(`+[^`]+`+)|(\||(?<!\w)\*(?=\w))")


def escaped(line: str) -> str:
    """A line of a docstring, in which |s| and *sizes are plain text."""
    return SPECIAL.sub(lambda match: match[1] or "\\" + match[2], line)


def prepare_docstring(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Escape a docstring's text, and mark a module's indented programs as programs."""
    result: list[str] = []
    is_program = False
    for line in lines:
        starts = what == "module" and line.startswith("    ") and not (result and result[-1])
        if starts and not is_program:
            result += ["::", ""]
            is_program = True
        elif line and not line.startswith(" "):
            is_program = False
        is_doctest = line.lstrip().startswith((">>>", "..."))
        result.append(line if is_program or is_doctest else escaped(line))
    lines[:] = result


def page_of(module: str, name: str, value: object) -> str:
    """The page of one name, in reStructuredText."""
    path = f"tritoncaps.{module}.{name}"
    heading = f"{name}\n{'=' * len(name)}\n\n"
    if inspect.isclass(value):
        lines = [f".. autoclass:: {path}", "   :show-inheritance:"]
        # The fields of a named tuple are in its own docstring.
        if not hasattr(value, "_fields"):
            lines.append("   :members:")
        return heading + "\n".join(lines) + "\n"
    if inspect.isroutine(value):
        return heading + f".. autofunction:: {path}\n"
    return heading + f".. data:: {path}\n\n   {first_sentence(value)}\n"


def write(path: Path, text: str) -> None:
    """Write a page, unless it is the same: Sphinx builds again what is newer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_api() -> None:
    """Write a page for each module and each of its public names."""
    for module in MODULES:
        imported = import_module(f"tritoncaps.{module}")
        title = f"tritoncaps.{module}"
        page = f"{title}\n{'=' * len(title)}\n\n.. automodule:: {title}\n\n"
        page += ".. list-table::\n   :widths: auto\n\n"
        names = public_names(imported)
        for name in names:
            value = getattr(imported, name)
            page += f"   * - :doc:`{module}/{name}`\n     - {first_sentence(value)}\n"
            write(HERE / f"api/{module}/{name}.rst", page_of(module, name, value))
        page += "\n.. toctree::\n   :hidden:\n\n"
        page += "".join(f"   {module}/{name}\n" for name in names)
        write(HERE / f"api/{module}.rst", page)


def write_recipes() -> None:
    """Write a page for each recipe: its question, its program, and what that prints and draws.

    The text and the picture lie beside the program. tests/examples/test_recipes.py compares them
    with what it prints and draws.
    """
    for path in sorted((ROOT / "examples/recipes").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        question, _, explanation = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
        program = source.split('"""', 2)[2].strip()
        printed = path.with_suffix(".txt").read_text(encoding="utf-8")
        page = f"# {question}\n\n{explanation}\n\n```python\n{program}\n```\n\n"
        page += f"```console\n$ python examples/recipes/{path.name}\n{printed}```\n"
        picture = path.with_suffix(".png")
        if picture.exists():
            name = picture.relative_to(ROOT)
            page += f"\nIt also writes `{picture.name}`:\n\n![What it draws](../../{name})\n"
        write(HERE / f"recipes/{path.stem}.md", page)


def outside(match: re.Match[str], folder: Path) -> str:
    """A link from a page to a file of the repository, as the site has it."""
    text, target, anchor = match["text"], match["target"], match["anchor"] or ""
    path = (folder / target).resolve()
    if not path.is_relative_to(ROOT) or path.is_relative_to(HERE) or path == ROOT:
        return match[0]
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return f"[{text}](/{PAGES[name]}{anchor})"
    if name.startswith("examples/recipes/") and path.suffix == ".py":
        return f"[{text}](/recipes/{path.stem}.md)"
    if path.is_file():
        return f"{{download}}`{text.strip('`')} <{'/../' + name}>`"
    return text if text.startswith("`") else f"`{name}`"


LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)]*)?\)")


def rewrite_links(app: Sphinx, name: str, source: list[str]) -> None:
    """Let links to files outside this folder work, and keep a number and its % on one line."""
    if name.startswith(("api/", "recipes/")):
        return
    text, folder = source[0], (HERE / name).parent
    for original, page in PAGES.items():
        if name == page.removesuffix(".md"):
            # This page is a file from elsewhere, and its links start there.
            text, folder = (ROOT / original).read_text(encoding="utf-8"), (ROOT / original).parent
    if name == "recipes":
        text += "\n```{toctree}\n:hidden:\n:glob:\n\nrecipes/*\n```\n"
    text = LINK.sub(partial(inside, folder=folder), text)
    text = LINK.sub(partial(outside, folder=folder), text)
    source[0] = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)


def inside(match: re.Match[str], folder: Path) -> str:
    """A link from elsewhere in the repository to a page of this folder."""
    path = (folder / match["target"]).resolve()
    if folder.is_relative_to(HERE) or not path.is_relative_to(HERE):
        return match[0]
    return f"[{match['text']}](/{path.relative_to(HERE).as_posix()}{match['anchor'] or ''})"


def write_inline(translator: HTML5Translator, node: Any) -> None:
    """A formula in a line, as MathML, which a browser draws without a program."""
    translator.body.append(convert(node.astext()))
    raise SkipNode


def write_block(translator: HTML5Translator, node: Any) -> None:
    """A formula of its own."""
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


read_module = ModuleAnalyzer.analyze


def without_overloads(analyzer: ModuleAnalyzer) -> None:
    """Read a module, and forget its overloads: autodoc would show each, and has no option."""
    read_module(analyzer)
    analyzer.overloads.clear()


def setup(app: Sphinx) -> None:
    """Write the pages that are made, and watch the others."""
    write_api()
    write_recipes()
    ModuleAnalyzer.analyze = without_overloads  # type: ignore[method-assign]
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    app.connect("source-read", rewrite_links)
    # Before napoleon, which has the usual priority of 500.
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)
