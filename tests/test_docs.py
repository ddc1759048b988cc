"""The documentation is run: what a docstring or a page shows is what happens.

docstrings   every public name has one, with an example; every example of every module prints what it says
pages        README.md, CONTRIBUTING.md and docs/: ```python blocks run in order, one namespace a page; a ```text block
             that follows directly is what the block printed (``...`` stands for anything); a block under an HTML
             comment ``<!-- not run: reason -->`` is compiled only; a page with ``<!-- after: other.md -->`` goes on
             where the other one ends
reference    every public name is on a page of docs/reference/
links        relative links lead to a file that is there, and #anchors to a heading
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import sys
import textwrap
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fstep
import fstep_models

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
LINKED = sorted({*PAGES, *ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("benchmarks/**/*.md")})
NAMES: list[str] = sorted(getattr(fstep, "__all__", []))


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Docstrings ----------------------------------------------------------------------------------------------------------


def modules() -> list[str]:
    found = []
    for package in (fstep, fstep_models):
        found += [package.__name__]
        found += [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return found


def failing_examples(module: types.ModuleType) -> str:
    """Run the examples of a module's docstrings, and return doctest's report of those that fail."""
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", modules())
def test_examples_of_module_print_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    report = failing_examples(importlib.import_module(name))
    if report:
        pytest.fail("\n" + report, pytrace=False)


def test_failing_examples_sees() -> None:
    module = types.ModuleType("made_up")
    module.__doc__ = ">>> print('a   7\\nb')\na ... b\n"
    assert failing_examples(module) == ""
    module.__doc__ = ">>> 1 + 1\n3\n"
    assert "Expected:\n    3\nGot:\n    2\n" in failing_examples(module)


def test_public_names_are_listed_once_and_exist() -> None:
    assert NAMES, "fstep.__all__ lists no name"
    assert len(set(NAMES)) == len(NAMES)
    assert not [name for name in NAMES if not hasattr(fstep, name)]


def undocumented(name: str, thing: object) -> str | None:
    """Say what the docstring of a public thing lacks.

    A function or a class needs a sentence and an example; a function's example calls it by name, a class's may show an
    object that something else made. An instance (an optimizer, say) has the docstring of its class. A module needs the
    sentence.
    """
    explains_itself = inspect.isclass(thing) or inspect.isroutine(thing) or isinstance(thing, types.ModuleType)
    if not (explains_itself or hasattr(thing, "__wrapped__")):
        thing = type(thing)
        if thing.__module__.split(".")[0] != "fstep":
            return None
    # A class's own docstring: an inherited one is about something else, and a dataclass makes up a signature.
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    if not doc or not doc.strip() or (inspect.isclass(thing) and doc.startswith(f"{thing.__name__}(")):
        return f"{name}: no docstring"
    if isinstance(thing, types.ModuleType):
        return None
    examples = doctest.DocTestParser().get_examples(doc)
    if not examples:
        return f"{name}: no >>> example in the docstring of {getattr(thing, '__qualname__', name)}"
    if not inspect.isclass(thing) and not any(re.search(rf"\b{name}\b", example.source) for example in examples):
        return f"{name}: its example does not use it"
    return None


@pytest.mark.parametrize("name", NAMES)
def test_public_name_teaches(name: str) -> None:
    problem = undocumented(name, getattr(fstep, name))
    if problem:
        pytest.fail(problem, pytrace=False)


def test_undocumented_sees() -> None:
    def bare() -> None: ...

    def no_example() -> None:
        """Do it."""

    def other_example() -> None:
        """Do it.

        >>> 1 + 1
        2
        """

    class Parent:
        """A parent.

        >>> Parent and Child
        """

    class Child(Parent):
        pass

    assert undocumented("bare", bare) == "bare: no docstring"
    assert "no >>> example" in str(undocumented("no_example", no_example))
    assert undocumented("other_example", other_example) == "other_example: its example does not use it"
    assert undocumented("Parent", Parent) is None
    assert undocumented("Child", Child) == "Child: no docstring"
    Child.__module__ = "fstep.x"
    assert undocumented("child", Child()) == "child: no docstring"


# Pages ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line of its first line, and what surrounds it."""

    language: str
    text: str
    line: int
    follows_block: bool  # only blank lines since the block before
    not_run: str | None  # the reason given just above


def blocks(text: str) -> list[Block]:
    """Read the fenced blocks of a page."""
    found: list[Block] = []
    fence: re.Match[str] | None = None
    body: list[str] = []
    adjacent, reason, start = False, None, 0
    for number, line in enumerate(text.splitlines(), start=1):
        if fence is not None:
            if line.strip().startswith(fence["ticks"]) and not line.strip().strip("`"):
                inside = textwrap.dedent("".join(f"{part}\n" for part in body))
                found.append(Block(fence["language"], inside, start, adjacent, reason))
                fence, adjacent, reason = None, True, None
            else:
                body.append(line)
        elif opened := re.match(r" *(?P<ticks>`{3,})(?P<language>\w*)", line):
            fence, body, start = opened, [], number + 1
        elif line.strip():
            comment = re.fullmatch(r" *<!-- not run: *(.*?) *-->\s*", line)
            adjacent, reason = False, comment[1] if comment else None
    if fence is not None:
        raise ValueError(f"line {start - 1}: this block is never closed")
    return found


def run_page(page: str, text: str, namespace: dict[str, object]) -> str | None:
    """Run the blocks of a page, and say what is wrong with the first that fails."""
    printed: str | None = None
    for block in blocks(text):
        where = f"{page}:{block.line}"
        shows = block.text if block.language == "text" and block.follows_block else None
        if shows and printed is not None and not doctest.OutputChecker().check_output(shows, printed, OPTIONS):
            return f"{where}: the page shows\n{shows}\nand the block above printed\n{printed}"
        printed = None
        if block.language != "python":
            continue
        if block.not_run == "":
            return f"{where}: `<!-- not run: -->` gives no reason"
        # Blank lines in front make line numbers, in tracebacks too, those of the page.
        source = "\n" * (block.line - 1) + block.text
        out = io.StringIO()
        try:
            code = compile(source, page, "exec", dont_inherit=True)
            if block.not_run is None:
                with contextlib.redirect_stdout(out):
                    exec(code, namespace)
                printed = out.getvalue()
        except SyntaxError as error:
            return f"{page}:{error.lineno}: {error.msg}: {(error.text or '').strip()}"
        except (Exception, SystemExit) as error:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == page]
            return f"{page}:{lines[-1] if lines else block.line}: {''.join(traceback.format_exception(error))}"
    return None


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    # A real module, since dataclasses look up their annotations in the module that defines them.
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    return vars(module)


def pages_before(page: Path) -> list[Path]:
    """Return the pages that a page says it runs after."""
    named = re.findall(r"^<!-- after: (\S+) -->$", page.read_text("utf-8"), re.MULTILINE)
    return [page.parent / name for name in named]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_runs(page: Path, namespace: dict[str, object]) -> None:
    for each in (*pages_before(page), page):
        problem = run_page(page_id(each), each.read_text("utf-8"), namespace)
        if problem:
            pytest.fail(problem, pytrace=False)


def test_pages_before_sees(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- after: other.md -->\n\nwords\n")
    assert pages_before(page) == [tmp_path / "other.md"]
    page.write_text("# Page\n\nabout <!-- after: other.md -->, in words\n")
    assert pages_before(page) == []


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("```python\nx = 1\n```\nwords\n```python\nprint(x + 1)\n```\n\n```text\n2\n```\n", None),
        ("```python\nprint('a 7 b')\n```\n```text\na ... b\n```\n", None),
        ("```python\nprint(1)\n```\n```text\n2\n```\n", "p.md:5: the page shows"),
        ("```python\nprint(1)\n```\nSomething else:\n```text\n2\n```\n", None),
        ("words\n```python\nx = 1\nprint(y)\n```\n", "p.md:4: Traceback"),
        ("<!-- not run: needs a GPU -->\n```python\nprint(y)\n```\n```text\n2\n```\n", None),
        ("<!-- not run: needs a GPU -->\n```python\n\nprint(\n```\n", "p.md:4: '(' was never closed"),
        ("<!-- not run: needs a GPU -->\nwords\n```python\nprint(y)\n```\n", "p.md:4: Traceback"),
        ("<!-- not run: -->\n```python\nprint(y)\n```\n", "p.md:3: `<!-- not run: -->` gives no reason"),
        ("```sh\nexit 1\n```\n", None),
        ("1. item\n   ```python\n   x = 1\n   if x:\n       print(y)\n   ```\n", "p.md:5: Traceback"),
    ],
)
def test_run_page_sees(page: str, problem: str | None, namespace: dict[str, object]) -> None:
    found = run_page("p.md", page, namespace)
    assert found is None if problem is None else str(found).startswith(problem), found


# Reference and links -------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Blank out fenced blocks, keeping the lines."""
    out, ticks = [], ""
    for line in text.splitlines():
        fence = re.match(r" *(`{3,})", line)
        if fence and not ticks:
            ticks = fence[1]
        elif ticks and line.strip().startswith(ticks):
            ticks, line = "", ""
        out.append("" if ticks else line)
    return "\n".join(out)


@pytest.fixture(scope="module")
def reference() -> str:
    return "\n".join(prose(page.read_text("utf-8")) for page in sorted(ROOT.glob("docs/reference/*.md")))


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_in_the_reference(name: str, reference: str) -> None:
    # The name alone or at the head of a signature: `adamw`, `pack_thd(batch, *, ...)`.
    if not re.search(rf"`(fstep\.)?{name}[`(\[]", reference):
        pytest.fail(f"no page of docs/reference/ mentions `{name}`", pytrace=False)


def anchors(text: str) -> set[str]:
    """Name the headings of a page as GitHub does."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        number = 0
        while (unique := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(unique)
    return found


def links(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, target) of every link and image of a page."""
    for number, line in enumerate(prose(text).splitlines(), start=1):
        line = re.sub(r"`[^`]*`", "code", line)
        for match in re.finditer(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^ *\[[^\]]+\]: *(\S+)", line):
            yield number, match[1] or match[2]


def broken_links(page: Path, root: Path) -> list[str]:
    text = page.read_text("utf-8")
    found = []
    for line, target in links(text):
        if re.match(r"[a-z][a-z+.-]*:", target):  # another site's are not ours to keep
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists():
            found.append(f"{page.relative_to(root)}:{line}: {target}: no such file")
        elif anchor and there.suffix == ".md" and anchor not in anchors(there.read_text("utf-8")):
            found.append(f"{page.relative_to(root)}:{line}: {target}: no such heading")
    return found


@pytest.mark.parametrize("page", LINKED, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    found = broken_links(page, ROOT)
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def test_broken_links_sees(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Sum, then `divide` once\n\n## Again\n## Again\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#sum-then-divide-once) [c](#here) [d](other.md#again-1)\n"
        "[e](missing.md) ![f](missing.png 'title')\n[g](other.md#nowhere)\n[h](#nowhere)\n[i]: missing.txt\n"
        "[j](https://example.org/missing.md) `[k](missing.md)`\n```text\n[l](missing.md)\n# Nowhere\n```\n"
    )
    assert broken_links(page, tmp_path) == [
        "page.md:3: missing.md: no such file",
        "page.md:3: missing.png: no such file",
        "page.md:4: other.md#nowhere: no such heading",
        "page.md:5: #nowhere: no such heading",
        "page.md:6: missing.txt: no such file",
    ]
