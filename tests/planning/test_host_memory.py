import os
import subprocess
import sys

import pytest

from engine.errors import ConfigError
from engine.planning import host_memory
from engine.planning.host_memory import available_bytes, require_host_memory

MIB = 2**20


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of files, with 100 MiB available."""
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(host_memory, "_address_space", lambda: ())
    write(tmp_path / "proc" / "meminfo", f"MemTotal: 999999 kB\nMemAvailable:  {100 * 1024} kB\n")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(machine, path, limit, used, inactive=0, *, version=2):
    files = ("memory.max", "memory.current", "inactive_file") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    )  # fmt: skip
    folder = machine / "groups" / path
    write(folder / files[0], f"{limit}\n")
    write(folder / files[1], f"{used}\n")
    write(folder / "memory.stat", f"anon 5\n{files[2]} {inactive}\n")


def test_what_the_system_says_is_available_counts(machine):
    assert available_bytes() == 100 * MIB


@pytest.mark.parametrize(("version", "line", "root"), [(2, "0::/a/b", ""), (1, "4:cpu,memory:/a/b", "memory/")])
def test_the_least_that_a_control_group_above_has_left_counts(machine, version, line, root):
    write(machine / "proc" / "self" / "cgroup", f"7:pids:/x\n{line}\n")
    group(machine, f"{root}a", 60 * MIB, 50 * MIB, 20 * MIB, version=version)
    assert available_bytes() == 30 * MIB
    group(machine, f"{root}a/b", 40 * MIB, 35 * MIB, version=version)
    assert available_bytes() == 5 * MIB
    group(machine, f"{root}a/b", 40 * MIB, 45 * MIB, version=version)
    assert available_bytes() == 0


@pytest.mark.parametrize(("version", "limit", "line"), [(2, "max", "0::/a"), (1, 2**63 - 4096, "4:memory:/a")])
def test_a_control_group_without_a_limit_limits_nothing(machine, version, limit, line):
    write(machine / "proc" / "self" / "cgroup", f"{line}\n")
    group(machine, "a" if version == 2 else "memory/a", limit, 5, version=version)
    assert available_bytes() == 100 * MIB


def test_a_container_that_sees_its_own_group_as_the_root_is_limited_by_it(machine):
    write(machine / "proc" / "self" / "cgroup", "0::/outside/of/here\n")
    group(machine, "", 64 * MIB, 60 * MIB)
    assert available_bytes() == 4 * MIB


def test_a_system_that_says_only_what_is_built_in_counts_half_of_it(machine, monkeypatch):
    (machine / "proc" / "meminfo").unlink()
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 2})
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    assert available_bytes() == 500 * 4096
    monkeypatch.setattr(os, "sysconf_names", {})
    assert available_bytes() is None
    require_host_memory(2**70, "anything", "nobody knows")


def test_what_is_not_available_is_refused_with_both_numbers(machine):
    require_host_memory(100 * MIB, "a tier", "lower it")
    with pytest.raises(ConfigError, match=r"a tier takes 101\.00 MiB .* 100\.00 MiB are available; lower it"):
        require_host_memory(101 * MIB, "a tier", "lower it")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is Linux's here")
def test_a_limit_of_the_address_space_counts():
    code = (
        "import resource; from engine.planning.host_memory import available_bytes; "
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32)); print(available_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 <= int(done.stdout) < 2**32
