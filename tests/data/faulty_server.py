"""An HTTP server on this machine that is slow, cuts connections and answers 503, by a seed."""

import contextlib
import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer(ThreadingHTTPServer):
    """Serves the files of a folder; `with` it, its address is `url`.

    Args:
        folder: of the files.
        faults: share of the requests that end in each of these: `busy` (503), `cut` (the connection
            ends in the body), `slow` (a pause before the second half of it).
        statuses: by the end of a path, the status that is always answered.
        ranges: whether it knows Range.
    """

    daemon_threads = True

    def __init__(self, folder, faults=None, statuses=None, ranges=True, bytes_per_second=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.statuses = folder, faults or {}, statuses or {}
        self.ranges, self.bytes_per_second = ranges, bytes_per_second
        self.random, self.lock = random.Random(0), threading.Lock()
        self.done = Counter()  # how often what was answered
        self.counted = Counter()  # see `sent`
        self.answering = 0  # requests
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Say nothing: clients are killed on purpose."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    @property
    def sent(self):
        """Bytes by file; waits for requests whose client was killed or has all it wants."""
        deadline = time.monotonic() + 30
        while self.answering:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.counted

    def fault(self):
        """The fault of this request, or an empty string."""
        with self.lock:
            drawn = self.random.random()
            for name, share in self.faults.items():
                if drawn < share:
                    self.done[name] += 1
                    return name
                drawn -= share
            self.done["good"] += 1
            return ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *args):
        """Say nothing."""

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        with self.server.lock:
            self.server.answering += 1
        try:
            self.answer(body)
        finally:
            with self.server.lock:
                self.server.answering -= 1

    def answer(self, body):
        server, path = self.server, self.path.partition("?")[0]
        fault = server.fault()
        status = next((s for end, s in server.statuses.items() if path.endswith(end)), None)
        file = server.folder / path.lstrip("/")
        if fault == "busy":
            status = 503
        elif status is None and not file.is_file():
            status = 404
        if status is not None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.send_header("Retry-After", "0.01")
            self.end_headers()
            return
        content = file.read_bytes()
        total = len(content)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and server.ranges:
            first, last = int(match[1]), min(int(match[2]), total - 1)
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        half = len(content) // 2
        with contextlib.suppress(OSError):
            if server.bytes_per_second:
                for start in range(0, len(content), 4096):
                    self.wfile.write(content[start : start + 4096])
                    time.sleep(4096 / server.bytes_per_second)
            else:
                self.wfile.write(content[:half])
                if fault == "slow":
                    time.sleep(0.05)
                if fault == "cut":
                    self.close_connection = True
                    return
                self.wfile.write(content[half:])
            with server.lock:
                server.counted[path.lstrip("/")] += len(content)
