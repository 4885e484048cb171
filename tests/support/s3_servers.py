"""S3 servers that the tests start themselves, on a free port of 127.0.0.1, or one that stands outside.

`ONCEFLOW_TEST_S3_ENDPOINT` names a server that is already there, with its keys in
`ONCEFLOW_TEST_S3_ACCESS_KEY` and `ONCEFLOW_TEST_S3_SECRET_KEY`. Without it, ministack serves: its conditional
writes are atomic. rclone ignores every condition and checks signatures, which ministack does not.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import botocore.config
import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

_READY_WITHIN = 30.0
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Server:
    """Where an S3 server listens, and the keys that it takes."""

    endpoint_url: str
    access_key: str = "test-access"
    secret_key: str = "test-secret"

    @property
    def environment(self) -> dict[str, str]:
        """What botocore's chain finds, and nothing of the machine's own configuration."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, stem: str = "onceflow") -> str:
        """A new, empty bucket. Blocks: for fixtures that are no coroutines."""
        bucket = f"{stem}-{os.getpid()}-{next(_numbers)}-{time.time_ns() % 10**9}"
        client = botocore.session.get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=botocore.config.Config(s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=5),
        )
        deadline = time.monotonic() + _READY_WITHIN
        while True:
            try:
                client.create_bucket(Bucket=bucket)
                client.close()
                return bucket
            except (BotoCoreError, ClientError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


@functools.cache
def s3_server() -> Server:
    """The server of this test run, started once and stopped at the interpreter's end."""
    if outside := os.environ.get("ONCEFLOW_TEST_S3_ENDPOINT"):
        return Server(
            outside, os.environ["ONCEFLOW_TEST_S3_ACCESS_KEY"], os.environ["ONCEFLOW_TEST_S3_SECRET_KEY"]
        )
    return own_server()


@functools.cache
def own_server() -> Server:
    """A server that never stands outside: for tests that change requests, which breaks their signatures."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(ministack())


@functools.cache
def s3_bucket() -> str:
    """A bucket on that server for the whole run: tests keep apart by prefixes."""
    return s3_server().make_bucket()


@functools.cache
def own_bucket() -> str:
    """A bucket on `own_server`."""
    return own_server().make_bucket()


def new_prefix() -> str:
    """A prefix that no other test has."""
    return f"test-{next(_numbers)}"


@contextlib.contextmanager
def ministack() -> Iterator[Server]:
    """An S3 server in memory whose conditional writes are atomic. It accepts any credentials."""
    port = _free_port()
    environment = os.environ | {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3"}
    with _running([_program("ministack")], port, environment):
        yield Server(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def rclone() -> Iterator[Server]:
    """An S3 server over a folder that ignores every condition. It checks signatures."""
    port, server = _free_port(), Server("")
    folder = tempfile.mkdtemp(prefix="onceflow-rclone-")
    keys = f"{server.access_key},{server.secret_key}"
    command = [_program("rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", keys, folder]
    try:
        with _running(command, port, os.environ | {"RCLONE_CONFIG": os.devnull}):
            yield Server(f"http://127.0.0.1:{port}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running(command: list[str], port: int, environment: dict[str, str]) -> Iterator[None]:
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + _READY_WITHIN
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(
                        f"{command[0]} did not start:\n{output.read().decode(errors='replace')}"
                    )
                time.sleep(0.02)
            yield
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed: install the 'dev' dependency group.")
    return found
