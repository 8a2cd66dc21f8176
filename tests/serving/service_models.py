"""Model folders and requests for the tests of the service."""

import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from starlette.testclient import TestClient

from twotower.config import Config
from twotower.data.declaring import encode_features
from twotower.serving.app import ServiceSettings, create_app
from twotower.serving.artifact import Artifact
from twotower.serving.service.server import server
from twotower.towers import build_towers

SETTINGS = ["item_tower.dimension=16", "query_tower.history.length=10"]
TOKEN = "a-token-of-some-length"


def drawn(data, folder: Path, seed: int = 0, table=None, *, changes=(), **metadata) -> Path:
    """A model with weights as they were drawn, written to a folder: what it answers is as good as any to compare."""
    config = Config.load(None, [*SETTINGS, *changes])
    features = encode_features(config, data)
    torch.manual_seed(seed)
    towers = build_towers(
        config,
        num_queries=data.num_queries,
        num_items=data.num_items,
        item_features=features.get("item"),
        query_features=features.get("query"),
        context=features.get("context"),
    ).eval()
    with torch.no_grad():
        embeddings = towers.item_embeddings()
    model = Artifact(
        config=config,
        towers=towers,
        item_embeddings=embeddings,
        item_counts=torch.from_numpy(data.item_counts()),
        queries=data.queries,
        items=data.items,
        history_offsets=data.offsets,
        history_items=data.item_codes,
        item_table=data.item_table if table is None else table,
        metadata={
            "data": {"source": "/somewhere/else/purchases.csv", "account": data.account.to_dict()},
            "training": {"epochs": 0},
            **metadata,
        },
    )
    return model.save(folder)


def client(*folders: Path, token: str | None = None, **options) -> TestClient:
    """A service in this process; to be used as a context."""
    settings = ServiceSettings(token=token, hosts=("localhost",), **options)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return TestClient(
        create_app(folders, settings), base_url="http://localhost", headers=headers, raise_server_exceptions=False
    )


def replace(folder: Path, other: Path) -> None:
    """Put a copy of another model in a folder's place the way models are written: whole, by renaming."""
    beside, old = folder.with_name("beside"), folder.with_name("old")
    shutil.copytree(other, beside)
    folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old)


@contextmanager
def listening(app):
    """The real web server on a free port of this machine, in a thread; gives its address."""
    opened, told = threading.Event(), []

    def open_(address):
        told.append(address)
        opened.set()

    one = server(app, host="127.0.0.1", port=0, opened=open_)
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        assert opened.wait(200)
        yield told[0]
    finally:
        one.should_exit = True
        thread.join(200)
    assert not thread.is_alive()
