"""The client of bore tunnels: makes a port of the step reachable at a public server.

It runs with the Python of the provider's machine, so it is one file for Python 3.7 and newer, with
Paramiko only. The protocol is SSH without authentication: optionally a global request `set-id` with
the secret, a session in which the server writes the URLs, and the forwarding of a port that the server
chooses. Standard input has the lines host, port, port of the step, and secret or nothing.
"""

import logging
import select
import socket
import sys
import threading
import time

import paramiko

TIMEOUT = 30  # seconds
KEEPALIVE = 30  # seconds; servers end connections that are silent for two minutes
PAUSE = 10  # seconds before a lost tunnel is opened again
SIZE = 65_536


def main() -> None:
    """Keep the tunnel open until this process is ended."""
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    host, port, target, secret = (sys.stdin.read().split("\n") + [""] * 4)[:4]
    while True:
        try:
            keep_open(host, int(port), int(target), secret)
            reason = "the server closed the connection"
        except (paramiko.SSHException, OSError, EOFError) as error:
            reason = str(error) or type(error).__name__
        report(f"Tunnel to {host}:{port}: {reason}; next attempt in {PAUSE} s")
        time.sleep(PAUSE)


def report(text: str) -> None:
    """Print a line without control characters: part of it comes from the server."""
    print("".join(c if c.isprintable() else " " for c in text), flush=True)


def keep_open(host: str, port: int, target: int, secret: str) -> None:
    """Open the tunnel, and return when it is lost."""
    connection = socket.create_connection((host, port), TIMEOUT)
    transport = paramiko.Transport(connection)
    try:
        transport.start_client(timeout=TIMEOUT)
        transport.auth_none("job")
        transport.set_keepalive(KEEPALIVE)
        if secret and transport.global_request("set-id", [secret]) is None:
            raise paramiko.SSHException("the server rejected the secret")
        session = transport.open_session(timeout=TIMEOUT)
        threading.Thread(target=print_lines, args=(session,), daemon=True).start()

        def accept(channel: paramiko.Channel, *_: object) -> None:
            threading.Thread(target=forward, args=(channel, target), daemon=True).start()

        public = transport.request_port_forward("0.0.0.0", 0, accept)  # noqa: S104
        report(f"Tunnel: tcp://{host}:{public} leads to port {target} of this step")
        while transport.is_active():
            time.sleep(1)
    finally:
        transport.close()


def print_lines(session: paramiko.Channel) -> None:
    """Print what the server writes: the URLs of the tunnel."""
    with session.makefile("r") as lines:
        for line in lines:
            if line.strip():
                report(line.rstrip())


def forward(channel: paramiko.Channel, target: int) -> None:
    """Connect one visitor with the port of the step."""
    try:
        local = socket.create_connection(("localhost", target), TIMEOUT)
    except OSError as error:
        report(f"Tunnel: no connection to port {target}: {error}")
        channel.close()
        return
    with channel, local:
        local.settimeout(None)
        sides = {channel: local, local: channel}
        while sides:
            for side in select.select(list(sides), [], [])[0]:
                data = side.recv(SIZE)
                if data:
                    (local if side is channel else channel).sendall(data)
                    continue
                del sides[side]
                if side is channel:
                    local.shutdown(socket.SHUT_WR)
                else:
                    channel.shutdown_write()


if __name__ == "__main__":
    main()
