"""page.html, page.css and page.js as one file: for a server, and for a report that holds its own data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

# The text of a script element must not hold these: they could end the element.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page_with_nonce(nonce: str) -> str:
    """Return the page that a server sends.

    Args:
        nonce: Marks its style and its script, as in the content security policy sent with it; letters, digits, `-`
            and `_`.
    """
    return _joined(nonce=nonce, policy="", embedded="null")


def page_with_data(data: Mapping[str, Any]) -> str:
    """Return the page of a report, with its data in it.

    Its content security policy allows its own style and script by their hashes: a nonce in a file is no secret.
    """
    style, script = (_hash_of(_read(name)) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{style}'; script-src '{script}'; img-src data:; media-src file:; "
        "base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    # In ASCII: the names of files may not be valid Unicode.
    embedded = re.sub("[<>&]", lambda match: _ESCAPES[match[0]], json.dumps(data, allow_nan=False))
    return _joined(nonce="", policy=meta, embedded=embedded)


def _joined(**parts: str) -> str:
    """Return the template with its marks replaced, all at once: what is put in is not searched for marks."""
    parts |= {"style": _read("page.css"), "script": _read("page.js")}
    marks = f"@({'|'.join(parts)})@"
    return re.sub(marks, lambda match: parts[match[1]], _read("page.html"))


def _read(name: str) -> str:
    return resources.files("svb.retrieve.page").joinpath(name).read_text("utf-8")


def _hash_of(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
