"""The fenced blocks of the documentation, and the commands in them."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md", "projects/*/README.md")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: the file's path in the repository.
        line: of its first line of text, from 1.
        language: what stands after the opening fence; often nothing.
        printed: what its commands print, by the block after it.
    """

    document: str
    line: int
    language: str
    text: str
    printed: str = ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def all_blocks(is_command: Callable[[str], bool]) -> list[Block]:
    """Read every block of every document; `is_command(line)` says whether a line begins with a known program."""
    files = sorted(file for pattern in DOCUMENTS for file in ROOT.glob(pattern))
    return [block for file in files for block in read_blocks(file.relative_to(ROOT).as_posix(), is_command)]


def read_blocks(document: str, is_command: Callable[[str], bool], text: str | None = None) -> list[Block]:
    """Read a document's blocks; one without a language and without commands is what the block before it prints.

    Nothing hides behind that: the test looks for it in the output, and a first block always stands for itself.
    """
    blocks: list[Block] = []
    for line, language, content in _fenced((ROOT / document).read_text() if text is None else text):
        if blocks and not (language or blocks[-1].printed or any(map(is_command, content.splitlines()))):
            before = blocks.pop()
            blocks.append(Block(document, before.line, before.language, before.text, printed=content))
        else:
            blocks.append(Block(document, line, language, content))
    return blocks


def _fenced(text: str) -> list[tuple[int, str, str]]:
    found, opening, start = [], None, 0
    lines = text.splitlines()
    for number, line in enumerate(lines):
        fence = re.match(r" *(```+|~~~+) *(\S*)", line)
        if opening is None and fence:
            opening, start = fence, number + 1
        elif opening is not None and line.strip() == opening[1]:
            found.append((start + 1, opening[2], "\n".join(lines[start:number]) + "\n"))
            opening = None
    if opening is not None:
        raise ValueError(f"the fence before line {start + 1} is never closed")
    return found


def commands(text: str) -> list[list[str]]:
    """Split a block into commands and their words, as a shell does, without comments and assigned variables."""
    split = [shlex.split(line, comments=True) for line in re.sub(r"\\\n\s*", " ", text).splitlines()]
    return [without_variables(words) for words in split if words]


def without_variables(words: list[str]) -> list[str]:
    """Drop the `NAME=value` in front of a command."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    return words
