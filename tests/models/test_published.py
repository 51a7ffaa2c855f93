"""Weights by name: a server on this machine that breaks off, changes its mind or lies."""

import hashlib
import http.server
import multiprocessing
import os
import re
import signal
import subprocess
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
    body, etag, breaks, ranges = BODY, '"one"', [], True
    status, slow, length, shifted = 200, 0.0, None, 0

    def handle_error(self, *_):
        """Who hangs up is expected."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        start = 0
        start_at = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        server.requests.append((self.path, start_at and int(start_at[1])))
        if server.status != 200:
            return self.send_error(server.status)
        if start_at and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(start_at[1])
            if start >= len(server.body):
                return self.send_error(416)
            self.send_response(206)
            last = len(server.body) - 1
            start += server.shifted
            self.send_header("Content-Range", f"bytes {start}-{last}/{last + 1}")
        else:
            self.send_response(200)
        content = server.body[start:]
        self.send_header("Content-Length", str(server.length or len(content)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if server.breaks:
            content = content[: server.breaks.pop(0)]
        for at in range(0, len(content), 100_000):
            self.wfile.write(content[at : at + 100_000])
            time.sleep(server.slow)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.01)
    made = Server(("127.0.0.1", 0), Handler)
    made.requests = []
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    made.address = f"http://127.0.0.1:{made.server_port}/w.pth"
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_once_and_then_from_the_disk(server, tmp_path):
    path = fetch(server.address, tmp_path / "w.pth", SHA256)
    assert path.read_bytes() == BODY
    assert (tmp_path / "w.pth.sha256").read_text() == f"{SHA256}  w.pth\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pth", "w.pth.sha256"]
    fetch(server.address, path)
    assert len(server.requests) == 1


def test_what_breaks_off_goes_on_where_it_was(server, tmp_path):
    server.breaks = [700_000, 1_000_000, 0, 400_000]
    path = fetch(server.address, tmp_path / "w.pth")
    assert path.read_bytes() == BODY
    assert [at for _, at in server.requests] == [None, 700_000, 1_700_000, 1_700_000, 2_100_000]


@pytest.mark.parametrize("fault", ["no ranges", "no etag", "another file"])
def test_what_cannot_go_on_starts_again(server, tmp_path, fault):
    part = tmp_path / ".w.pth.download"
    part.write_bytes(b"x" * 900_000)
    etag = {"no etag": None}.get(fault, '"one"')
    (tmp_path / ".w.pth.download.json").write_text(f'{{"etag": "{etag}", "total": 3000000}}')
    server.ranges = fault != "no ranges"
    server.etag = {"no etag": None, "another file": '"two"'}.get(fault, '"one"')
    assert fetch(server.address, tmp_path / "w.pth").read_bytes() == BODY


def test_more_than_there_is(server, tmp_path):
    (tmp_path / ".w.pth.download").write_bytes(b"x" * 4_000_000)
    (tmp_path / ".w.pth.download.json").write_text('{"etag": "\\"one\\"", "total": 5000000}')
    assert fetch(server.address, tmp_path / "w.pth").read_bytes() == BODY
    assert [at for _, at in server.requests] == [4_000_000, None]


KILLED = """
import sys
from pathlib import Path
from ssl_xcit.models.download import fetch
fetch(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_killed_process_leaves_what_the_next_goes_on_from(server, tmp_path):
    server.slow = 0.05
    process = subprocess.Popen([sys.executable, "-c", KILLED, server.address, tmp_path / "w.pth"])
    part = tmp_path / ".w.pth.download"
    limit = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 300_000):
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    server.slow = 0.0
    there = part.stat().st_size
    assert not (tmp_path / "w.pth").exists()
    assert fetch(server.address, tmp_path / "w.pth").read_bytes() == BODY
    assert server.requests[-1][1] == there > 0


def test_two_processes_download_once(server, tmp_path):
    server.slow = 0.02
    context = multiprocessing.get_context("fork")
    other = context.Process(target=fetch, args=(server.address, tmp_path / "w.pth"))
    other.start()
    fetch(server.address, tmp_path / "w.pth")
    other.join(60)
    assert other.exitcode == 0
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 404}, r"404 Not Found\): copy the file by other means to"),
        ({"status": 503}, r"503"),
        ({"etag": f'"{"0" * 32}"'}, "not the server's 0000"),
        ({"length": 4_000_000}, "cannot be downloaded"),
    ],
)
def test_a_server_that_errs(server, tmp_path, change, message):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=message):
        fetch(server.address, tmp_path / "w.pth")
    assert not (tmp_path / "w.pth").exists()
    if "etag" in change:
        assert not list(tmp_path.glob(".w.pth.download*"))


def test_a_part_from_elsewhere_is_not_joined(server, tmp_path):
    server.breaks, server.shifted = [700_000], 100
    assert fetch(server.address, tmp_path / "w.pth").read_bytes() == BODY
    assert [at for _, at in server.requests] == [None, 700_000, None]


def test_a_page_that_asks_to_log_in_is_no_weights(server, tmp_path):
    server.body = b"\n<!DOCTYPE html><html>Welcome to the hotel"
    with pytest.raises(UserError, match="the text of a web page; it was removed"):
        fetch(server.address, tmp_path / "w.pth")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full(server, tmp_path):
    (tmp_path / ".w.pth.download").symlink_to("/dev/full")
    with pytest.raises(RunFailed, match=r"No space left on device.*make room"):
        fetch(server.address, tmp_path / "w.pth")


def test_an_md5_that_is_right(server, tmp_path):
    server.etag = f'"{hashlib.md5(BODY).hexdigest()}"'
    assert fetch(server.address, tmp_path / "w.pth").read_bytes() == BODY


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
    loaded = load_backbone(f"xcit_nano_12_p16_224#sha256={digest}")
    assert torch.equal(loaded.cls_token, model.cls_token)
    assert server.requests[0][0] == "/xcit_nano_12_p16_224.pth"
    path = cache / "weights/xcit_nano_12_p16_224.pth"
    assert folder_of(path) == folder_of(path.parent / "timm/xcit_nano_12_p16_224/model.safetensors")
    loaded = load_backbone(f"{base}/mine.pth")
    assert torch.equal(loaded.cls_token, model.cls_token)
    # the name of the first, at another address: nothing is mistaken for the other
    other = {**model.state_dict(), "cls_token": model.cls_token + 1}
    torch.save({"model": other}, tmp_path / "other.pth")
    server.body, server.etag = (tmp_path / "other.pth").read_bytes(), '"other"'
    loaded = load_backbone(f"{base}/elsewhere/mine.pth")
    assert torch.equal(loaded.cls_token, model.cls_token + 1)
    loaded = load_backbone(f"{base}/elsewhere/xcit_nano_12_p16_224.pth")
    assert torch.equal(loaded.cls_token, model.cls_token + 1)
    loaded = load_backbone("xcit_nano_12_p16_224")
    assert torch.equal(loaded.cls_token, model.cls_token)
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
        (
            "dino_xcit_small_12_p16",
            r"pretrain\.pth cannot be downloaded .* copy .*ckpt=FILE",
        ),
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
