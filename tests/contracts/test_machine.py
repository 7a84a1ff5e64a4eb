"""What this process may still use: the least of free memory, control groups' limits and the limit of addresses."""

import resource
from pathlib import Path

import psutil
import pytest
import torch

from trackstar.indexing.machine import MemoryPeak, available_device_memory, available_memory, free_disk, resident_memory

MIB = 2**20


@pytest.fixture(autouse=True)
def _much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 GiB of free memory, and no limit of addresses."""

    class Memory:
        available = 64 * 2**30

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


def test_the_machines_free_memory_is_the_limit_where_there_is_no_other(tmp_path: Path):
    room = available_memory(tmp_path)
    assert (room.amount, room.limit) == (64 * 2**30, "this machine's free memory")


def test_control_groups_of_version_2_count_at_every_level(tmp_path: Path):
    group = "sys/fs/cgroup/jobs/one"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/jobs/one",
            f"{group}/memory.max": "max",
            f"{group}/memory.current": str(100 * MIB),
            "sys/fs/cgroup/jobs/memory.max": str(900 * MIB),
            "sys/fs/cgroup/jobs/memory.current": str(500 * MIB),
            "sys/fs/cgroup/jobs/memory.stat": f"anon {10 * MIB}\ninactive_file {50 * MIB}",
        },
    )
    room = available_memory(tmp_path)
    assert room.amount == 450 * MIB
    assert room.limit == "the memory limit of the control group /jobs"
    write(tmp_path, {f"{group}/memory.max": str(300 * MIB)})
    assert available_memory(tmp_path).amount == 200 * MIB


def test_a_containers_own_group_counts_where_its_path_is_the_hosts(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/host/only",
            "sys/fs/cgroup/memory.max": str(800 * MIB),
            "sys/fs/cgroup/memory.current": str(300 * MIB),
        },
    )
    assert available_memory(tmp_path).amount == 500 * MIB


def test_control_groups_of_version_1_count(tmp_path: Path):
    group = "sys/fs/cgroup/memory/job"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/other\n4:memory:/job",
            f"{group}/memory.limit_in_bytes": str(700 * MIB),
            f"{group}/memory.usage_in_bytes": str(600 * MIB),
            f"{group}/memory.stat": f"total_inactive_file {25 * MIB}\nrss 7",
        },
    )
    assert available_memory(tmp_path).amount == 125 * MIB


def test_the_limit_of_addresses_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (used + 2**30, resource.RLIM_INFINITY))
    room = available_memory(tmp_path)
    assert room.limit == "this process's limit of addresses (ulimit -v)"
    assert abs(room.amount - 2**30) < 256 * MIB


def test_what_is_used_beyond_a_limit_leaves_nothing(tmp_path: Path):
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": str(100 * MIB),
            "sys/fs/cgroup/memory.current": str(101 * MIB),
        },
    )
    assert available_memory(tmp_path).amount == 0


def test_the_free_disk_of_a_missing_folder_is_that_of_its_file_system(tmp_path: Path):
    here, missing = free_disk(tmp_path), free_disk(tmp_path / "not" / "there")
    assert here is not None
    assert missing is not None
    assert abs(here - missing) < 64 * MIB


def test_the_peak_is_that_inside_its_context():
    with MemoryPeak() as peak:
        held = torch.ones(64 * MIB // 4)
        del held
    assert peak.most - peak.before > 48 * MIB
    assert peak.most >= resident_memory() - 64 * MIB


def test_only_cuda_devices_have_memory_of_their_own():
    assert available_device_memory(torch.device("cpu")) is None
