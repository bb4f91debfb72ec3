"""The address of a model that somebody serves: `http://127.0.0.1:8000/v1#gemma-3-4b-it`."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from temper.errors import RecipeError


class Address(NamedTuple):
    """An OpenAI-compatible endpoint (vLLM's server, any service): its base URL, and the model's name there."""

    url: str
    model: str

    def __str__(self) -> str:
        return f"{self.url}#{self.model}"


def endpoint(reference: str, *, where: str = "") -> Address | None:
    """The endpoint that a model reference names; None where it names a stage, a folder or a hub id.

    >>> endpoint("http://127.0.0.1:8000/v1/#gemma")
    Address(url='http://127.0.0.1:8000/v1', model='gemma')
    >>> endpoint("google/gemma-3-1b-it") is None
    True

    Raises:
        RecipeError: no model after the #, no host, or a key in the URL: recipes and run folders are passed on.
    """
    if not reference.startswith(("http://", "https://")):
        return None
    url, _, model = reference.partition("#")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise RecipeError(f"«{reference}» is no address: {error}", where=where, do="write URL#MODEL") from None
    if "@" in parts.netloc or parts.query:
        raise RecipeError(
            f"the address of an endpoint holds more than a host and a path: {parts.scheme}://{parts.hostname}{parts.path}",
            where=where,
            do="take user, password and key out of it; a key belongs into the environment variable TEMPER_API_KEY",
        )
    if not parts.hostname or not model:
        raise RecipeError(
            f"«{reference}» does not say {'which model of the endpoint is meant' if parts.hostname else 'which host is meant'}",
            where=where,
            do="write URL#MODEL, such as http://127.0.0.1:8000/v1#google/gemma-3-4b-it",
        )
    return Address(url.rstrip("/"), model)
