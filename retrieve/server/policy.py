"""The headers that protect the page."""

from __future__ import annotations


def content_security_policy(nonce: str | None = None) -> str:
    """Return a policy: nothing from elsewhere, no script and no style but those with the nonce."""
    inline = f" script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}';" if nonce else ""
    return (
        f"default-src 'none';{inline} img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )


HEADERS = {
    "content-security-policy": content_security_policy(),
    "x-content-type-options": "nosniff",
    # Not no-referrer: browsers would send the form of the login as from nowhere.
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
