"""Cores and counters as a container or a job has them, by made-up files of the kernel."""

import os

import pytest

from dbtrain import machine
from dbtrain.data import prefetch
from dbtrain.fleet.options import Options
from dbtrain.report import building


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Writes a file of a cgroup; this process is in /job/step."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("4:memory:/elsewhere\n0::/job/step\n")

    def write(group, name, text):
        (tmp_path / "cgroup" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / group / name).write_text(text)

    return write


@pytest.mark.parametrize("own, above, cores", [
    ("max 100000\n", "max 100000\n", 64), ("250000 100000\n", "max 100000\n", 3),
    ("max 100000\n", "200000 100000\n", 2), ("400000 100000\n", "1000 100000\n", 1),
    (None, None, 64), ("9900000 100000\n", None, 64),
])  # fmt: skip
def test_a_cgroup_caps_the_cores_wherever_they_are_counted(cgroups, monkeypatch, own, above, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for group, text in (("job/step", own), ("job", above)):
        if text is not None:
            cgroups(group, "cpu.max", text)
    assert (machine.cores(), Options().local_cpus) == (cores, cores)


def test_cores_that_others_were_given_do_not_count(cgroups, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 9, 11})
    assert machine.cores() == Options().local_cpus == 3
    assert Options(gang=2).local_cpus == 2 and Options(workers=5).local_cpus == 5
    assert prefetch.cores is building.cores is machine.cores, "threads of loading and processes of the report"


def test_kills_for_memory_are_those_of_the_own_cgroup(cgroups, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "VMSTAT", tmp_path / "vmstat")
    assert machine.oom_kills() == 0
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 12\n")
    assert machine.oom_kills() == 12, "no cgroup counts them"
    cgroups("job", "memory.events", "low 0\noom 9\noom_kill 7\noom_group_kill 0\n")
    assert machine.oom_kills() == 7, "the nearest cgroup above does"
    cgroups("job/step", "memory.events", "low 0\noom 4\noom_kill 3\noom_group_kill 0\n")
    assert machine.oom_kills() == 3


def test_without_cgroups_of_version_2_there_is_no_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "none")
    assert list(machine.cgroup_files("cpu.max")) == []
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "old")
    (tmp_path / "old").write_text("4:memory:/elsewhere\n")
    assert list(machine.cgroup_files("cpu.max")) == []
