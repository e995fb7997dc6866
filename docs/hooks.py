"""Writes the tables of config fields into config.md, from the docstrings that `rlora train --help` prints."""

from itertools import groupby
from typing import Any

from rlora.cli.help import documented_fields


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for each page."""
    return markdown.replace("FIELDS", tables()) if page.file.src_uri == "config.md" else markdown


def tables() -> str:
    """Return a heading and a table for each section of the config."""
    parts = []
    for section, fields in groupby(documented_fields(), lambda field: _section(field[0])):
        title = f"[{section}]" if section else "Top level"
        parts.append(f"## {title}\n\n| field | values | default | |\n|---|---|---|---|")
        for name, shape, default, description in fields:
            cells = (f"`{name}`", f"`{shape}`", f"`{default}`" if default else "", " ".join(description.split()))
            parts[-1] += "\n| {} | {} | {} | {} |".format(*(cell.replace("|", r"\|") for cell in cells))
    return "\n\n".join(parts)


def _section(name: str) -> str:
    """Return the table of a field; the fields of tables that the user names are in their parent's."""
    return name.partition(".NAME")[0].partition(".sets")[0] if ".NAME" in name else name.rpartition(".")[0]
