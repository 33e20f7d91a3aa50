"""Whether the version is the same wherever it is written; with --final, whether a release can be made of this.

Prints what is wrong, and exits with 1 then.
"""

import argparse
import re
import sys
from pathlib import Path

PLACEHOLDER = re.compile(r"\bOWNER\b")  # the account that the repository will be under
TEXTS = (
    *("README.md", "CITATION.cff", "pyproject.toml", "mkdocs.yml", ".github/ISSUE_TEMPLATE/config.yml"),
    "docs/index.md",
)


def problems(root: Path, final: bool) -> list[str]:
    """What a person has to mend."""

    def find(file: str, pattern: str) -> str:
        match = re.search(pattern, (root / file).read_text(), re.MULTILINE)
        return match[1] if match else "none"

    version = find("fastreg/__init__.py", r'^__version__ = "(.+)"$')
    found = []
    for file, pattern in (("CITATION.cff", r"^version: (\S+)$"), ("CHANGELOG.md", r"^## (\S+)")):
        other = find(file, pattern)
        if other != version:
            found.append(f"fastreg.__version__ is {version}, {file} has {other}")
    if final:
        if find("CHANGELOG.md", rf"^## {re.escape(version)} \((.+)\)$") == "unreleased":
            found.append("CHANGELOG.md calls this version unreleased; write the date")
        found += [
            f"{file} has the placeholder OWNER" for file in TEXTS if PLACEHOLDER.search((root / file).read_text())
        ]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    arguments = parser.parse_args()
    wrong = problems(arguments.root, arguments.final)
    print("\n".join(wrong) or "versions agree")
    sys.exit(1 if wrong else 0)
