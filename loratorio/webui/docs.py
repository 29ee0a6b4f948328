"""The documentation for a WebUI's user: in the repository that the extension came from, or rendered here from the files."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATH = "/loratorio/docs"

_STYLE = """
body { max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.6 system-ui, sans-serif; color-scheme: light dark; }
img { max-width: 100%; } table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: 0.2em 0.6em; border: 1px solid #8888; text-align: left; vertical-align: top; }
pre { padding: 0.8em; overflow-x: auto; background: #8882; }
code { background: #8882; overflow-wrap: anywhere; } pre code { background: none; }
"""


def link(root: Path = ROOT) -> str:
    """An address that a page of the WebUI can link to: the repository that was cloned, where anybody can read it.

    The WebUI's own record of it is not there yet when the panel is built.
    """
    config = root / ".git" / "config"
    text = config.read_text(encoding="utf8", errors="replace") if config.is_file() else ""
    remote = re.search(
        r'^\[remote "origin"][^[]*?^\s*url *= *(https://[^\s@]+?)(\.git)?/?$', text, re.MULTILINE
    )
    return f"{remote[1]}#readme" if remote else f".{PATH}/README.md"


def add_route(_: Any, app: Any) -> None:
    """For the WebUI's callback when its server has started: show README and docs/, and nothing else."""
    from fastapi import HTTPException
    from fastapi.responses import FileResponse, HTMLResponse

    def answer(name: str) -> Any:
        files = {
            file.relative_to(ROOT).as_posix(): file
            for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.*"))
        }
        if name not in files:
            raise HTTPException(404)
        if files[name].suffix == ".md":
            return HTMLResponse(page(files[name].read_text(encoding="utf8")))
        return FileResponse(files[name])

    app.add_api_route(PATH + "/{name:path}", answer, methods=["GET"])


def page(text: str) -> str:
    """Markdown as a page: of Markdown what the project's own files use."""
    head = '<!DOCTYPE html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>LoRAtorio</title>'
    return f"{head}<style>{_STYLE}</style>{''.join(_blocks(text.splitlines()))}"


_ITEM = re.compile(r"( *)(?:[-*]|\d+\.) (.*)")
_CELLS = re.compile(r"(?<!\\)\|")


def _blocks(lines: list[str]) -> Iterator[str]:
    """The elements of a text: code, headings, tables, lists, paragraphs."""
    rest = deque(lines)

    def taken(while_true: Callable[[str], Any]) -> list[str]:
        return list(iter(lambda: rest.popleft() if rest and while_true(rest[0]) else None, None))

    def goes_on(line: str) -> bool:
        return bool(line.strip()) and not _ITEM.match(line) and not line.startswith(("#", "|", "```"))

    while rest:
        line = rest.popleft()
        item = _ITEM.match(line)
        if not line.strip() or line.startswith("<!--"):
            continue
        if line.startswith("```"):
            code = taken(lambda each: not each.startswith("```"))
            taken(lambda each: each.startswith("```"))
            yield f"<pre><code>{escape(chr(10).join(code))}</code></pre>"
        elif line.startswith("    ") and not item:
            code = [line, *taken(lambda each: each.startswith("    "))]
            yield f"<pre><code>{escape(chr(10).join(each[4:] for each in code))}</code></pre>"
        elif line.startswith("#"):
            marks, _, title = line.partition(" ")
            anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            yield f'<h{len(marks)} id="{anchor}">{_inline(title)}</h{len(marks)}>'
        elif line.startswith("|"):
            rows = [line, *taken(lambda each: each.startswith("|"))]
            cells = [
                [_inline(each.strip()) for each in _CELLS.split(row.strip())[1:-1]]
                for row in rows
                if set(row) - set("|-: ")
            ]
            body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in cells)
            yield f"<table>{body}</table>"
        elif item:
            text = " ".join([item[2], *map(str.strip, taken(goes_on))])
            yield f'<li style="margin-left: {len(item[1]) + 1}em">{_inline(text)}</li>'
        else:
            yield f"<p>{_inline(' '.join([line, *taken(goes_on)]))}</p>"


def _inline(text: str) -> str:
    """Code, pictures, links and emphasis within a text."""
    parts = text.replace("\\|", "|").split("`")
    for i, part in enumerate(parts):
        part = escape(part)
        if i % 2:
            parts[i] = f"<code>{part}</code>"
            continue
        part = re.sub(r"!\[([^]]*)]\(([^)\s]+)\)", r'<img alt="\1" src="\2">', part)
        part = re.sub(r"\[([^]]+)]\(([^)\s]+)\)", r'<a href="\2">\1</a>', part)
        part = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", part)
        parts[i] = re.sub(r"\*(\S[^*]*)\*", r"<em>\1</em>", part)
    return "".join(parts)
