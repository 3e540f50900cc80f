"""JSON schemas of every kind that structured outputs enforce, small enough for random models to finish them."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
SHORT: Schema = {"type": "string", "maxLength": 3}
SMALL: Schema = {"type": "integer", "minimum": 0, "maximum": 9}


def closed(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    """An object with these properties and no others, all of them required if nothing else is said."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False, **more}


TREE: Schema = {
    "$defs": {"node": closed({"value": SMALL, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})},
    "$ref": "#/$defs/node",
}
KINDS: dict[str, Schema] = {
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "types": {"type": ["boolean", "null"]},
    "const": {"const": {"a": [1, None, 'é"\\']}},
    "const text": {"const": "a\nb\u0001"},
    "enum": {"enum": ["one", 2, 3.5, None, False, ["x"], {"y": {}}]},
    "enum and type": {"type": "string", "enum": ["red", "green", 3]},
    "string": {"type": "string", "minLength": 1, "maxLength": 6},
    "empty string": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}\d{3}$"},
    "pattern inside": {"type": "string", "pattern": "b+", "maxLength": 4},
    "pattern and length": {"type": "string", "pattern": "^[ab]*$", "minLength": 2, "maxLength": 5},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time", "maxLength": 20},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "integer": {"type": "integer", "minimum": -5, "maximum": 120},
    "exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    "negative": {"type": "integer", "minimum": -20, "maximum": -11},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 200},
    "number": {"type": "number", "minimum": 0.5, "maximum": 2.5, "multipleOf": 0.25},
    "array": {"type": "array", "items": SMALL, "minItems": 1, "maxItems": 3},
    "empty array": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [SMALL, {"type": "boolean"}], "items": False, "minItems": 2},
    "tuple and rest": {"type": "array", "prefixItems": [{"const": "k"}], "items": SMALL, "minItems": 1, "maxItems": 3},
    "array of arrays": {"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 2, "items": SMALL}},
    "object": closed({"name": SHORT, "age": SMALL}),
    "optional": closed({"a": SMALL, "b": {"type": "boolean"}, "c": {"type": "null"}}, ["b"]),
    "all optional": closed({"a": SMALL, "b": SMALL}, []),
    "no properties": closed({}),
    "nested": closed({"a": closed({"b": closed({"c": {"enum": ["deep", "deeper"]}})})}),
    "map": {"type": "object", "additionalProperties": SMALL, "maxProperties": 2},
    "patterned": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "odd names": closed({"a b": SMALL, 'quo"te': SMALL, "ünï": SMALL, "": SMALL, "$ref": SMALL}),
    "anyOf": {"anyOf": [SMALL, {"type": "boolean"}, closed({"k": {"const": 1}})]},
    "oneOf": {"oneOf": [closed({"kind": {"const": "a"}, "x": SMALL}), closed({"kind": {"const": "b"}, "y": SHORT})]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    "allOf objects": {
        "allOf": [
            {"type": "object", "properties": {"a": SMALL}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
            {"properties": {"a": True, "b": True}, "additionalProperties": False},
        ]
    },
    "beside anyOf": {"type": "object", "anyOf": [closed({"a": SMALL}), closed({"b": SMALL})]},
    "$ref": {"$defs": {"small": SMALL}, **closed({"a": {"$ref": "#/$defs/small"}, "b": {"$ref": "#/$defs/small"}})},
    "definitions": {"definitions": {"s": {"enum": ["s", "t"]}}, "type": "array", "items": {"$ref": "#/definitions/s"}},
    "$anchor": {"$defs": {"x": {"$anchor": "here", "type": "boolean"}}, "$ref": "#here"},
    "recursive": TREE,
    "annotated": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/annotated",
        "title": "t",
        **closed({"a": {**SMALL, "description": "d", "default": 1, "examples": [2], "deprecated": True}}),
    },
    "true": closed({"a": {"enum": [1]}, "b": True}, ["a"]),
}


def many(count: int) -> list[Schema]:
    """This many different schemas: those above, and random combinations of them."""
    rng = random.Random(26)
    parts = [schema for name, schema in KINDS.items() if not {"$ref", "$id", "$defs", "definitions"} & schema.keys()]
    found = list(KINDS.values())
    while len(found) < count:
        one, other, third = rng.sample(parts, 3)
        forms = [
            closed({"a": one, "b": other}, rng.sample(["a", "b"], rng.randint(0, 2))),
            {"type": "array", "items": {"anyOf": [one, other]}, "maxItems": 2},
            {"type": "array", "prefixItems": [one, other, third], "items": False, "minItems": rng.randint(0, 3)},
            {"anyOf": [closed({"kind": {"const": 1}, "it": one}), closed({"kind": {"const": 2}, "it": other})]},
            closed({f"k{i}": part for i, part in enumerate((one, other, third))}, ["k1"]),
            {"$defs": {"it": one}, **closed({"x": {"$ref": "#/$defs/it"}, "y": {"$ref": "#/$defs/it"}})},
            closed({"deep": closed({"list": {"type": "array", "items": one, "minItems": 1, "maxItems": 2}})}),
        ]
        if (form := forms[len(found) % 7]) not in found:
            found.append(form)
    return found[:count]


# Schemas whose keywords are not all enforced, with these keywords.
UNENFORCED: list[tuple[Schema, set[str]]] = [
    ({"type": "array", "items": SMALL, "uniqueItems": True}, {"uniqueItems"}),
    ({"type": "array", "contains": SMALL, "minContains": 2}, {"contains", "minContains"}),
    ({"type": "string", "not": {"const": "a"}}, {"not"}),
    ({"if": {"type": "string"}, "then": {"maxLength": 2}, "else": {}}, {"if", "then", "else"}),
    ({"type": "object", "propertyNames": {"maxLength": 2}}, {"propertyNames"}),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, {"dependentRequired"}),
    ({"type": "object", "dependentSchemas": {"a": {}}}, {"dependentSchemas"}),
    ({"type": "object", "unevaluatedProperties": False}, {"unevaluatedProperties"}),
    ({"type": "array", "unevaluatedItems": False}, {"unevaluatedItems"}),
    ({"type": "string", "format": "json-pointer"}, {"format json-pointer"}),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, {"oneOf"}),
    ({"type": "object", "minProperties": 2}, {"minProperties"}),
    (closed({"a": {"type": "array", "uniqueItems": True}, "b": {"not": {}}}), {"uniqueItems", "not"}),
]
