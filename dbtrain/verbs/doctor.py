"""`dbtrain doctor`: what on this machine would keep a run from starting, with the remedy for each finding.

Versions come from installed metadata. Only what cannot be known otherwise (a GPU, a library that must load its binary
part) is tried, and then in a process of its own, so that a broken library is a finding and not a crash.
"""

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from dbtrain.engines.kind import resolved_engine
from dbtrain.errors import ConfigError, DataError
from dbtrain.settings.config import RunConfig
from dbtrain.settings.recipes import load, recipe_names
from dbtrain.tiny import NAMED
from dbtrain_launchers.ray_head import is_loopback, token_file_finding, token_path

MIN_DISK_GIB = 10.0
"""Free space below which a run of a few full models fills the disk."""
MIN_MEMORY_GIB = 4.0
"""Available memory below which Stable Diffusion 1.5 does not load."""
PROBE_S = 120
"""Seconds after which a library that does not finish loading counts as broken."""
CONNECT_S = 0.5
"""Seconds to wait for a local service to accept a connection."""
MIN_PYTHON = (3, 11)
INSTALL = "pip install -c constraints.txt"


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `warn` (a run can start) or `fail` (it cannot), with the remedy where there is one."""

    state: Literal["ok", "warn", "fail"]
    name: str
    detail: str
    remedy: str = ""


ok, warn, fail = partial(Check, "ok"), partial(Check, "warn"), partial(Check, "fail")


def examine(model: str | None = None) -> list[Check]:
    """Every check of this machine, in a fixed order; `model` is a path or hub id to look for as well."""
    gpu = check_gpu()
    machine = [gpu, check_engine(gpu), check_compiler(), check_disk(Path.cwd()), check_memory()]
    optional = [check_optional("torchvision"), check_xformers(), check_kernels_package()]
    around = [check_launcher(), check_hub(), *check_ray(), *(check_base(model) if model else [])]
    return [check_python(), *check_requirements(), *machine, *optional, *around]


def probe(code: str) -> tuple[bool, str]:
    """Whether a line of Python ran in a fresh interpreter, and the last line that it wrote."""
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return False, f"not finished after {PROBE_S} s"
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
    return run.returncode == 0, lines[-1] if lines else ""


def installed(package: str) -> str | None:
    """The installed version of a package; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Check:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    state, remedy = (ok, "") if sys.version_info >= MIN_PYTHON else (fail, "use Python 3.11 or newer")
    return state("python", version, remedy)


def required() -> list[Requirement]:
    """What dbtrain's own metadata requires, without the extras; empty in a checkout that was never installed."""
    lines = (importlib.metadata.requires("dbtrain") or []) if installed("dbtrain") else []
    return [entry for entry in map(Requirement, lines) if entry.marker is None or entry.marker.evaluate()]


def check_requirements() -> list[Check]:
    """One check for each required package."""
    unknown = "dbtrain is not installed, so the versions it needs are not known"
    checks = [check_requirement(entry, installed(entry.name)) for entry in required()]
    return checks or [warn("packages", unknown, f"{INSTALL} -e .")]


def check_requirement(entry: Requirement, version: str | None) -> Check:
    """Whether an installed version (None: not installed) is one that dbtrain works with."""
    if version is None or not entry.specifier.contains(version, prereleases=True):
        return fail(entry.name, f"{version or 'not installed'}; dbtrain needs {entry}", f"{INSTALL} '{entry}'")
    return ok(entry.name, version)


def check_gpu() -> Check:
    """The GPUs that PyTorch sees."""
    works, line = probe(
        "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
        "print(f'{n}|{torch.__version__}|{torch.version.cuda}|' + '; '.join("
        "f'{p.name}, {p.total_memory / 2**30:.0f} GiB' for p in map(torch.cuda.get_device_properties, range(n))))"
    )
    if not works:
        return fail("gpu", f"torch does not load: {line}", f"reinstall torch: {INSTALL} torch")
    count, version, cuda, names = line.split("|", 3)
    if int(count):
        return ok("gpu", f"{names} (torch {version}, CUDA {cuda})")
    if cuda == "None":
        return warn("gpu", f"none, as torch {version} is built for the CPU; runs use the CPU")
    remedy = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; runs use the CPU meanwhile"
    return warn("gpu", f"none is visible to torch {version}, which is built for CUDA {cuda}", remedy)


def check_engine(gpu: Check) -> Check:
    """What trains a LoRA in one process here, as `engine.kind: auto` chooses. gpu: what `check_gpu` found."""
    device_type = "cuda" if gpu.state == "ok" else "cpu"
    return ok("engine", f"engine.kind: auto is {resolved_engine(RunConfig(), 1, device_type)[1]}")


def check_compiler() -> Check:
    """What DeepSpeed compiles its optional operators with, CPU offload's among them."""
    present = {"g++": shutil.which("g++"), "ninja": shutil.which("ninja") or installed("ninja")}
    missing = " and ".join(name for name, place in present.items() if not place)
    if missing:
        return warn("compiler", f"{missing} not found; DeepSpeed cannot compile its operators", f"install {missing}")
    return ok("compiler", "g++ and ninja")


def check_disk(folder: Path) -> Check:
    """Free space where output goes."""
    gib = shutil.disk_usage(folder).free / 2**30
    state, remedy = (ok, "") if gib >= MIN_DISK_GIB else (warn, "free some space or use another --out folder")
    return state("disk", f"{gib:.1f} GiB free here", remedy)


def check_memory(meminfo: Path = Path("/proc/meminfo")) -> Check:
    """Memory that is available, where the system says so."""
    line = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M) if meminfo.is_file() else None
    if line is None:
        return ok("memory", "this system does not say how much is available")
    gib = int(line[1]) / 2**20
    state, remedy = (ok, "") if gib >= MIN_MEMORY_GIB else (warn, "the embedded base fits; larger models may not")
    return state("memory", f"{gib:.1f} GiB available", remedy)


OPTIONAL = {
    # dbtrain does not use torchvision, but transformers loads an installed one, and fails if it is broken.
    "torchvision": (
        "import torchvision",
        "not installed, and not needed",
        "pip uninstall torchvision, or install the build that matches torch",
    ),
    # The operators of xformers need its binary part and a CUDA device.
    "xformers": (
        "import torch as t, xformers.ops as o; o.memory_efficient_attention(*[t.zeros(1, 8, 1, 8).half().cuda()] * 3)",
        "not installed; model.attention=xformers is refused",
        "use model.attention=auto, or a build of xformers that matches torch and CUDA",
    ),
}
"""Optional packages: code that fails if the package is broken, what its absence means, what to do if it is broken."""


def check_optional(name: str, ask: Callable[[str], tuple[bool, str]] = probe) -> Check:
    """Whether an optional package, if it is installed, also loads."""
    code, absent, remedy = OPTIONAL[name]
    version = installed(name)
    if version is None:
        return ok(name, absent)
    works, line = ask(code)
    return ok(name, version) if works else warn(name, f"{version} does not load: {line}", remedy)


def check_xformers(ask: Callable[[str], tuple[bool, str]] = probe) -> Check:
    """Whether an installed xformers loads, without which diffusers loads no model either, and whether its operators
    run, which need its binary part and a CUDA device."""
    version = installed("xformers")
    if version is not None:
        works, line = ask("import xformers.ops")
        if not works:
            detail = f"{version} does not load: {line}; diffusers imports it, so no model loads"
            return fail("xformers", detail, "pip uninstall xformers, or install a build for this torch and CUDA")
    return check_optional("xformers", ask)


def check_kernels_package() -> Check:
    """Whether `import kernels` would find something that is not Hugging Face's package of that name."""
    hides = Path.cwd() / "kernels" / "__init__.py"
    if hides.exists():
        detail = f"{hides} hides the package `kernels` that transformers imports"
        return fail("kernels", detail, "delete or rename that file, or work in another folder")
    return ok("kernels", f"package {installed('kernels') or 'not installed'}, and nothing here hides it")


def check_launcher() -> Check:
    """The `deepspeed` command, for several processes."""
    place = shutil.which("deepspeed") or shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    if place is None:
        detail = "the `deepspeed` command is not found; only one process can be started"
        return warn("launcher", detail, "activate the environment that holds dbtrain")
    return ok("launcher", place)


def check_hub() -> Check:
    """Whether models may be fetched from the hub."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return ok("hub", "offline by HF_HUB_OFFLINE; models load from folders and the local cache")
    return ok("hub", "models given by a hub id are downloaded; HF_HUB_OFFLINE=1 forbids it")


def ray_addresses(temp: Path) -> list[str]:
    """Addresses (host:port) of heads in the state that Ray keeps here; the address of a killed head stays in it."""
    path = temp / "ray_current_cluster"
    return path.read_text("utf-8").split() if path.is_file() else []


def is_listening(address: str) -> bool:
    """Whether something accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def check_ray(temp: Path | None = None) -> list[Check]:
    """A Ray head that others can reach runs anyone's code unless it asks for a token; empty without a local head."""
    folder = temp or Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    heads = [check_ray_head(address) for address in ray_addresses(folder) if is_listening(address)]
    readable = token_file_finding()
    return [*heads, *([fail("ray token", readable, f"chmod 600 {token_path()}")] if readable else [])]


def check_ray_head(address: str, ask: Callable[[str], tuple[bool, str]] = probe) -> Check:
    """Whether a head at host:port is safe to leave running; one that others reach is asked as a stranger would."""
    if is_loopback(address.rpartition(":")[0]):
        return ok("ray head", f"{address}, reachable from this machine only")
    let_in, answer = ask(
        "import os, sys; os.environ['RAY_AUTH_MODE'] = 'disabled'; "
        f"sys.argv = ['ray', 'health-check', '--address', {address!r}]; from ray.scripts.scripts import main; main()"
    )
    if not let_in and re.search("Authentication|Unauthenticated", answer):
        return ok("ray head", f"{address} asks for a token")
    remedy = "ray stop; then start it with RAY_AUTH_MODE=token or --node-ip-address=127.0.0.1"
    if let_in:
        return fail("ray head", f"{address} runs the code of anyone who can reach it", remedy)
    return warn("ray head", f"{address} did not say whether it asks for a token: {answer[:200]}", remedy)


def check_base(model: str) -> list[Check]:
    """Whether a base can be used, what it needs, and what a step of it would cost, where its files say."""
    found = check_model(model)
    place = NAMED.get(model) or Path(model).expanduser()
    family = re.search(r"model\.family=(\w+)", found.detail)
    if found.state == "fail" or not family or not place.is_dir():
        return [found]
    ours = (name for name in recipe_names() if name.endswith("_lora") and load(name).model.family == family[1])
    begin = [] if model in NAMED else [ok("model recipe", f"begin with --config {next(ours)} model.path={model}")]
    return [found, *begin, *check_cost(family[1], place)]


def check_cost(name: str, place: Path) -> list[Check]:
    """The weights of a base's parts, and by the arithmetic of `bench model` a LoRA step's memory and time on cards."""
    from dbtrain.bench.cards import CARDS
    from dbtrain.bench.roofline import GIB, count, modelled, shape_of, targets_of
    from dbtrain.families import FAMILIES

    family = FAMILIES[name]
    parts = {part: sum(file.stat().st_size for file in (place / part).glob("*.safetensors"))
             for part in (family.denoiser, *family.companions, *family.text_encoders, "vae")}  # fmt: skip
    held = ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size)
    try:
        shape = shape_of(family, place)
        plain, less = (count(name, family, shape, 1, targets_of(family), again) for again in (False, True))
    except (DataError, ConfigError, TypeError, ValueError) as error:
        return [ok("model files", f"GiB: {held}"), warn("model cost", f"cannot be counted: {error}")]
    fits = [card for card, peaks in CARDS.items() if modelled(plain, peaks)["fits"]]
    only_less = [card for card, peaks in CARDS.items() if card not in fits and modelled(less, peaks)["fits"]]
    h200 = CARDS["H200"]
    needs = (f"{plain.params / 1e9:.2f}B parameters; a LoRA step in bf16 at {shape.latent_side * family.codec.cell} px "
             f"takes {plain.memory_gib(h200):.1f} GiB, {less.memory_gib(h200):.1f} with train.gradient_checkpointing; "
             f"fits {', '.join(fits) or 'no card'}{', so ' + ', '.join(only_less) if only_less else ''}")  # fmt: skip
    took = modelled(plain, h200)["modelled_ms"]
    speed = f"modelled {took:,.0f} ms a step on an H200, for {plain.operations / 1e12:.1f} TFLOP"
    return [ok("model files", f"GiB: {held}"), ok("model needs", needs), ok("model cost", speed)]


def check_model(model: str) -> Check:
    """Whether a base model can be used: `embedded`, a folder, a .safetensors file, or a hub id (not contacted)."""
    from dbtrain.families import FAMILIES
    from dbtrain.models.base_check import base_problem, path_problem
    from dbtrain.models.recognition import distilled, nearest

    if model in NAMED:
        return check_model(str(NAMED[model]))
    problem = path_problem(model)
    place = Path(model).expanduser()
    if problem:
        return fail("model", problem, "check the path")
    if not place.exists():
        return warn("model", f"{model} is no path here; it will be looked up as a hub id")
    try:
        problems = {name: base_problem(FAMILIES[name], str(place)) for name in FAMILIES}
    except DataError as error:
        return fail("model", str(error), "fetch the base again")
    fits = [name for name, problem in problems.items() if problem is None]
    if not fits:
        return fail("model", nearest(problems), "give a base of one of the families")
    if why := distilled(str(place)):
        return warn("model", f"{place}, model.family={fits[0]}, {why}", "sample with it, and train on its base")
    return ok("model", f"{place}, model.family={' or '.join(fits)}")
