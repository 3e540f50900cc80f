"""The form that an answer must have: the spellings of OpenAI, vLLM, SGLang and llama.cpp, and compiling it beside the
event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from ..dynamic.engine.grammar_compiler import CompiledGrammar, GrammarCompiler, GrammarsBusy
from ..dynamic.engine.structured_limits import read_source
from ..dynamic.engine.structured_outputs import StructuredOutputsParams, read_structured_outputs
from .errors import invalid, overloaded
from .text import TextPool
from .wire.openai import GenerationRequest

IGNORED_HEADER = "x-structured-output-ignored"
# Fields with one spelling of a form each, and their names in StructuredOutputsParams.
SPELLINGS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "ebnf": "grammar",
}
FIELDS = ("response_format", "structured_outputs", *SPELLINGS)


def wanted_form(body: GenerationRequest) -> tuple[StructuredOutputsParams | None, str]:
    """The form that a request asks for, and the field that says so.

    Raises:
        ApiError: status 400 that names the field.
    """
    given = {name: value for name in FIELDS if (value := getattr(body, name)) not in (None, "")}
    if given.get("response_format") == {"type": "text"}:
        del given["response_format"]
    if len(given) > 1:
        raise invalid(f"{' and '.join(given)} exclude each other.", param=list(given)[1])
    whitespace = body.guided_whitespace_pattern
    if not given:
        if whitespace is not None:
            raise invalid("guided_whitespace_pattern needs guided_json.", param="guided_whitespace_pattern")
        return None, ""
    ((name, value),) = given.items()
    try:
        if name == "response_format":
            form = _of_response_format(value)
        elif name == "structured_outputs":
            form = read_structured_outputs(value)
        else:
            extra = {} if whitespace is None else {"whitespace_pattern": whitespace}
            form = StructuredOutputsParams(**{SPELLINGS[name]: value, **extra})
        if whitespace is not None and name != "guided_json":
            raise invalid("guided_whitespace_pattern needs guided_json.", param="guided_whitespace_pattern")
    except ValueError as error:
        raise invalid(f"{name}: {str(error).removeprefix('structured_outputs').lstrip(' .')}.", param=name) from error
    return form, name


def _of_response_format(value: dict[str, Any]) -> StructuredOutputsParams:
    kind = value.get("type")
    known = {"json_object": {"type", "schema"}, "json_schema": {"type", "json_schema"}, "text": {"type"}}
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"the type must be text, json_object or json_schema, not {str(kind)[:50]!r}")
    _no_others(value, known[kind], kind)
    if kind == "text":
        raise ValueError("the type text takes nothing else")
    if kind == "json_object":  # with a schema as in llama.cpp
        schema = value.get("schema")
        return StructuredOutputsParams(json_object=True) if schema is None else _of_schema(schema, False)
    inner = value.get("json_schema")
    if not isinstance(inner, dict):
        raise ValueError("json_schema must be an object that holds the schema")
    _no_others(inner, {"name", "description", "schema", "strict"}, "json_schema")
    strict = inner.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise ValueError("strict must be true or false")
    if inner.get("schema") is None:
        raise ValueError("json_schema.schema is missing")
    return _of_schema(inner["schema"], bool(strict))


def _of_schema(schema: Any, strict: bool) -> StructuredOutputsParams:
    if not isinstance(schema, dict):
        raise ValueError("the schema must be an object")
    return StructuredOutputsParams(json=schema, strict=strict)


def _no_others(value: dict[str, Any], known: set[str], where: str) -> None:
    if others := sorted(name for name, given in value.items() if name not in known and given is not None):
        shown = others[0][:50].encode("utf-8", "replace").decode()
        raise ValueError(f"{where} does not take {shown!r}")


async def compiled_form(
    compiler: GrammarCompiler, text: TextPool, form: StructuredOutputsParams, param: str
) -> CompiledGrammar:
    """Compile a form; neither the event loop nor the engine waits for it.

    Arguments:
        text: whose threads check it.
        param: the request's field that holds it.

    Raises:
        ApiError: status 400 for a form that is wrong, too large or takes too long, 429 where others are in front of it.
    """
    try:
        source = await text.run(read_source, form, compiler.limits)
        await asyncio.to_thread(compiler.prepare)
        job = compiler.start(source)
        future = asyncio.wrap_future(job.future)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # also if nobody waits any more
        while True:
            try:
                return await asyncio.wait_for(asyncio.shield(future), compiler.limits.compile_seconds)
            except TimeoutError:
                if (error := compiler.late(job)) is not None:
                    raise error from None
    except ValueError as error:
        raise invalid(f"{param}: {error}.", param=param, code="invalid_structured_output") from error
    except GrammarsBusy as error:
        raise overloaded(f"{error}.", 1.0) from error


def ignored_header(grammar: CompiledGrammar) -> dict[str, str]:
    """The header that names the keywords of a schema that are not enforced."""
    if not grammar.ignored:
        return {}
    return {IGNORED_HEADER: ", ".join(grammar.ignored).encode("ascii", "replace").decode()[:500]}
