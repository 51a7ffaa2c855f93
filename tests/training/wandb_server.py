"""A server of one process that answers wandb as far as a run, its artifacts and an agent ask."""

import gzip
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class WandbServer:
    """What it was told, by run: `runs`, `history`, `summary`; `artifacts`; bytes of `files`."""

    def __init__(self):
        self.runs, self.history, self.summary, self.ended = {}, {}, {}, {}
        self.artifacts, self.files = {}, {}
        self.sweep, self.commands = {}, []  # for an agent

    def answer(self, operation, given):
        """The data of a GraphQL operation."""
        respond = getattr(self, operation, None)
        return respond(given) if respond else {}

    def Viewer(self, given):
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}",
                           "teams": {"edges": []}}}  # fmt: skip

    def RunResumeStatus(self, given):
        name = given["name"]
        run = self.runs.get(name)
        lines = self.history.get(name, [])
        bucket = run and {
            "id": f"id-{name}", "name": name, "displayName": run["displayName"], "config": "{}",
            "summaryMetrics": json.dumps(self.summary.get(name, {})), "logLineCount": 0,
            "historyLineCount": len(lines), "eventsLineCount": 0, "notes": None, "tags": [],
            "historyTail": json.dumps([json.dumps(lines[-1])] if lines else []),
            "eventsTail": "[]", "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"},
                          "bucket": bucket}}  # fmt: skip

    def UpsertBucket(self, given):
        name = given["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, {"displayName": name})
        run.update({k: v for k, v in given.items() if v is not None})
        project = {"id": "p", "name": run["project"], "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": f"id-{name}", "name": name, "displayName": run["displayName"], "config": "{}",
            "description": "", "sweepName": run.get("sweep"), "project": project,
            "historyLineCount": len(self.history.get(name, [])),
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def CreateRunFiles(self, given):
        files = [{"name": n, "uploadUrl": self.upload(f"{given['run']}/{n}")}
                 for n in given["files"]]  # fmt: skip
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def ArtifactType(self, given):
        return {"project": {"artifact": None}}

    def CreateArtifact(self, given):
        about = given["input"]
        key = about.get("artifactCollectionName") or about["artifactCollectionNames"][0]
        self.artifacts[key] = {"type": about["artifactTypeName"], "run": about["runName"],
                               "aliases": [a["alias"] for a in about["aliases"]],
                               "committed": False}  # fmt: skip
        artifact = {"id": key, "state": "PENDING",
                    "artifactSequence": {"id": "s", "latestArtifact": None}}  # fmt: skip
        return {"createArtifact": {"artifact": artifact}}

    def CreateArtifactManifest(self, given):
        file = {"id": "f", "name": given["name"], "displayName": given["name"],
                "uploadUrl": self.upload(f"manifest/{given['artifactID']}"),
                "uploadHeaders": []}  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def CreateArtifactFiles(self, given):
        nodes = [
            {"id": "f", "name": f["name"], "displayName": f["name"], "storagePath": f["name"],
             "uploadUrl": self.upload(f"{f['artifactID']}/{f['name']}"), "uploadHeaders": [],
             "uploadMultipartUrls": None, "artifact": {"id": f["artifactID"]}}
            for f in given["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": n} for n in nodes]}}}

    def CommitArtifact(self, given):
        self.artifacts[given["artifactID"]]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}

    def SweepWithRuns(self, given):
        sweep = {"id": "w", "name": given["sweep"], "config": json.dumps(self.sweep),
                 "state": "RUNNING", "runs": {"edges": []}}  # fmt: skip
        return {"project": {"sweep": sweep}}

    def CreateAgent(self, given):
        return {"createAgent": {"agent": {"id": "a"}}}

    def Heartbeat(self, given):
        commands = []
        if not json.loads(given["runState"]):  # one after another
            commands = [self.commands.pop(0) if self.commands else {"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}

    def stream(self, run, told):
        """Lines of a run's history, its summary, and its exit code."""
        files = told.get("files", {})
        if "wandb-history.jsonl" in files:
            lines = self.history.setdefault(run, [])
            part = files["wandb-history.jsonl"]
            lines[part["offset"] :] = map(json.loads, part["content"])
        if "wandb-summary.json" in files:
            self.summary[run] = json.loads(files["wandb-summary.json"]["content"][-1])
        if told.get("complete"):
            self.ended[run] = told["exitcode"]

    def upload(self, name):
        return f"{self.address}/upload/{name}"


@contextmanager
def wandb_server():
    """Serve at `address` until the end of the block."""
    server = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def body(self):
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            packed = self.headers.get("Content-Encoding") == "gzip"
            return gzip.decompress(content) if packed else content

        def reply(self, content):
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            self.reply({})

        def do_PUT(self):
            server.files[self.path.removeprefix("/upload/")] = self.body()
            self.reply({})

        def do_POST(self):
            content = self.body()
            if self.path == "/graphql":
                query = json.loads(content)
                operation = re.search(r"(?:query|mutation) (\w+)", query["query"])[1]
                self.reply({"data": server.answer(operation, query.get("variables") or {})})
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(content))
                self.reply({"limits": {}})
            else:
                self.reply({})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.address = f"http://127.0.0.1:{http.server_port}"
    Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
