"""Use the HTTP service: train a small model, start `twotower serve`, send requests, stop it.

pip install "twotower[serve]"
python examples/serve_http.py
"""

import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from quickstart import purchases

import twotower as tt


def post(address: str, route: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a JSON request; return the response, even if it is an error."""
    request = urllib.request.Request(
        address + route, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return json.load(error)


def main() -> None:
    """Serve on a free port of this machine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        split = tt.splits.leave_last_out(tt.Interactions.from_frame(purchases()))
        config = tt.Config.load(overrides=["training.max_epochs=2", "training.batch_size=128"])
        tt.fit(split, config).save(folder)

        command = [sys.executable, "-m", "twotower", "serve", str(folder), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as service:
            try:
                messages = "" if service.stderr is None else service.stderr.readline()
                if "http" not in messages:  # the service prints its address once it is listening
                    sys.exit(f"the service did not start: {messages}")
                address = messages.split()[-1].rstrip("/")
                print(f"serving at {address}")
                for body in ({"query_id": "u001", "k": 3}, {"history": [2, 4, 6], "k": 3}, {"query_id": "nobody"}):
                    print(f"POST /recommend {json.dumps(body)}\n  -> {json.dumps(post(address, '/recommend', body))}")
            finally:
                service.terminate()
        print("stopped")


if __name__ == "__main__":
    main()
