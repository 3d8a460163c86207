"""A hook of MkDocs: the docstrings' :func:`name`, which Markdown does not know, become `name`."""

import re
from typing import Any

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(<code>)~?")


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub(r"\1", html)
