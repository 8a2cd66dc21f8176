"""The service against its OpenAPI schema: generated requests cause no server error and no undocumented response."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS

from support.service_models import drawn, listening
from twotower.serving.http.app import ServiceSettings, create_app

NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")

OPERATIONS = (
    *("POST /recommend", "POST /similar", "POST /explain", "POST /reload", "POST /page/places", "GET /models"),
    *(
        "GET /items",
        "GET /items/{item_id}",
        "GET /page/history",
        "GET /page/queries",
        "GET /page/map",
        "GET /page/card",
    ),
    *("GET /healthz", "GET /readyz", "GET /metrics"),
)


@pytest.fixture(scope="module")
def operations(planted_data, tmp_path_factory):
    model = drawn(planted_data, tmp_path_factory.mktemp("schema") / "model")
    with listening(create_app([model], ServiceSettings(watch_seconds=0))) as address:
        schema = schemathesis.openapi.from_url(f"{address}openapi.json")
        yield {one.ok().label: one.ok() for one in schema.get_all_operations()}


def test_all_documented_operations_are_tested(operations):
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_generated_requests_cause_no_server_error(operations, label):
    checks = [CHECKS.get_one(name) for name in NAMES]
    answered = set()

    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operations[label].as_strategy())
    def ask(case):
        answered.add(case.call_and_validate(checks=checks).status_code)

    ask()
    assert answered
