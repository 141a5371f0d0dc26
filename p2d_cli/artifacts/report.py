"""The payload of a report artifact: the same comparison as JSON, Markdown and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPORT_JSON_NAME = "aer.json"
REPORT_MARKDOWN_NAME = "aer.md"
REPORT_HTML_NAME = "aer.html"
REPORT_PICTURE_NAME = "aer.png"


def save_report(folder: Path, document: Mapping[str, Any], *, markdown: str, html: str) -> None:
    """Write `aer.json`, `aer.md` and `aer.html`."""
    (folder / REPORT_JSON_NAME).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / REPORT_MARKDOWN_NAME).write_text(markdown, encoding="utf-8")
    (folder / REPORT_HTML_NAME).write_text(html, encoding="utf-8")
