"""A Google Cloud Storage of our own: an emulator on loopback, which gcsfs, tensorstore and array_record all talk to over HTTP."""

import functools
import http.server
import json
import logging
import os
import threading
import time
import urllib.parse

import pytest

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # gcsfs asks no other service for the kind of bucket
pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install -e '.[gcs]'")
emulator = pytest.importorskip(
    "gcp_storage_emulator.server", reason="the emulator is not installed: pip install -e '.[dev]'"
)

NAME = "bucket"
FORBIDDEN = "forbidden"  # a bucket that answers 403


class _Handler(emulator.RequestHandler):
    timeout = 10  # one at a time is served: a client that was stopped must not hold up the others

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # a client that was killed, or has seen enough
            self.close_connection = True

    def _answer(self):
        self.server.requests.append(f"{self.command} {self.path}")
        # Who may use the files of a bucket often may not ask for the bucket itself.
        if f"/b/{FORBIDDEN}/" in self.path or self.path.partition("?")[0].endswith(f"/b/{NAME}"):
            self._refuse(403, "you@example.com does not have access to the Google Cloud Storage bucket.")
        elif time.monotonic() < self.server.down_until:
            self._refuse(503, "We encountered an internal error. Please try again.")
        else:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            self.storage.only_new = query.get("ifGenerationMatch") == ["0"]
            try:
                emulator.Router(self).handle(self.command)
            except FileExistsError:
                self.send_error(412)

    def _refuse(self, code, message):
        answer = json.dumps({"error": {"code": code, "message": message}}).encode()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(code)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def send_response(self, code, message=None):
        super().send_response(code, message)
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path.partition(f"/b/{NAME}/o/")[2])
        if self.command == "GET" and name in (files := self.storage.objects.get(NAME, {})):
            # As the real service does; tensorstore can only replace what it has read if it knows this.
            self.send_header("x-goog-generation", files[name]["generation"])

    def log_message(self, *args):
        pass


class _Storage(emulator.Storage):
    only_new = False  # what the emulator forgets: whether the request wants a file only where none is

    def create_file(self, bucket_name, file_name, *content):
        if self.only_new and file_name in self.objects.get(bucket_name, {}):
            raise FileExistsError(file_name)
        super().create_file(bucket_name, file_name, *content)

    def _write_config_to_file(self):  # the description of all files, for a later server, at every change
        pass


class Cloud:
    """The server, with one bucket.

    Attributes:
        environment: variables that make the libraries talk to it.
        requests: "METHOD PATH" of each request so far.
    """

    def __init__(self):
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
        self.storage = _Storage(use_memory_fs=True)
        emulator.buckets.create_bucket(NAME, self.storage)["softDeletePolicy"] = {"retentionDurationSeconds": 0}
        self._server = http.server.HTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self.storage))
        self.requests = self._server.requests = []
        self._server.down_until = 0.0
        address = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,  # array_record
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # tensorstore looks for no other credentials
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def fail_for(self, seconds):
        """Answers 503 to everything for a while."""
        self._server.down_until = time.monotonic() + seconds

    def names(self, folder=""):
        """Of all files in the bucket below a folder, sorted."""
        return sorted(name for name in self.storage.objects.get(NAME, {}) if name.startswith(folder))

    def read(self, name):
        """The bytes of a file."""
        return self.storage.get_file(NAME, name)

    def write(self, name, content):
        """Replaces or makes a file."""
        self.filesystem.pipe_file(f"{NAME}/{name}", content)

    def delete(self, name):
        """Removes a file."""
        self.filesystem.rm_file(f"{NAME}/{name}")

    @property
    def filesystem(self):
        """A client of its own, for this process."""
        import fsspec

        return fsspec.filesystem("gcs", use_listings_cache=False)

    def put(self, folder, name):
        """Copies a local folder into the bucket."""
        self.filesystem.put(f"{folder}/", f"{NAME}/{name}/", recursive=True)

    def get(self, name, folder):
        """Copies a folder of the bucket to a local one."""
        for file in self.names(f"{name}/"):
            path = folder / file.removeprefix(f"{name}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(file))
