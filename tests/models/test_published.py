"""Weights by name: a server on this machine that breaks off or lies."""

import hashlib
import http.server
import multiprocessing
import os
import sys
import threading
import time

import numpy as np
import pytest
import torch

from ssl_xcit import create_model, load_backbone
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.eval.checkpoints import folder_of
from ssl_xcit.models import download, published
from ssl_xcit.models.download import fetch

BODY = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    body, status, slow, length, breaks = BODY, 200, 0.0, None, ()

    def handle_error(self, *_):
        """Who hangs up is expected."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        if server.status != 200:
            return self.send_error(server.status)
        self.send_response(200)
        self.send_header("Content-Length", str(server.length or len(server.body)))
        self.end_headers()
        content = server.body
        if len(server.requests) <= len(server.breaks):
            content = content[: server.breaks[len(server.requests) - 1]]
        for at in range(0, len(content), 100_000):
            self.wfile.write(content[at : at + 100_000])
            time.sleep(server.slow)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.01)
    with Server(("127.0.0.1", 0), Handler) as made:
        made.requests, made.address = [], f"http://127.0.0.1:{made.server_port}/w.pth"
        threading.Thread(target=made.serve_forever, args=(0.02,)).start()
        yield made
        made.shutdown()


def test_once_and_then_from_the_disk(server, tmp_path):
    server.breaks = [700_000, 0]  # and a third time whole
    path = fetch(server.address, tmp_path / "w.pth", SHA256)
    assert path.read_bytes() == BODY
    assert (tmp_path / "w.pth.sha256").read_text() == f"{SHA256}  w.pth\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pth", "w.pth.sha256"]
    fetch(server.address, path)
    assert len(server.requests) == 3


def test_after_a_killed_process_two_download_once(server, tmp_path):
    path = tmp_path / "w.pth"

    def start():
        context = multiprocessing.get_context("fork")
        process = context.Process(target=fetch, args=(server.address, path))
        process.start()
        return process

    server.slow = 0.02
    killed, limit = start(), time.monotonic() + 60
    while not any(part.stat().st_size for part in tmp_path.glob(".w.pth.part")):
        assert time.monotonic() < limit
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert not path.exists()
    other = start()
    assert fetch(server.address, path).read_bytes() == BODY
    other.join(60)
    assert other.exitcode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pth", "w.pth.sha256"]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("change", "attempts", "message"),
    [
        ({"status": 404}, 1, r"404 Not Found\): copy the file by other means to"),
        ({"status": 503}, download.ATTEMPTS, r"503 Service Unavailable\): copy"),
        ({"length": 4_000_000}, download.ATTEMPTS, "1000000 more expected"),
        ({"body": b"\n<!DOCTYPE html><html>Welcome"}, 1, "text of a web page; it was removed"),
    ],
)
def test_a_server_that_errs(server, tmp_path, change, attempts, message):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=message):
        fetch(server.address, tmp_path / "w.pth")
    assert not list(tmp_path.iterdir())
    assert len(server.requests) == attempts


def test_a_disk_that_is_full(server, tmp_path):
    (tmp_path / ".w.pth.part").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"No space left on device.*make room"):
        fetch(server.address, tmp_path / "w.pth")


def test_a_checksum_that_is_wrong_and_a_file_that_changed(server, tmp_path):
    wrong = "0" * 64
    with pytest.raises(UserError, match=f"SHA-256 {SHA256}, not {wrong}; it was removed"):
        fetch(server.address, tmp_path / "w.pth", wrong)
    assert not list(tmp_path.glob("*w.pth*"))
    path = fetch(server.address, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"not {wrong}: remove it"):
        fetch(server.address, path, wrong)
    path.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(UserError, match="has changed since it was downloaded"):
        fetch(server.address, path)


def test_names_and_addresses_load(server, cache, monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = create_model("xcit_nano_12_p16").eval()
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth")
    server.body = (tmp_path / "m.pth").read_bytes()
    digest = hashlib.sha256(server.body).hexdigest()
    base = server.address.rsplit("/", 1)[0]
    monkeypatch.setattr(published, "SUPERVISED", base + "/{}.pth")

    def loads(word, shift):
        return torch.equal(load_backbone(word).cls_token, model.cls_token + shift)

    assert loads(f"xcit_nano_12_p16_224#sha256={digest}", 0)
    assert server.requests[0] == "/xcit_nano_12_p16_224.pth"
    path = cache / "weights/xcit_nano_12_p16_224.pth"
    assert folder_of(path) == folder_of(path.parent / "timm/xcit_nano_12_p16_224/model.safetensors")
    assert loads(f"{base}/mine.pth", 0)
    # the name of the first, at another address: nothing is mistaken for the other
    other = {**model.state_dict(), "cls_token": model.cls_token + 1}
    torch.save({"model": other}, tmp_path / "other.pth")
    server.body = (tmp_path / "other.pth").read_bytes()
    assert loads(f"{base}/elsewhere/mine.pth", 1)
    assert loads(f"{base}/elsewhere/xcit_nano_12_p16_224.pth", 1)
    assert loads("xcit_nano_12_p16_224", 0)
    # a checksum of a file that is there already
    load_backbone(f"{tmp_path / 'm.pth'}#sha256={digest}")
    with pytest.raises(UserError, match="has the SHA-256"):
        load_backbone(f"{tmp_path / 'other.pth'}#sha256={digest}")


def test_the_addresses_are_the_public_ones():
    known = published.released_addresses()
    assert len(known) == 50
    assert known["dino_xcit_small_12_p8"] == (
        "https://dl.fbaipublicfiles.com/dino/dino_xcit_small_12_p8_pretrain/"
        "dino_xcit_small_12_p8_pretrain.pth"
    )
    assert known["dino_xcit_medium_24_p16_full"].endswith("_pretrain_full_checkpoint.pth")
    import timm

    theirs = {
        cfg.url
        for name in timm.list_models("xcit_*", pretrained=True)
        if (cfg := timm.get_pretrained_cfg(name)) is not None
    }
    assert {url for name, url in known.items() if not name.startswith("dino")} == theirs


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dino_xcit_small_12_p16", r"pretrain\.pth cannot be downloaded .* copy .*ckpt=FILE"),
        ("dino_xcit_small_12_p61", "did you mean dino_xcit_small_12_p16"),
        ("xcit_small_12_p16", "name of an architecture, and released weights of it are dino_xcit"),
        ("xcit_small_12_p4", "released weights of it are none"),
        ("xcit_nano_12_p8_224#sha256=12", "64 hexadecimal digits"),
        ("timm/xcit_nano_12_p16_224.fb_in1k", "cannot be downloaded from the Hugging Face hub"),
        ("runs/none.pth", "ckpt=runs/none.pth: no such file or run folder$"),
        ("dinosaur", "names of released weights are such as dino_xcit_small_12_p16"),
        ("https://example.com", "not the address of a file"),
    ],
)
def test_what_cannot_be_had(word, message, cache, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=message) as error:
        load_backbone(word)
    assert "\n" not in str(error.value)


def test_what_timm_has_downloaded_is_used_offline(monkeypatch, tmp_path):
    """In the hub's own cache, where large files are called by their SHA-256."""
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    torch.manual_seed(0)
    theirs = timm.create_model("xcit_nano_12_p16_224").eval()
    name = "xcit_nano_12_p16_224.fb_in1k"
    folder = tmp_path / f"models--timm--{name}"
    for part in ("refs", "blobs", "snapshots/abc"):
        (folder / part).mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    save_file(theirs.state_dict(), tmp_path / "w")
    digest = hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    blob = (tmp_path / "w").rename(folder / "blobs" / digest)
    path = folder / "snapshots/abc/model.safetensors"
    path.symlink_to(blob)
    ours = load_backbone(f"timm/{name}")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = ours(x)
        assert (theirs.forward_features(x)[:, 0] - features).abs().max() < 1e-5
        assert (theirs(x) - ours.head(features)).abs().max() < 1e-5
    assert str(folder_of(path)) == name  # results are not left in the cache
    with pytest.raises(UserError, match=f"has the SHA-256 {digest}, not"):
        load_backbone(f"timm/{name}#sha256={'0' * 64}")
    with blob.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(UserError, match="has changed since it was downloaded"):
        load_backbone(f"timm/{name}")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'ssl-xcit\[hub\]'"):
        load_backbone("timm/xcit_nano_12_p16_224.fb_in1k")
