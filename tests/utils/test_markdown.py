"""Pages of which a part is made by a command."""

from __future__ import annotations

import pytest

from vlm_safeguard.utils.markdown import with_block


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    made = with_block(page, "<!-- x -->", "new", "<!-- end -->")
    assert made == page.replace("old", "new")
    assert with_block(made, "<!-- x -->", "new", "<!-- end -->") == made


@pytest.mark.parametrize("page", ["no marks", "<!-- x --> never ended"])
def test_a_page_without_the_marks_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="no block between <!-- x --> and <!-- end -->"):
        with_block(page, "<!-- x -->", "new", "<!-- end -->")
