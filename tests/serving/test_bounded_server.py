"""A server of metrics that no client can hold up: silent, slow, many, or hanging."""

import contextlib
import socket
import threading
import time
import urllib.request

import pytest

from engine.serving.watch import bounded_server
from engine.serving.watch.bounded_server import BoundedServer


def quiet_server(monkeypatch, *, seconds=60.0, application=None):
    def answer(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"well"]

    monkeypatch.setattr(bounded_server, "CONNECTION_SECONDS", seconds)
    server = BoundedServer("127.0.0.1", 0, application or answer)
    return server, lambda: ask(server.server_port)


def ask(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read()


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended_after(connection, since):
    """Seconds until the other side ends the connection."""
    connection.settimeout(20)
    with contextlib.suppress(ConnectionError):
        while connection.recv(1 << 16):
            pass
    return time.monotonic() - since


@pytest.mark.parametrize("sent", [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_that_sends_nothing_more_is_cut_off(monkeypatch, sent):
    server, scrape_it = quiet_server(monkeypatch, seconds=0.5)
    with server.running(), socket.create_connection(server.server_address[:2]) as connection:
        since = time.monotonic()
        connection.sendall(sent)
        assert scrape_it() == b"well"
        assert 0.4 < ended_after(connection, since) < 5
        assert scrape_it() == b"well"


def test_a_connection_that_sends_its_header_byte_by_byte_is_cut_off_too(monkeypatch):
    server, scrape_it = quiet_server(monkeypatch, seconds=0.5)
    with server.running(), socket.create_connection(server.server_address[:2]) as connection:
        since = time.monotonic()
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        with contextlib.suppress(OSError):  # broken, reset or shut down, as the system calls it
            while time.monotonic() - since < 10:
                connection.sendall(b"X")
                time.sleep(0.02)
        assert time.monotonic() - since < 5
        assert scrape_it() == b"well"


def test_a_connection_that_does_not_read_the_answer_is_cut_off(monkeypatch):
    def endless(environ, start_response):
        start_response("200 OK", [])
        return iter(lambda: b"x" * (1 << 16), None)

    server, _ = quiet_server(monkeypatch, seconds=0.5, application=endless)
    with server.running(), socket.create_connection(server.server_address[:2]) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        until(lambda: server._opened)
        until(lambda: not server._opened)


def test_however_many_connect_the_threads_are_bounded_and_a_scrape_is_answered(monkeypatch):
    server, scrape_it = quiet_server(monkeypatch)
    threads = threading.active_count()
    with server.running(), contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(server.server_address[:2]))
        assert scrape_it() == b"well"
        assert threading.active_count() <= threads + bounded_server.MOST_CONNECTIONS + 1
        assert scrape_it() == b"well"


def test_a_reader_that_hangs_does_not_make_more_threads_than_are_bounded(monkeypatch):
    go_on = threading.Event()

    def hanging(environ, start_response):
        go_on.wait(60)
        start_response("200 OK", [])
        return [b""]

    server, _ = quiet_server(monkeypatch, application=hanging)
    monkeypatch.setattr(bounded_server, "_SLOT_SECONDS", 0.01)
    threads = threading.active_count()
    with server.running(), contextlib.ExitStack() as stack:
        for _ in range(40):
            connection = stack.enter_context(socket.create_connection(server.server_address[:2]))
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        time.sleep(0.5)
        assert threading.active_count() <= threads + bounded_server.MOST_CONNECTIONS + 1
        go_on.set()


def test_the_end_is_prompt_with_open_connections_and_frees_the_port(monkeypatch):
    server, scrape_it = quiet_server(monkeypatch)
    threads = threading.active_count()
    with contextlib.ExitStack() as stack:
        with server.running():
            idle = [stack.enter_context(socket.create_connection(server.server_address[:2])) for _ in range(5)]
            assert scrape_it() == b"well"
            before = time.monotonic()
        assert time.monotonic() - before < 2
        assert all(ended_after(connection, before) < 5 for connection in idle)
    until(lambda: threading.active_count() <= threads)
    again = BoundedServer("127.0.0.1", server.server_port, server.get_app())
    with again.running():
        assert ask(again.server_port) == b"well"


def test_a_connection_whose_thread_cannot_start_keeps_no_slot(monkeypatch):
    server, scrape_it = quiet_server(monkeypatch)
    starts = []

    def refuse(self):
        starts.append(self)
        raise RuntimeError("can't start new thread")

    with server.running():
        with monkeypatch.context() as patched:
            for _ in range(bounded_server.MOST_CONNECTIONS + 5):
                patched.setattr(threading.Thread, "start", refuse)
                with socket.create_connection(server.server_address[:2]) as connection:
                    assert ended_after(connection, time.monotonic()) < 5
        assert scrape_it() == b"well"
    assert len(starts) == bounded_server.MOST_CONNECTIONS + 5
