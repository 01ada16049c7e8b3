"""Everything that needs a GPU, in eight minutes on one: correctness first, then times.

    python benchmarks/gpu.py [--out gpu-results] [--seconds 480]
    python benchmarks/gpu.py --wheels FOLDER --prepare --python 3.12     where there is a network
    python benchmarks/gpu.py --wheels FOLDER                             where there is a GPU and no network

One clock runs for all parts; each part is stopped when its own time or all time is used up. What a part says is shown
and written line by line, so one that is stopped leaves what it measured. The exit code is that of the tests: 0 if all
passed, 1 if some failed or were cut short, 3 where there is no CUDA device. Ray and DeepSpeed are not needed: what
they do is left out where they are missing.
"""

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 480
LEAST_S = 10
"""Seconds below which a part is not begun."""
WHEELS = (
    "annotated-types", "braceexpand", "diffusers", "importlib_metadata", "pydantic", "pydantic_core",
    "typing-inspection", "webdataset", "zipp",
)  # fmt: skip
"""What dbtrain needs beside a machine's PyTorch, Triton, transformers, typer and pytest. Other wheels in the folder,
such as xformers, or DeepSpeed built by `pip wheel --no-deps deepspeed hjson`, are installed too."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64")
VERSIONS = (
    "import sys, torch, triton, diffusers, transformers; print('python', sys.version.split()[0]); "
    "print('torch', torch.__version__, torch.version.cuda); "
    "[print(m.__name__, m.__version__) for m in (triton, diffusers, transformers)]; "
    "there = torch.cuda.is_available(); print(torch.cuda.get_device_name() if there else 'no CUDA device'); "
    "sys.exit(0 if there else 3)"
)
SD15 = ("--config", "sd15_lora", "--random-weights", "train.precision=bf16", "train.batch=1", "lora.rank=16")
SDXL = ("--config", "sdxl_lora", "--random-weights", "train.precision=bf16", "train.batch=1", "lora.rank=16",
        "train.gradient_checkpointing=false")  # fmt: skip


class Part(NamedTuple):
    """A part of the check. words: arguments of Python. tests: whether its exit code is that of tests."""

    name: str
    limit_s: int
    words: tuple[str, ...]
    tests: bool = False


def tested(name: str, limit_s: int, workers: int, *paths: str) -> Part:
    """A part that runs tests marked `gpu`, by several workers that share the device: kernels compile on the CPU."""
    spread = ("-n", str(workers), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    return Part(name, limit_s, ("-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", *spread, *paths), True)


def measured(name: str, limit_s: int, *words: str) -> Part:
    """A part that runs `dbtrain bench`."""
    return Part(name, limit_s, ("-m", "dbtrain", "bench", *words, "--json"))


def parts() -> list[Part]:
    """All parts, in their order."""
    return [
        tested("tests-kernels", 150, 6, "tests/kernels", "tests/contracts/test_op.py"),
        tested("tests-steps", 90, 4, "tests/engines/test_capture.py", "tests/models", "tests/packing", "tests/bench"),
        measured("step-sd15", 80, "step", *SD15, "--sizes", "1,8", "--capture", "off,graph", "--turns", "2"),
        measured("step-sd15-32", 60, "step", *SD15, "--sizes", "32", "--capture", "graph", "--attention", "auto",
                 "--turns", "1"),
        measured("step-sdxl", 60, "step", *SDXL, "--sizes", "2", "--capture", "off,graph", "--turns", "1"),
        measured("ops", 55, "ops"),
        measured("step-unfused", 50, "step", *SD15, "--sizes", "8", "--capture", "graph", "--turns", "1",
                 "engine.fused_projections=off", "engine.fused_pointwise=off"),
        measured("step-channels-first", 40, "step", *SD15, "--sizes", "8", "--capture", "graph", "--turns", "1",
                 "engine.channels_last=false"),
        measured("step-compiled", 80, "step", *SD15, "--sizes", "8", "--capture", "compiled_graph", "--turns", "1",
                 "engine.fused_pointwise=off"),
        measured("step-channels-last", 80, "step", *SD15, "--sizes", "8", "--capture", "compiled_graph", "--turns", "1",
                 "engine.fused_pointwise=off", "engine.channels_last=true"),
    ]  # fmt: skip


class Clock:
    """Seconds that are left of those for all parts."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds until the end; negative after it."""
        return self.end - time.monotonic()


def run(part: Part, clock: Clock, out: Path, environment: dict[str, str]) -> int | None:
    """The exit code of a part; None where it was stopped or not begun for want of time.

    Standard output goes to NAME.out; what is said besides is shown, and written to NAME.txt line by line.
    """
    limit_s = min(part.limit_s, clock.left_s())
    if limit_s < LEAST_S:
        print(f"== {part.name}: not begun, out of time", flush=True)
        return None
    print(f"== {part.name}: at most {limit_s:.0f} s", flush=True)
    begun = time.monotonic()
    command = [sys.executable, *part.words]
    with (out / f"{part.name}.out").open("w") as result, (out / f"{part.name}.txt").open("w") as log:
        aside = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if part.tests else {"stdout": result}
        started = {"cwd": ROOT, "env": environment, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, **{"stderr": subprocess.PIPE, **aside}, **started)
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            with suppress(ProcessLookupError):  # it ended just now
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            for line in process.stdout if part.tests else process.stderr:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
            code = process.wait()
        finally:
            timer.cancel()
    end = "out of time" if stopped.is_set() else f"ended with {code}"
    print(f"== {part.name}: {end} after {time.monotonic() - begun:.0f} s", flush=True)
    return None if stopped.is_set() else code


def pinned(names: Iterable[str]) -> list[str]:
    """`name==version` of packages, as constraints.txt has them."""
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M))
    versions = {name.lower().replace("_", "-"): version for name, version in versions.items()}
    return [f"{name}=={versions[name.lower().replace('_', '-')]}" for name in names]


def prepare(folder: Path, python: str) -> int:
    """Fetch the wheels for a machine with Linux on x86-64 and this Python; pip's exit code."""
    place = ["--only-binary=:all:", "--no-deps", "--python-version", python, "-d", str(folder)]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", *place, *platforms]
    return subprocess.run([*command, *pinned(WHEELS)], check=False).returncode


def unpack(folder: Path, target: Path) -> None:
    """Install the wheels of a folder into another one, without a network and without what they depend on."""
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    if not wheels:
        sys.exit(f"{folder} holds no wheels; make them with --prepare where there is a network")
    quiet = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    subprocess.run([*quiet, "--no-index", "--no-deps", "--upgrade", "--target", str(target), *wheels], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for results and logs")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="seconds for everything together")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, for a machine without a network")
    parser.add_argument("--prepare", action="store_true", help="only fetch the wheels into that folder")
    parser.add_argument("--python", default="3.12", help="the Python that the fetched wheels are for")
    arguments = parser.parse_args()
    if arguments.prepare:
        return prepare(arguments.wheels or parser.error("--prepare needs --wheels"), arguments.python)
    clock, out = Clock(arguments.seconds), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [ROOT, ROOT / "kernels", ROOT / "launchers"]
    if arguments.wheels:
        unpack(arguments.wheels, out / "packages")
        paths.append(out / "packages")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return check(clock, out, environment)


def check(clock: Clock, out: Path, environment: dict[str, str]) -> int:
    """Run everything; the exit code. Without a CUDA device, only see whether all tests can be imported."""
    device = run(Part("versions", 60, ("-c", VERSIONS), True), clock, out, environment)
    if device != 0:
        for part in filter(lambda part: part.tests, parts()):
            code = run(part._replace(words=(*part.words, "--collect-only")), clock, out, environment)
            device = device if code == 0 else 1
        print(f"nothing was measured; results are in {out}")
        return device or 1
    codes = [run(part, clock, out, environment) for part in parts()]
    failed = [part.name for part, code in zip(parts(), codes) if part.tests and code != 0]
    print(f"results are in {out}; tests: {', '.join(failed) + ' failed or were cut short' if failed else 'all passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
