"""The shape in which each API tells an error, and its status for input that it does not take."""

from typing import Any, Literal

from fastapi.responses import JSONResponse

# "either" is /rerank before its body is read, which tells whether it is Jina's or text-embeddings-inference's.
Api = Literal["jina", "cohere", "tei", "vllm", "either"]

INVALID: dict[Api, int] = {"jina": 422, "cohere": 400, "tei": 422, "vllm": 400, "either": 422}
TEI_TYPES = {413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}
VLLM_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}
RETRY_AFTER = 1  # seconds; a round takes about half of one


class ApiError(Exception):
    def __init__(self, status: int, message: str):
        self.status, self.message = status, message
        super().__init__(message)


def api_of(path: str) -> Api:
    if path.startswith("/v2/"):
        return "cohere"
    if path == "/rerank":
        return "either"
    return "jina" if path == "/v1/rerank" else "vllm"


def error_body(api: Api, status: int, message: str) -> dict[str, Any]:
    match api:
        case "cohere":
            return {"message": message}
        case "jina":
            return {"detail": message}
        case "vllm":
            kind = VLLM_TYPES.get(status, "InvalidRequestError" if status < 500 else "InternalServerError")
            return {"error": {"message": message, "type": kind, "param": None, "code": status}}
        case "tei":
            return {"error": message, "error_type": TEI_TYPES.get(status, "Backend" if status >= 500 else "Validation")}
        case _:
            return error_body("jina", status, message) | error_body("tei", status, message)


def error_response(api: Api, status: int, message: str) -> JSONResponse:
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER)
    if status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(api, status, message), status, headers)
