"""For `make docs`: links to files beside docs/, which work on GitHub, lead to the repository on the site."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns `](../FILE)` into a link to FILE in the repository."""
    return re.sub(r"\]\(\.\./([^)]+)\)", rf"]({config.repo_url}/blob/main/\1)", markdown)
