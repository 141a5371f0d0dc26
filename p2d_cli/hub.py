"""Whether the hub answers: models and data sets ask before they hand over to its client, which tries for minutes."""

from __future__ import annotations

PROBE_SECONDS = 5.0


def why_unreachable(endpoint: str) -> str | None:
    """Say within seconds why the hub does not answer; None if it does."""
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()  # an answer all the same
    except (OSError, http.client.HTTPException) as problem:
        reason = getattr(problem, "reason", problem)
        if not isinstance(reason, ssl.SSLError):  # a certificate is the hub client's affair, not ours
            return f"{endpoint} does not answer ({reason})"
    return None
