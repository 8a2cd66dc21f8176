"""Model folders and requests for the tests of the service."""

import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from starlette.testclient import TestClient

from support.towers import towers_of
from twotower.config.run import Config
from twotower.serving.http.app import ServiceSettings, create_app
from twotower.serving.http.server import server
from twotower.serving.model_folder import SavedModel

SETTINGS = ["item_tower.dimension=16", "query_tower.history.length=10"]
TOKEN = "a-token-of-some-length"


def drawn(data, folder: Path, /, seed: int = 0, table=None, *, changes=(), rows=None, **metadata) -> Path:
    """Save a model with random weights to a folder; its results are as good as any for comparisons."""
    config = Config.load(None, [*SETTINGS, *changes])
    torch.manual_seed(seed)
    towers = towers_of(config, data).eval()
    with torch.no_grad():
        embeddings = towers.item_embeddings()
    model = SavedModel(
        config=config,
        towers=towers,
        item_embeddings=embeddings,
        item_counts=torch.from_numpy(data.item_counts()),
        queries=data.queries,
        items=data.items,
        history_offsets=data.offsets,
        history_items=data.item_codes,
        item_table=data.item_table if table is None else table,
        rows=rows,
        metadata={
            "data": {"source": "/somewhere/else/purchases.csv", "account": data.account.to_dict()},
            "training": {"epochs": 0},
            **metadata,
        },
    )
    return model.save(folder)


def client(*folders: Path, token: str | None = None, **options) -> TestClient:
    """Create a test client of a service in this process; use it as a context manager."""
    settings = ServiceSettings(token=token, hosts=("localhost",), **options)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return TestClient(
        create_app(folders, settings), base_url="http://localhost", headers=headers, raise_server_exceptions=False
    )


def replace(folder: Path, other: Path) -> None:
    """Replace a folder by a copy of another model, atomically by renaming, as models are saved."""
    new, old = folder.with_name("new"), folder.with_name("old")
    shutil.copytree(other, new)
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)


@contextmanager
def listening(app):
    """Run the real web server on a free port in a thread; yields its address."""
    opened, addresses = threading.Event(), []

    def open_(address):
        addresses.append(address)
        opened.set()

    one = server(app, host="127.0.0.1", port=0, limits=app.state.service.settings, opened=open_)
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        assert opened.wait(200)
        yield addresses[0]
    finally:
        one.should_exit = True
        thread.join(200)
    assert not thread.is_alive()
