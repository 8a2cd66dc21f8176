"""Models replaced while in use, and the serving process: no request is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from support.service_models import TOKEN, client, drawn, listening, replace
from twotower.errors import InputError
from twotower.serving import Retriever
from twotower.serving.http.app import ServiceSettings, create_app

BODY = {"query_id": "u001", "k": 20}

#: Timeout in seconds; generous, because a busy machine is slow.
PATIENCE = 200


@pytest.fixture(scope="module")
def two(planted_data, tmp_path_factory):
    """Two models and the results of each."""
    folder = tmp_path_factory.mktemp("two")
    models = [drawn(planted_data, folder / name / "model", seed) for seed, name in enumerate("ab")]
    answers = [Retriever.load(model).recommend(["u001"], k=20)["item"].to_list() for model in models]
    assert answers[0] != answers[1]
    return models, answers


def items(answer):
    return [row["item"] for row in answer.json()["items"]]


def test_models_are_swapped_under_load_without_a_lost_request(two, tmp_path):
    """Every response is complete and from the model it names; both versions respond; no request fails."""
    (first, second), answers = two
    run = tmp_path / "run" / "model"
    shutil.copytree(first, run)
    service = create_app([run], ServiceSettings(watch_seconds=0.02))
    by_version, stop, failures, asked = {}, threading.Event(), [], [0] * 6

    def load(worker):
        with httpx.Client(base_url=address, timeout=PATIENCE) as line:
            while not stop.is_set():
                answer = line.post("/recommend", json=BODY)
                asked[worker] += 1
                if answer.status_code != 200:
                    failures.append(answer.text)
                    continue
                by_version.setdefault(answer.json()["version"], set()).add(tuple(items(answer)))

    with listening(service) as address, ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(load, worker) for worker in range(6)]
        try:
            versions = [httpx.get(f"{address}models", timeout=PATIENCE).json()["models"][0]["version"]]
            for number in range(6):
                replace(run, (second, first)[number % 2])
                deadline = time.monotonic() + PATIENCE
                while (
                    now := httpx.get(f"{address}models", timeout=PATIENCE).json()["models"][0]["version"]
                ) == versions[-1]:
                    assert time.monotonic() < deadline, "the new model was not loaded"
                    time.sleep(0.01)
                versions.append(now)
                before = sum(asked)
                while sum(asked) < before + 12 and not failures:  # wait for answers of the new model
                    time.sleep(0.005)
        finally:
            stop.set()
        for worker in workers:
            worker.result()
        metrics = httpx.get(f"{address}metrics", timeout=PATIENCE).text
    assert not failures and versions[::2] == [versions[0]] * 4 and versions[1::2] == [versions[1]] * 3
    assert by_version == {versions[0]: {tuple(answers[0])}, versions[1]: {tuple(answers[1])}}
    assert 'twotower_model_reloads_total{model="run",outcome="swapped"} 6.0' in metrics


def test_a_broken_model_is_refused_and_the_old_one_stays_in_use(two, tmp_path):
    (first, second), answers = two
    run = tmp_path / "run" / "model"
    shutil.copytree(first, run)
    with client(run, token=TOKEN, watch_seconds=0) as service:

        def reload():
            return service.post("/reload", json={}).json()["models"]["run"]

        assert (reload(), items(service.post("/recommend", json=BODY))) == ("unchanged", answers[0])
        broken = tmp_path / "broken"
        shutil.copytree(second, broken)
        (broken / "towers.safetensors").write_bytes(b"not a model")
        replace(run, broken)
        assert [reload(), reload()] == ["broken", "broken"]
        assert items(service.post("/recommend", json=BODY)) == answers[0]
        run.rename(tmp_path / "away")
        assert (reload(), items(service.post("/recommend", json=BODY))) == ("missing", answers[0])
        (tmp_path / "away").rename(run)
        replace(run, second)
        assert (reload(), items(service.post("/recommend", json=BODY))) == ("swapped", answers[1])
        metrics = service.get("/metrics").text
    assert 'outcome="broken"} 2.0' in metrics and 'outcome="swapped"} 1.0' in metrics
    assert metrics.count("twotower_model_info{") == 1


def test_the_process_serves_reloads_on_sighup_and_shuts_down_cleanly(two, tmp_path):
    (first, second), answers = two
    run = tmp_path / "run" / "model"
    shutil.copytree(first, run)
    command = [sys.executable, "-W", "error", "-m", "twotower", "serve", str(run), "--port", "0", "--watch", "0"]
    environment = {**os.environ, "TWOTOWER_TOKEN": TOKEN}
    with (  # log to a file: a pipe that is not read fills up and blocks the process
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.PIPE, text=True, env=environment) as one,
    ):
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+/", one.stderr.readline()).group()
            with httpx.Client(base_url=address, timeout=PATIENCE, headers={"Authorization": f"Bearer {TOKEN}"}) as line:
                assert httpx.post(f"{address}recommend", json=BODY, timeout=PATIENCE).status_code == 401
                assert items(line.post("/recommend", json=BODY)) == answers[0]
                replace(run, second)
                one.send_signal(signal.SIGHUP)
                deadline = time.monotonic() + PATIENCE
                while items(line.post("/recommend", json=BODY)) != answers[1]:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            one.send_signal(signal.SIGTERM)
            one.communicate(timeout=PATIENCE)
        finally:
            one.kill()
    logs = (tmp_path / "log").read_text()
    assert one.returncode in (0, -signal.SIGTERM)
    assert all(line.startswith('{"time": ') for line in logs.splitlines()) and '"event": "model swapped"' in logs
    assert "u001" not in logs and TOKEN not in logs


def test_invalid_models_are_refused_at_startup(two, tmp_path):
    (first, _), _ = two
    for folders, reason in (([tmp_path / "none"], "no such folder"), ([first, first], "twice"), ([], "at least one")):
        with pytest.raises(InputError, match=reason):
            create_app(folders)
    with pytest.raises(InputError, match="not one of|cannot|[Nn]ame|address"):
        from twotower.serving.http.server import run

        run(None, host="203.0.113.7", port=0, limits=ServiceSettings())
