"""The page of formats is what the readers say."""

from pathlib import Path

import pytest

from experiments.pages.formats_page import page
from experiments.readers.read import READERS
from traces import FORMATS

DOCS = Path(__file__).parents[3] / "docs"


def test_every_reader_is_listed() -> None:
    text = page()
    assert all(f"| `{name}` |" in text for name in FORMATS)
    assert all(reader.tool in text for reader in READERS)


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are not installed")
def test_the_page_is_current() -> None:
    found = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert found == page(), "write it anew: python -m experiments.pages.formats_page > docs/formats.md"
