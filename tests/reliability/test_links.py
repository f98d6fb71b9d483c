"""Every link and picture in the documentation leads somewhere."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    page
    for folder in (".", "docs", "kernels", "benchmarks")
    for page in (ROOT / folder).glob("*.md")
)


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def is_built(path):
    """Whether docs/conf.py or demo/build.py puts a page there."""
    parts = path.relative_to(ROOT).parts
    if parts[:2] == ("docs", "demo"):
        return ROOT.joinpath(*parts[1:]).exists()
    if parts[:2] != ("docs", "api") or path.suffix != ".rst":
        return False
    module = import_module(f"tritoncaps.{parts[2].removesuffix('.rst')}")
    return len(parts) == 3 or hasattr(module, path.stem)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists() or is_built(linked), f"{page.name} links to {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in headings(linked), f"{page.name} links to {target}"


def test_there_are_links_to_check():
    assert sum(len(re.findall(r"\]\(", page.read_text())) for page in PAGES) > 20
