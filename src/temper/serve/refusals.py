"""Errors as OpenAI's protocol has them."""

from __future__ import annotations

import re
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from temper.errors import TemperError

# Of all routes, for the description of the API.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": "OpenAI's error envelope"} for status in (400, 401, 403, 404, 409, 413, 429)
}


class Refused(HTTPException):
    """A request that is answered with an error. (Of starlette's kind: FastAPI calls any other that is raised while it reads a
    body a body that cannot be parsed.)

    Args:
        status: HTTP's.
        code: a word for programs; None where the protocol has none.
        param: the field that is at fault.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.status, self.message, self.code, self.param = status, message, code, param

    def response(self) -> JSONResponse:
        return JSONResponse(envelope(self.status, self.message, self.code, self.param), self.status, self.headers)


def envelope(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error. What was sent may be named in it, and half a character cannot be sent back."""
    message, param = _whole(message), param and _whole(param)
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def told(error: TemperError, status: int = 400, *, code: str | None = None, param: str | None = None) -> Refused:
    """An error of ours: what happened, where, and what to do, on one line."""
    parts = [error.what, error.where, error.do]
    return Refused(status, "; ".join(part.rstrip(".") for part in parts if part), code=code, param=param)


def of_fields(errors: list[Any]) -> Refused:
    """What pydantic found, by name."""
    said, params = [], []
    for error in errors[:3]:
        place = [str(p) for p in error["loc"] if p != "body"]
        # Of a field that takes several kinds each is told apart; the first names suffice.
        name = next((p for p in place if not p.startswith(("function-after", "list[", "constrained"))), "")
        within = "".join(f"[{p}]" if p.isdigit() else "" for p in place[1:])
        named = re.search("«(\\w+)»", str(error["msg"]))  # of a rule between fields, which has no place of its own
        params.append(name or (named[1] if named else None))
        if error["type"] == "extra_forbidden":
            said.append(f"«{'.'.join(place)}» is not supported, and would be ignored: leave it out")
        elif error["type"] == "json_invalid":
            said.append(f"the body is no JSON: {error.get('ctx', {}).get('error', '')}".rstrip(": "))
            params[-1] = None
        elif not place and error["type"] in ("model_attributes_type", "dict_type"):
            said.append("the body is no JSON object: send one, as Content-Type: application/json")
        elif error["type"] == "missing":
            said.append(f"«{'.'.join(place) or 'the body'}» is missing")
        else:
            message = str(error["msg"]).removeprefix("Value error, ")
            said.append(f"«{name}{within}»: {message[:1].lower()}{message[1:]}" if name and "«" not in message else message)
    unique = list(dict.fromkeys(said))
    code = "unsupported_parameter" if any("is not supported" in s for s in unique) else None
    return Refused(400, "; ".join(unique) or "the request cannot be read", code=code, param=params[0] if params else None)
