#!/usr/bin/env python3
"""Prints the lines of each architecture's file, and every other file that names the architecture.

Lines are those of code before the tests: blank ones and comments do not count. What several architectures
share is listed once, after them.
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARCHITECTURES = ROOT / "runtime/model/src/arch"
# Where an architecture can be named: the crate of models, its recipes and tests, and the page about models.
PLACES = ["runtime/model/src", "runtime/model/tests", "runtime/engine/tests", "e2e/reference", "docs"]
SUFFIXES = {".rs", ".py", ".md", ".json"}
# Files of the folder that no single architecture owns.
SHARED = ["mod", "decoder", "keys", "rope", "tensors", "encoder_family"]


def code_lines(path: pathlib.Path) -> int:
    """Lines of code before the tests of a file."""
    before = path.read_text().split("#[cfg(test)]")[0].splitlines()
    return sum(1 for line in before if line.strip() and not line.strip().startswith("//"))


def files_that_name(name: str) -> list[str]:
    """Files beside its own that have the architecture's name as a word, perhaps with a number behind it."""
    word = re.compile(rf"(?<![a-z]){name}(?![a-z])", re.IGNORECASE)
    found = []
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*")):
            own = path.parent == ARCHITECTURES and path.stem == name
            if path.suffix in SUFFIXES and not own and word.search(path.read_text(errors="replace")):
                found.append(str(path.relative_to(ROOT)))
    return found


def main() -> None:
    """Prints both lists."""
    files = sorted(path for path in ARCHITECTURES.rglob("*.rs") if path.name != "tests.rs")
    own = [path for path in files if path.parent == ARCHITECTURES and path.stem not in SHARED]
    for path in own:
        print(f"{path.stem}: {code_lines(path)} lines")
        for name in files_that_name(path.stem):
            print(f"  {name}")
    for path in files:
        if path not in own:
            print(f"shared, {path.relative_to(ARCHITECTURES)}: {code_lines(path)} lines")


if __name__ == "__main__":
    main()
