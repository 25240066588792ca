"""Where the processes of one machine listen for one another: on the loopback that they name, and nowhere else."""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine.distributed import launch
from engine.distributed.processes import COORDINATOR, COUNT, INDEX, join_from
from engine.errors import ConfigError

LISTENING = """
import json, os
from engine.distributed.processes import join_from
join_from(os.environ)
links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
inodes = {os.readlink(link) for link in links if os.path.lexists(link)}
found = []
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/self/net/{table}").read().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
            found.append(words[1])
print(json.dumps(found))
"""
LOOPBACKS = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def free_port(family, host):
    with socket.socket(family) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            pytest.skip(f"no {host} on this machine: {error}")
        return probe.getsockname()[1]


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads the kernel's table of sockets")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_coordinator_listens_on_the_loopback_that_it_names_and_nowhere_else(host):
    port = free_port(*((socket.AF_INET6, "::1") if "[" in host else (socket.AF_INET, "127.0.0.1")))
    environment = {COORDINATOR: f"{host}:{port}", COUNT: "1", INDEX: "0", "JAX_PLATFORMS": "cpu"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LISTENING]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    addresses = [word.split(":") for word in json.loads(done.stdout.splitlines()[-1])]
    assert f"{port:04X}" in [at for _, at in addresses]
    assert {address for address, _ in addresses} <= LOOPBACKS


def test_launch_names_a_loopback_address_and_no_name(monkeypatch):
    started = []

    class Child:
        pid = 1

        def __init__(self, command, env, **_):
            started.append(env[COORDINATOR])

        def poll(self):
            return 0

        def wait(self, *_):
            return 0

    monkeypatch.setattr(launch.subprocess, "Popen", Child)
    assert launch.run(argparse.Namespace(words=["--", "generate"], processes=2, virtual_devices=None)) == 0
    host, port = started[0].split(":")
    assert started == [f"127.0.0.1:{port}"] * 2
    assert host == "127.0.0.1"
    assert 0 < int(port) < 1 << 16


@pytest.mark.parametrize(
    ("address", "count", "index"),
    [("localhost", "2", "0"), (":7", "2", "0"), ("host:", "2", "0"), ("host:7", "2", "2"), ("host:7", "2", "-1")],
)
def test_an_address_or_an_index_that_cannot_be_is_refused_before_anything_is_joined(address, count, index):
    with pytest.raises(ConfigError, match=COORDINATOR):
        join_from({COORDINATOR: address, COUNT: count, INDEX: index})
