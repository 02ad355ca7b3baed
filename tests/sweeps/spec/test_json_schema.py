"""The JSON Schema of a specification: current, complete, and of one mind with the reader."""

import copy
import json

import jsonschema

from sweeps.spec.reading import load_spec
from sweeps.spec.sweep_spec import json_schema
from tests.sweeps.spec.spec_text import DIGITS, GOOD_DATA, ROOT

SCHEMA = ROOT / "specs" / "schema.json"


def test_the_schema_file_is_current():
    assert json.loads(SCHEMA.read_text()) == json_schema(), "write it anew: make schema"


def test_the_schema_takes_the_example_and_refuses_what_the_reader_refuses():
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(GOOD_DATA))
    assert not list(validator.iter_errors(json.loads(load_spec(DIGITS).canonical_json())))
    for section, key, value in [
        ("privacy", "target_epsilon", "8"),
        ("privacy", "target_epsilon", 0),
        ("privacy", "policy", "none"),
        ("data", "name", "../etc"),
        ("search_space", "learning_rate", {"grid_search": []}),
        ("search_space", "learning_rate", {"log_uniform": [1, 2]}),
        ("search_space", "iterations", {"uniform": [1, 2]}),
        ("search_space", "noise_multiplier", "auto"),
        ("search", "typo", 1),
    ]:
        bad = copy.deepcopy(GOOD_DATA)
        bad[section][key] = value
        assert list(validator.iter_errors(bad)), (section, key, value)


def test_every_field_is_described():
    def undescribed(node, path):
        if isinstance(node, dict):
            for name, field in node.get("properties", {}).items():
                if "$ref" not in field and "description" not in field and "items" not in field:
                    yield f"{path}.{name}"
            for key, value in node.items():
                yield from undescribed(value, f"{path}/{key}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from undescribed(value, f"{path}/{index}")

    assert list(undescribed(json_schema(), "")) == []
