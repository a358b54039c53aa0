"""docs/: what its pages list is complete, and what they repeat is the same."""

import re
from pathlib import Path

import diffusion

CITED = re.compile(r"\b([A-Z][a-z]+)(?: et al\.| & [A-Z][a-z]+)?,? ((?:19|20)\d\d)[ab]?\b")


def test_the_papers_page_lists_every_paper_that_the_library_cites(root: Path) -> None:
    text = " ".join(
        " ".join(file.read_text(encoding="utf-8").split()) for file in sorted((root / "diffusion").rglob("*.py"))
    )
    cited = set(CITED.findall(text))
    assert {("Ho", "2020"), ("Karras", "2022"), ("Wiener", "1949")} < cited
    page = (root / "docs" / "papers.md").read_text(encoding="utf-8")
    missing = [(name, year) for name, year in cited if not re.search(rf"{name}.*\b{year}", page)]
    assert missing == []


def test_the_api_page_has_every_public_name(root: Path) -> None:
    page = (root / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^::: diffusion\.(\w+)$", page, re.MULTILINE)) == set(diffusion.__all__)


def test_the_library_page_has_the_example_of_the_readme(root: Path) -> None:
    """Which tests/test_library.py runs."""
    example = re.compile(r"```python\n(from diffusion import.*?)```", re.DOTALL)
    pages = ("README.md", "docs/library.md")
    readme, page = (example.findall((root / name).read_text(encoding="utf-8"))[0] for name in pages)
    assert page == readme
