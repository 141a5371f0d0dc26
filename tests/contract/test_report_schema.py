"""The published JSON schema of `aer.json` says what a report holds."""

import json
from pathlib import Path

import jsonschema
import pytest
from pydantic import TypeAdapter

import p2d_cli.reporting
from p2d_cli.core.aer import AerReport

PUBLISHED = Path(p2d_cli.reporting.__file__).with_name("aer.schema.json")
GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "v1" / "report" / "aer.json"


def described():
    """The schema that follows from the report's own types; a number that JSON cannot hold is null."""

    def nullable(part):
        if isinstance(part, list):
            return [nullable(item) for item in part]
        if not isinstance(part, dict):
            return part
        changed = {key: nullable(value) for key, value in part.items()}
        return changed | {"type": ["number", "null"]} if changed.get("type") == "number" else changed

    schema = nullable(TypeAdapter(AerReport).json_schema())
    schema["properties"] = {"schema": {"const": "p2d.aer/1"}} | schema["properties"]
    schema["required"] = ["schema", *schema["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "p2d.aer/1"} | schema


def test_the_published_schema_is_that_of_the_code():
    """To renew it: `python tests/contract/test_report_schema.py`."""
    assert json.loads(PUBLISHED.read_text()) == described()


def test_a_report_is_valid_and_a_wrong_one_is_not():
    schema, report = json.loads(PUBLISHED.read_text()), json.loads(GOLDEN.read_text())
    jsonschema.validate(report, schema)
    report["rows"][0]["aer"] = "cheap"
    with pytest.raises(jsonschema.ValidationError, match="cheap"):
        jsonschema.validate(report, schema)


def test_maps_of_heads_may_say_which_read_rows():
    schema, report = json.loads(PUBLISHED.read_text()), json.loads(GOLDEN.read_text())
    older = {"method": "readout", "artifact": "a", "num_layers": 1, "num_heads": 2, "selected": [1], "levels": "09"}
    report["head_maps"] = [older | {"used_by": ["run"]}, older | {"used_by": [], "reads_all": [0], "reads_best": [1]}]
    jsonschema.validate(report, schema)
    report["head_maps"][1]["reads_best"] = "1"
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'array'"):
        jsonschema.validate(report, schema)


if __name__ == "__main__":
    PUBLISHED.write_text(json.dumps(described(), indent=2) + "\n")
