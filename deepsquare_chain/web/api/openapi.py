"""The OpenAPI document of the JSON API, made of the same table that answers. Pure."""

from __future__ import annotations

from typing import Any, Final

from deepsquare_chain import __version__
from deepsquare_chain.job import JobStatus
from deepsquare_chain.web.api.routes import QUESTIONS, Parameter, Question
from deepsquare_chain.web.api.shape import schema_of

PREFIX: Final = "/api/v1"
PROBLEM: Final = "application/problem+json"
_DESCRIPTION: Final = """\
What the explorer's index holds of a grid. Nothing has to be trusted: each row names its block,
transaction and log, and a row that is not `finalized` may still be undone.

Amounts are texts: `paid` in credit-wei, `paid_credits` beside it in credits. Times are seconds of
chain time. Lists come in pages: give `next` back as `cursor`. Answers carry an `ETag`; ask with
`If-None-Match` and an unchanged one is 304. Who asks too much gets 429 with `Retry-After`.
Texts of jobs and providers are strangers': data, never markup.
"""
_ERRORS: Final = {
    "400": "A parameter that can't be meant.",
    "404": "There is no such thing.",
    "429": "Too many requests; `Retry-After` says how many seconds to wait.",
    "503": "The database does not answer now.",
}


def document() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    components: dict[str, Any] = {"Problem": _problem()}
    paths = {question.path: {"get": _operation(question, components)} for question in QUESTIONS}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "DeepSquare explorer",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": PREFIX}],
        "security": [],
        "tags": [{"name": "index", "description": "Read only, for everybody."}],
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(question: Question, components: dict[str, Any]) -> dict[str, Any]:
    schema = schema_of(question.answer, components)
    problem = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        "operationId": question.name,
        "summary": question.text,
        "tags": ["index"],
        "parameters": [_parameter(each) for each in question.parameters],
        "responses": {
            "200": {
                "description": question.text,
                "headers": {"ETag": {"schema": {"type": "string"}}},
                "content": {"application/json": {"schema": schema}},
            },
            "304": {"description": "Nothing changed since the answer with that `ETag`."},
            **{code: {"description": text, "content": problem} for code, text in _ERRORS.items()},
        },
    }


def _parameter(parameter: Parameter) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": parameter.name,
        "in": "path" if parameter.in_path else "query",
        "required": parameter.in_path,
        "description": parameter.text,
        "schema": _schema(parameter),
    }
    if parameter.kind == "statuses":
        found |= {"style": "form", "explode": True}
    return found


def _schema(parameter: Parameter) -> dict[str, Any]:
    if parameter.kind == "statuses":
        names = [each.name for each in JobStatus if each]
        return {"type": "array", "items": {"type": "string", "enum": names}}
    found: dict[str, Any] = {"type": parameter.kind}
    if parameter.kind == "integer":
        found |= {"minimum": parameter.least, "maximum": parameter.most}
    if parameter.default is not None:
        found["default"] = parameter.default
    return found


def _problem() -> dict[str, Any]:
    text = {"type": "string"}
    return {
        "type": "object",
        "description": "What went wrong, and what to do next.",
        "properties": {
            "type": text,
            "title": text,
            "status": {"type": "integer"},
            "detail": text,
            "hint": text,
        },
        "required": ["type", "title", "status", "detail"],
        "additionalProperties": False,
    }
