"""The project's documents, served beside the UI: an alert's or a page's link to the runbook opens wherever the UI does.

Only Markdown files and pictures of the folder `docs` are served, to whom the guard has let in. Nothing else is read.
"""

from __future__ import annotations

import html
import itertools
import re
from pathlib import Path

from markdown_it import MarkdownIt
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

_SERVED = frozenset({".md", ".png", ".svg"})
_PAGE = """<!doctype html><html lang="{language}"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>:root {{ color-scheme: light dark }} body {{ max-width: 60rem; margin: 2rem auto;
padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif }} table {{ border-collapse: collapse; display: block;
overflow-x: auto }} td, th {{ border: 1px solid gray; padding: .2rem .5rem; text-align: left; vertical-align: top }}
pre {{ overflow-x: auto; padding: .5rem; border: 1px solid gray }} img {{ max-width: 100% }}</style>{body}</html>"""


def documents_folder() -> Path | None:
    """The folder `docs`: of the working directory (as in the image), or of the checkout that this package runs from."""
    folders = (Path("docs"), Path(__file__).resolve().parents[2] / "docs")
    return next((folder.resolve() for folder in folders if (folder / "operations.md").is_file()), None)


class Documents:
    """The ASGI application before another: it answers below PREFIX/docs/ and hands on everything else."""

    def __init__(self, app: ASGIApp, folder: Path | None, prefix: str = "") -> None:
        self._app = app
        self._prefix = f"{prefix}/docs/"
        # By name: what a request asks for is never joined to a folder.
        self._files: dict[str, Path] = {}
        if folder is not None:
            found = (path for path in folder.rglob("*") if path.suffix in _SERVED)
            self._files = {path.relative_to(folder).as_posix(): path for path in found}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] != "http" or not scope["path"].startswith(self._prefix):
            await self._app(scope, receive, send)
            return
        await self._answer(Request(scope).url.path.removeprefix(self._prefix))(scope, receive, send)

    def _answer(self, name: str) -> Response:
        path = self._files.get(name)
        if path is None:
            return PlainTextResponse("There is no such document here. DOCS_URL says where else they are.", 404)
        if path.suffix != ".md":
            return FileResponse(path)
        language, body = "ru" if name.startswith("ru/") else "en", as_html(path.read_text(encoding="utf-8"))
        return HTMLResponse(_PAGE.format(language=language, title=html.escape(name), body=body))


def as_html(markdown: str) -> str:
    """A document as HTML. Its headings have the anchors that a repository's pages give them."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for opening, text in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            opening.attrSet("id", anchor_of(text.content))
    return str(parser.renderer.render(tokens, parser.options, {}))


def anchor_of(title: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
