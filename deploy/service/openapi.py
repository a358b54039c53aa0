"""The OpenAPI document at /openapi.json, and a page of it at /docs that needs no other files."""

from __future__ import annotations

import json
import re
import shlex
from html import escape
from typing import Any
from urllib.parse import urlencode

import numpy as np
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic.json_schema import models_json_schema

from deploy.service.models import Model
from deploy.service.protocol import InferenceRequest
from deploy.service.state import Service

Json = dict[str, Any]
REFERENCE = "#/components/schemas/{model}"
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 0 auto; padding: 1rem }
section { border-top: 1px solid #8888; margin-top: 1.5rem; overflow-x: auto }
pre { overflow: auto; max-height: 12rem; padding: .5rem; background: #8882 }
pre { white-space: pre-wrap; word-break: break-all }
h2 { font-size: 1.2rem; overflow-wrap: anywhere }
td, th { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0 }
"""


def document(app: FastAPI, service: Service) -> None:
    """Add /docs, and complete what FastAPI writes in /openapi.json, with examples for the model being served."""
    written: dict[str, Json] = {}

    def openapi() -> Json:
        model = service.models.first
        if model.digest not in written:
            written.clear()
            written[model.digest] = _document(app, model.name, model)
        return written[model.digest]

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        text = await service.convert(page, openapi(), str(request.base_url).rstrip("/"))
        return HTMLResponse(text, headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})


def example(model: Model) -> Json:
    """An inference request for one image that works as it is."""
    inputs = []
    for name in ("noise", "steps_noise"):
        if name in model.inputs:
            shape = [1 if size == -1 else size for size in model.inputs[name].shape]
            values = np.random.default_rng(7).standard_normal(shape).round(1).reshape(-1).tolist()
            inputs.append({"name": name, "datatype": model.inputs[name].datatype, "shape": shape, "data": values})
    return {"inputs": inputs, "outputs": [{"name": "images"}]}


def _document(app: FastAPI, name: str, model: Model) -> Json:
    """The document, with what FastAPI cannot know: bodies that are read by the routes, and names in paths."""
    made: Json = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema([(InferenceRequest, "validation")], ref_template=REFERENCE)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    schemas |= definitions["$defs"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    values = {"name": name, "version": model.version}
    for path, operations in made["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # invalid requests get a 400
            parameters = operation.setdefault("parameters", [])
            missing = set(re.findall(r"{(\w+)}", path)) - {each["name"] for each in parameters}
            for each in sorted(missing):
                facts = {"name": each, "in": "path", "required": True, "schema": {"type": "string"}}
                parameters.append(facts | ({"example": values[each]} if each in values else {}))
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if content.get("schema", {}).get("$ref") == REFERENCE.format(model="InferenceRequest"):
                content["example"] = example(model)
    return made


def page(openapi: Json, url: str) -> str:
    """The document as HTML, with a command for each request; `url` is that of the service."""
    sections = [
        _section(method.upper(), path, operation, url)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = [
        f'<details id="{escape(name)}" open><summary>{escape(name)}</summary>'
        f"<pre>{escape(json.dumps(schema, indent=1))}</pre></details>"
        for name, schema in openapi["components"]["schemas"].items()
    ]
    title, about = escape(openapi["info"]["title"]), escape(openapi["info"].get("description", ""))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}: requests</title><style>{STYLE}</style><h1>{title}</h1><p>{about} "
        f'The same for programs: <a href="openapi.json">openapi.json</a>.</p>{"".join(sections)}'
        f"<section><h2>Schemas</h2>{''.join(schemas)}</section></html>"
    )


def _section(method: str, path: str, operation: Json, url: str) -> str:
    body = operation.get("requestBody", {})
    responses = operation["responses"].items()
    return (
        f"<section><h2><code>{method} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
        f"<pre>{escape(_command(method, path, operation, url))}</pre>"
        + _table(["parameter", "in", "type", "description"], [_parameter(each) for each in operation["parameters"]])
        + _table(["body", "description"], [[_kinds(body), body["description"]]] if body else [])
        + _table(["status", "body", "description"], [[code, _kinds(of), of["description"]] for code, of in responses])
        + "</section>"
    )


def _command(method: str, path: str, operation: Json, url: str) -> str:
    """A curl command that sends the request, with the examples of its parameters and body."""
    query = {}
    for each in operation["parameters"]:
        value = each.get("example", next(iter(each["schema"].get("examples", [])), None))
        if each["in"] == "path" and value is not None:
            path = path.replace(f"{{{each['name']}}}", str(value))
        elif each["in"] == "query" and value is not None:
            query[each["name"]] = value
    words = ["curl", url + path + ("?" + urlencode(query) if query else "")]
    kinds = operation["responses"].get("200", {}).get("content", {})
    if "image/png" in kinds:
        words += ["--output", "picture.png"]
    if "text/event-stream" in kinds:
        words += ["--no-buffer"]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
    if body is not None:
        words += ["--json", json.dumps(body, separators=(",", ":"))]
    elif method != "GET":
        words += ["--request", method]
    return shlex.join(words)


def _parameter(parameter: Json) -> list[str]:
    schema = parameter["schema"]
    kinds = [each["type"] for each in schema.get("anyOf", [schema]) if each.get("type") not in (None, "null")]
    default = f", by default {schema['default']}" if "default" in schema else ""
    return [parameter["name"], parameter["in"], " or ".join(kinds) + default, parameter.get("description", "")]


def _kinds(message: Json) -> str:
    """The media types of a request or response, with their schemas."""
    names = {
        kind: of.get("schema", {}).get("$ref", "").rpartition("/")[2] for kind, of in message.get("content", {}).items()
    }
    return ", ".join(f"{kind} {name}".strip() for kind, name in names.items())


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{each}</th>' for each in head)}</tr>{cells}</table>"
