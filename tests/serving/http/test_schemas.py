"""The service against its OpenAPI schema: generated requests, valid and invalid, pass every check of schemathesis."""

import subprocess
import sys
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from support.service_models import TOKEN, drawn, listening
from twotower.serving.http.app import ServiceSettings, create_app

ROOT = Path(__file__).parents[3]

OPERATIONS = (
    *("POST /recommend", "POST /similar", "POST /explain", "POST /reload", "POST /page/places", "GET /models"),
    *("GET /items", "GET /items/{item_id}", "GET /healthz", "GET /readyz", "GET /metrics"),
    *("GET /page/history", "GET /page/queries", "GET /page/map", "GET /page/card", "GET /page/held-out"),
)

#: They have no parameters that could be wrong.
WITHOUT_INPUT = ("GET /models", "GET /healthz", "GET /readyz", "GET /metrics", "POST /reload")

#: What a valid request may be refused for: values whose meaning depends on the model, which no schema describes.
OF_THE_MODEL = (
    "filter",
    "context",
    "event",
    "features",
    "times",
    "history_events",
    "history: this model",
    "text: this model",
    "group",
    "time",
)


@pytest.fixture(scope="module")
def address(planted_data, tmp_path_factory):
    model = drawn(planted_data, tmp_path_factory.mktemp("schema") / "model")
    with listening(create_app([model], ServiceSettings(token=TOKEN, watch_seconds=0))) as opened:
        yield opened


@pytest.fixture(scope="module")
def operations(address):
    config = schemathesis.Config.from_path(ROOT / "schemathesis.toml")
    schema = schemathesis.openapi.from_url(f"{address}openapi.json", config=config)
    yield {one.ok().label: one.ok() for one in schema.get_all_operations()}


def test_all_documented_operations_are_tested(operations):
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label in OPERATIONS
        for mode in GenerationMode
        if mode.is_positive or label not in WITHOUT_INPUT
    ],
)
def test_generated_requests_pass_every_check(operations, label, mode):
    answered = set()

    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operations[label].as_strategy(generation_mode=mode))
    def ask(case):
        response = case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"})
        answered.add(response.status_code)
        if mode.is_positive and response.status_code == 422:
            assert response.json()["detail"].startswith(OF_THE_MODEL), response.text

    ask()
    assert answered


@pytest.mark.slow
def test_the_command_finds_nothing(address, tmp_path):
    """`schemathesis run` with all checks and phases: also methods, authorization and sequences of requests."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}openapi.json", "--checks", "all"]
    options = ["-H", f"Authorization: Bearer {TOKEN}", "-n", "40", "--seed", "0", "--no-color"]
    (tmp_path / "schemathesis.toml").write_bytes((ROOT / "schemathesis.toml").read_bytes())
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout and "16/16" in done.stdout
