"""The documentation is run: every ```python block, and every convexheads command of a ```console block.

The python blocks of a file share one namespace and run in order in a temporary folder. A block that cannot
run says why, in a comment directly above it: <!-- not-run: needs a GPU -->
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[\w-]*)[^`]*$")
NOT_RUN = re.compile(r"^<!--\s*not-run:\s*\S.*-->$")
# Where a command ends for the shell: what follows is another command, or a file.
SHELL = {"|", "||", "&&", "&", ";", ">", ">>", "2>", "2>&1", "<"}


@dataclass
class Block:
    """A fenced block of a page; `line` is the number of its first line of code, from 1."""

    language: str
    code: str
    line: int
    run: bool


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown text."""
    found: list[Block] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            number += 1
            continue
        above = lines[number - 1].strip() if number else ""
        first = number = number + 1
        closing = re.compile(rf"^ *{re.escape(opening['fence'][0])}{{{len(opening['fence'])},}} *$")
        while number < len(lines) and not closing.match(lines[number]):
            number += 1
        code = textwrap.dedent("\n".join(lines[first:number])) + "\n"
        found.append(Block(opening["language"], code, first + 1, NOT_RUN.match(above) is None))
        number += 1
    return found


def commands(code: str) -> list[list[str]]:
    """The arguments of every ``$ convexheads ...`` of a console block."""
    found = []
    joined = re.sub(r"\\\n\s*", " ", code)
    for line in joined.splitlines():
        words = shlex.split(line[2:], comments=True) if line.startswith("$ ") else []
        if words[:1] != ["convexheads"]:
            continue
        end = next((place for place, word in enumerate(words) if word in SHELL), len(words))
        found.append(words[1:end])
    return found


BLOCKS = {page: blocks(page.read_text(encoding="utf-8")) for page in PAGES if page.exists()}
PYTHON = [page for page, found in BLOCKS.items() if any(b.language == "python" and b.run for b in found)]
COMMANDS = [
    (page, arguments)
    for page, found in BLOCKS.items()
    for block in found
    if block.language == "console"
    for arguments in commands(block.code)
]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from convexheads.architectures import ARCHITECTURES

    monkeypatch.chdir(tmp_path)
    # A page may register a head of its own: other tests must not see it.
    known = dict(ARCHITECTURES)
    request.addfinalizer(lambda: [ARCHITECTURES.pop(name) for name in set(ARCHITECTURES) - set(known)])
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in BLOCKS[page]:
        if block.language == "python" and block.run:
            # Empty lines in front, so that a traceback gives the line of the page.
            source = "\n" * (block.line - 1) + block.code
            exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    ("page", "arguments"), COMMANDS, ids=[f"{page.name}: {shlex.join(words)}" for page, words in COMMANDS]
)
def test_commands_parse(page: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from convexheads.cli import build_parser

    status: object = 0
    try:
        build_parser().parse_args(arguments)
    except SystemExit as stop:  # with 0 after --help and --version
        status = stop.code
    assert not status, f"{page.name}: convexheads {shlex.join(arguments)}: {capsys.readouterr().err}"


def test_the_reader_of_blocks() -> None:
    text = textwrap.dedent(
        """\
        ```python
        a = 1
        ```
        <!-- not-run: needs a GPU -->
        ```python
        b = 1
        ```
        <!-- not-run: -->
        ~~~python
        ```
        c = 1
        ~~~
        * item

          ```console
          $ convexheads fit a.npy --beta 0.1 \\
              --tol 1e-3 | tail  # the end
          output
          $ ls
          $ convexheads demo > log
          ```
        ```
        plain
        ```
        """
    )
    found = blocks(text)
    assert [block.language for block in found] == ["python", "python", "python", "console", ""]
    assert [block.run for block in found] == [True, False, True, True, True]
    assert found[2].code == "```\nc = 1\n"
    assert text.splitlines()[found[0].line - 1] == "a = 1"
    assert commands(found[3].code) == [["fit", "a.npy", "--beta", "0.1", "--tol", "1e-3"], ["demo"]]
