"""The docs as a site: it builds without warnings, its links lead somewhere, and it loads nothing from elsewhere."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from conftest import ROOT
from playwright.sync_api import Browser

from rlora.cli.grammar import kinds


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(path)]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return path


_TAGS = set(  # that MkDocs and its theme write
    "a article aside b blockquote body br code details div em footer form h1 h2 h3 h4 h5 h6 head header hr html "
    "button img input label li link main meta nav noscript ol p path pre script small span strong style summary svg "
    "table tbody td th thead title tr ul".split()
)


class Links(HTMLParser):
    """Links, ids and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.add(tag)
        self.ids |= {value for name in ("id", "name") if (value := values.get(name))}
        self.links += [value for name in ("href", "src") if (value := values.get(name))]


def test_links_lead_somewhere(site: Path) -> None:
    pages = {page: Links(page.read_text()) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 20
    for page, found in pages.items():
        for link in found.links:
            address, anchor = urldefrag(urljoin(page.as_uri(), link))
            if not address.startswith("file:"):
                assert address.startswith(("https://", "data:")), (page, link)
                continue
            target = Path(unquote(address.removeprefix("file://")))
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), (page, link)
            assert not anchor or target.suffix != ".html" or unquote(anchor) in pages[target].ids, (page, link)


def test_tags_in_a_text_are_shown_and_not_read_as_html(site: Path) -> None:
    for page in site.rglob("*.html"):
        tags = Links(page.read_text()).tags
        assert not tags - _TAGS, page
    text = (site / "config" / "index.html").read_text()
    assert "<code>&lt;think&gt;</code> and <code>&lt;/think&gt;</code> in place of" in text


def test_every_field_of_the_config_is_there(site: Path) -> None:
    text = (site / "config" / "index.html").read_text()
    for name in kinds():
        assert f"<code>{name}</code>" in text or f"<code>{name}.NAME" in text, name


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_pages_load_nothing_from_elsewhere_and_search_finds(browser: Browser, site: Path, address: str) -> None:
    heard: list[str] = []
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.on("console", lambda message: heard.append(f"{page.url}: {message.text}"))
    page.on("request", lambda asked: None if asked.url.startswith((address, "data:")) else heard.append(asked.url))
    for file in sorted(site.rglob("index.html")):
        page.goto(f"{address}/{file.relative_to(site)}", wait_until="networkidle")
    page.set_viewport_size({"width": 1200, "height": 900})
    page.goto(f"{address}/index.html", wait_until="networkidle")
    page.click("input[name=query]")
    for words in ("top_p", "microbatch_tokens", "learner.start_from"):
        page.fill("input[name=query]", "")
        page.click("input[name=query]")
        page.keyboard.type(words)
        page.wait_for_selector(f".md-search-result__item:has-text('{words}')")
    page.close()
    assert heard == []
