"""Requests to one server, with the standard library only. Every failure is a ValueError of one sentence."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

TIMEOUT_S = 600.0  # without a new token
INFO_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Http:
    """A server's address, without a slash at the end, and the key that it asks for."""

    url: str
    api_key: str | None = None

    def get(self, path: str) -> Any:
        """Return the JSON at ``path``."""
        with self._open(path, None, INFO_TIMEOUT_S) as response:
            return self._json(path, response.read())

    def try_get(self, path: str) -> Any:
        """Return the JSON at ``path``; None if the server has nothing there."""
        text = self.try_get_text(path)
        try:
            return None if text is None else json.loads(text)
        except ValueError:
            return None

    def try_get_text(self, path: str) -> str | None:
        """Return the text at ``path``; None if the server has nothing there."""
        try:
            with self._open(path, None, INFO_TIMEOUT_S) as response:
                return response.read().decode(errors="replace")
        except ValueError:
            return None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request and return the JSON of its reply."""
        with self._open(path, body, TIMEOUT_S) as response:
            return self._json(path, response.read())

    def post_succeeds(self, path: str) -> bool:
        """Send an empty request; return whether the server accepted it."""
        try:
            with self._open(path, {}, FLUSH_TIMEOUT_S):
                return True
        except ValueError:
            return False

    def events(self, path: str, body: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """Send a request; yield (seconds since then, event) for each event of the reply."""
        began = time.perf_counter()
        with self._open(path, body, TIMEOUT_S) as response:
            try:
                for line in response:
                    data = line.removeprefix(b"data:").strip()
                    if not line.startswith(b"data:") or data == b"[DONE]":
                        continue
                    event = self._json(path, data)
                    if error := event.get("error"):
                        raise ValueError(f"{self.url}{path} refused a prompt: {error}")
                    yield time.perf_counter() - began, event
            except (OSError, HTTPException) as error:
                lost = f"the connection was lost ({error or type(error).__name__})"
                raise ValueError(f"{self.url}{path}: {lost}; see the server's log") from error

    def _open(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            return urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace").strip()
            raise ValueError(f"{self.url}{path} answered {error.code} {error.reason}: {said}") from error
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            advice = "start the server (tools/serve_draft.py does), or check --url"
            raise ValueError(f"{self.url} cannot be reached ({reason}); {advice}") from error

    def _json(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise ValueError(f"{self.url}{path} answered with no JSON: {data[:100]!r}") from error
