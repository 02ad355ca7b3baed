"""docs/notebook.md is true: what it types is typed, and what it shows comes."""

import doctest
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "notebook.md"


def blocks():
    """What stands between fences, with the number of its first line."""
    text = PAGE.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, match.start()) + 1, match[1]


@pytest.mark.ray
@pytest.mark.slow
def test_the_page_shows_what_comes():
    parser, names, failed = doctest.DocTestParser(), {}, []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for line, block in blocks():
        examples = parser.get_doctest(block, names, PAGE.name, str(PAGE), line)
        examples.globs = names
        runner.run(examples, out=failed.append, clear_globs=False)
    assert not failed, "".join(failed)
    assert runner.tries > 20
