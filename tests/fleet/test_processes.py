"""What the fleet does with processes: a guard after a killed driver, and who uses a folder."""

import os
import subprocess
import sys
import time

import psutil

from dbtrain.fleet.processes import born, holders


def test_a_guard_kills_what_outlives_its_driver(tmp_path):
    """A driver that starts a process which ignores everything, has it watched, and is killed."""
    (tmp_path / "scratch").mkdir()
    code = (
        "import subprocess, sys, time; from pathlib import Path; from dbtrain.fleet.processes import *\n"
        "guard = start_guard(Path(sys.argv[1]))\n"
        "log = open(sys.argv[1] + '/log', 'w')\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=log)\n"
        "print(child.pid, guard.pid, flush=True); time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "scratch")]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child, guard = map(int, driver.stdout.readline().split())
    starts = {pid: born(pid) for pid in (child, guard)}
    assert {below.pid for below in psutil.Process(driver.pid).children(recursive=True)} == {child, guard}
    driver.kill()
    driver.wait()
    end = time.monotonic() + 5
    while time.monotonic() < end and any(born(pid) == start for pid, start in starts.items()):
        time.sleep(0.02)
    assert all(
        born(pid) != start or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid, start in starts.items()
    )
    assert not (tmp_path / "scratch").exists()


def test_only_users_of_a_folder_are_its_holders(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "ab").mkdir()
    with open(tmp_path / "ab" / "file", "w"):
        assert holders(tmp_path / "a") == []
        assert os.getpid() in holders(tmp_path / "ab")
