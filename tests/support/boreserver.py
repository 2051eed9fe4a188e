"""A bore server: SSH without authentication, with one forwarded port per client.

A program for Debian's Python, with Paramiko: `boreserver.py SECRET_FILE`. It prints its port, then a line
`NAME PORT` for each tunnel; NAME is `fixed` for a client with the secret.
"""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import paramiko


class Client(paramiko.ServerInterface):
    """One client with one tunnel."""

    def __init__(self, connection: socket.socket, key: paramiko.PKey, secret: str) -> None:
        self._secret = secret
        self._name = "random"
        self._transport = paramiko.Transport(connection)
        self._transport.add_server_key(key)
        self._has_session = threading.Event()
        self._transport.start_server(server=self)
        self._session = self._transport.accept(30)
        self._has_session.set()

    def check_auth_none(self, username: str) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_global_request(self, kind: str, msg: paramiko.Message) -> bool:
        if kind != "set-id" or msg.get_text() != self._secret:
            return False
        self._name = "fixed"
        return True

    def check_port_forward_request(self, address: str, port: int) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(listener, port), daemon=True).start()
        print(self._name, port, flush=True)
        return port

    def _serve(self, listener: socket.socket, port: int) -> None:
        self._has_session.wait()
        if self._session is not None:
            self._session.sendall(f"URL: http://{self._name}.bore.example\x1b[31m\n".encode())
        while True:
            visitor, origin = listener.accept()
            try:
                channel = self._transport.open_forwarded_tcpip_channel(origin, ("0.0.0.0", port))  # noqa: S104
            except paramiko.SSHException:  # the client is not ready yet
                visitor.close()
                continue
            for source, target in ((visitor, channel), (channel, visitor)):
                threading.Thread(target=copy, args=(source, target), daemon=True).start()


def copy(
    source: socket.socket | paramiko.Channel, target: socket.socket | paramiko.Channel
) -> None:
    """Copy until the source ends, then end the target's input."""
    while data := source.recv(65_536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def main() -> None:
    key = paramiko.RSAKey.generate(2048)
    secret = Path(sys.argv[1]).read_text()
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=Client, args=(connection, key, secret), daemon=True).start()


if __name__ == "__main__":
    main()
