"""Every link between the documents leads to a file, and to a heading in it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [file for pattern in ("*.md", "docs/*.md", "projects/**/*.md") for file in sorted(ROOT.glob(pattern))]


def text_of(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = sum(other == slug or re.fullmatch(rf"{slug}-\d+", other) is not None for other in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    inside = [link for link in links if "://" not in link]
    for link in inside:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert not anchor or anchor in anchors(target), link


def test_the_pages_refer_to_each_other():
    assert len(PAGES) > 20
    assert sum(text_of(page).count("](") for page in PAGES) > 100
    assert "the-papers-options-table-9" in anchors(ROOT / "docs" / "detection.md")
