"""The service against its own OpenAPI: requests made from it find no server error and no undocumented answer."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from serving.service_models import drawn
from twotower.serving.app import ServiceSettings, create_app


@pytest.fixture(scope="module")
def schema(planted_data, tmp_path_factory):
    app = create_app(
        [drawn(planted_data, tmp_path_factory.mktemp("schema") / "model")], ServiceSettings(watch_seconds=0)
    )
    return schemathesis.openapi.from_asgi("/openapi.json", app)


lazy = schemathesis.pytest.from_fixture("schema")


@lazy.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_no_request_made_from_the_schema_fails_the_service(case):
    case.call_and_validate(
        checks=[
            schemathesis.checks.not_a_server_error,
            schemathesis.checks.CHECKS.get_one("status_code_conformance"),
            schemathesis.checks.CHECKS.get_one("content_type_conformance"),
            schemathesis.checks.CHECKS.get_one("response_schema_conformance"),
        ]
    )
