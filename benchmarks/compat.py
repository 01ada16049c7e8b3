"""What dbtrain publishes, loaded by diffusers of several ages: `make compat`.

Random models of the real architectures are published as dbtrain publishes them, and drawn from here. Then each version
of diffusers, with the transformers and PEFT of its day in an environment of its own, loads the same files and draws the
same pictures. The table that is printed holds the largest difference of a channel, of 255.
"""

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dbtrain.families import FAMILIES  # noqa: E402
from dbtrain.models.adapters import LoraWeights, adapter, attach, detach, layers  # noqa: E402
from dbtrain.models.family import Family, Models  # noqa: E402
from dbtrain.models.load import load_models  # noqa: E402
from dbtrain.models.sampling import make_pipeline  # noqa: E402
from dbtrain.results.exporting import export  # noqa: E402
from dbtrain.results.publish import MODEL_FOLDER, publish_lora, read_lora  # noqa: E402
from dbtrain.settings.config import LoraConfig, ModelConfig, PublishConfig, RunConfig, TrainConfig  # noqa: E402
from dbtrain.training.trainables import publish_weights  # noqa: E402
from tests.kit.adapter_rows import read_rows  # noqa: E402
from tests.kit.compat_probe import NONE, draw  # noqa: E402
from tests.kit.random_flow import make_flux, make_flux2_klein, make_sd3  # noqa: E402
from tests.kit.random_models import make_sd, make_sdxl  # noqa: E402

VERSIONS = {
    "0.33.1": "transformers==4.51.3 peft==0.15.2 accelerate==1.6.0 huggingface_hub==0.30.2 tokenizers==0.21.1",
    "0.34.0": "transformers==4.53.0 peft==0.15.2 accelerate==1.8.1 huggingface_hub==0.33.1 tokenizers==0.21.2",
    "0.35.2": "transformers==4.57.1 peft==0.17.1 accelerate==1.10.1 huggingface_hub==0.35.3 tokenizers==0.22.1",
    "0.36.0": "transformers==4.57.3 peft==0.18.0 accelerate==1.12.0 huggingface_hub==0.36.0 tokenizers==0.22.1",
    "0.37.1": "transformers==5.3.0 peft==0.18.1 accelerate==1.13.0 huggingface_hub==1.5.0 tokenizers==0.22.2",
    "0.38.0": "transformers==5.5.4 peft==0.19.1 accelerate==1.13.0 huggingface_hub==1.13.0 tokenizers==0.22.2",
    "0.39.0": "transformers==5.12.1 peft==0.19.1 accelerate==1.13.0 huggingface_hub==1.20.1 tokenizers==0.22.2",
    "0.42.1": "transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 huggingface_hub==2.4.0 tokenizers==0.23.3",
}
"""Versions of diffusers, each with what its users had installed beside it."""
ADAPTERS = {"LoRA": (False, 4.0), "LoRA, alpha not rank": (False, 1.5), "LoRA with text": (True, 4.0),
            "LoRA with text, alpha not rank": (True, 1.5)}  # fmt: skip
"""(whether text encoders are trained, alpha at rank 4) by the name of the case."""
MAKERS = {"sd": make_sd, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux, "flux2_klein": make_flux2_klein}
ROUNDING = 1
"""The largest difference that another order of the same sums makes, of 255."""
SINGLE = ("sd", "sdxl")
"""Families that have a common single file, and whose kohya files are read at any width."""
TARGETS = {"flux2_klein": (*LoraConfig().targets, "attn.to_qkv_mlp_proj", "attn.to_out")}
"""Layers that are adapted, where they are not the default ones."""


def main() -> int:
    """Build, publish, look; 1 if a picture differs anywhere."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--out", type=Path, default=Path(".compat"), help="folder of environments and models")
    words.add_argument("versions", nargs="*", metavar="VERSION", help=f"of diffusers; default: {', '.join(VERSIONS)}")
    given = words.parse_args()
    out = given.out.resolve()
    cases = [case for name in MAKERS for case in publish(out / "published", name)]
    (out / "cases.json").write_text(json.dumps(cases, indent=1))
    rows = {version: look(out, version) for version in given.versions or VERSIONS}
    print(table([case["name"] for case in cases], rows))
    cells = [(version, name, value) for version, row in rows.items() for name, value in row.items()]
    return int(any(value not in (0, ROUNDING) and not is_known(version, name, value) for version, name, value in cells))


def is_known(version: str, case: str, value: int | str) -> bool:
    """Whether a version's own reader fails at such a file: 0.39 at kohya's text layers beside transformers >= 5.6; or
    has no pipeline of the family."""
    return value == NONE or (version == "0.39.0" and "with text" in case and case.endswith("(kohya)"))


def publish(folder: Path, name: str) -> list[dict[str, str]]:
    """The cases of a family, published under a folder, each beside the picture that dbtrain draws of it."""
    base, family = folder / name / "base", FAMILIES[name]
    if not base.exists():
        MAKERS[name](base)
    models = load_models(family, ModelConfig(family=name, path=str(base)))
    whole = folder / name / "full"
    settings = RunConfig(train=TrainConfig(method="full"), publish=PublishConfig(dtype="fp32"))
    publish_weights(whole, family, models, settings, {}, {})
    shared = {"family": name, "pipeline": family.pipeline, "base": str(whole / MODEL_FOLDER)}
    cases = [picture({**shared, "name": f"{name}: whole model"}, whole, make_pipeline(family, models))]
    if name in SINGLE:
        single = str(export(whole / MODEL_FOLDER, str(folder / name / "single.safetensors")))
        cases += [{**cases[0], "name": f"{name}: one file", "single": single}]
    for title, (text, alpha) in ADAPTERS.items():
        if text and name == "flux2_klein":  # a language model, which diffusers loads no adapter for
            continue
        place = folder / name / title.replace(" ", "-").replace(",", "")
        place.mkdir(parents=True, exist_ok=True)
        weights = random_adapter(family, models, alpha, text)
        files = publish_lora(place, weights, {"family": name}, kohya=name in SINGLE)
        for file, layout in zip(files, ("", " (kohya)")):
            with adapter(family, models, read_lora(file)[0]):
                case = {**shared, "name": f"{name}: {title}{layout}", "adapter": str(file)}
                cases.append(picture(case, file, make_pipeline(family, models)))
    return cases


def picture(case: dict[str, str], beside: Path, pipeline: object) -> dict[str, str]:
    """The case, with what dbtrain draws of it kept as a file."""
    place = beside.with_name(f"{beside.stem}.ours.npy")
    np.save(place, draw(pipeline))
    return {**case, "ours": str(place)}


def random_adapter(family: Family, models: Models, alpha: float, text: bool) -> LoraWeights:
    """An adapter of rank 4 with random numbers in every attention layer, in text encoders too if `text`."""
    settings, generator = LoraConfig(), torch.Generator().manual_seed(0)
    chosen = models.components(family.denoiser) if text else {family.denoiser: models.denoiser}
    for name, module in chosen.items():
        targets = TARGETS.get(family.name, settings.targets) if name == family.denoiser else settings.text_targets
        if name != family.denoiser and not any("self_attn.q_proj" in path for path, _ in module.named_modules()):
            continue  # T5 has other layers, and is not trained
        attach(module, targets, 1, 4, alpha)
        for _, layer in layers(module):
            layer.down_NRD.data.normal_(0, 0.3, generator=generator)
            layer.up_NDR.data.normal_(0, 0.3, generator=generator)
    weights = read_rows(chosen, 0, alpha)
    for module in chosen.values():
        detach(module)
    return weights


def look(out: Path, version: str) -> dict[str, int | str]:
    """What a version of diffusers makes of the cases: by name, the largest difference, or what went wrong."""
    python = environment(out / f"diffusers-{version}", version)
    probe = ROOT / "tests/kit/compat_probe.py"
    command = [str(python), str(probe), str(out / "cases.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if run.returncode:
        raise SystemExit(f"diffusers {version}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def environment(folder: Path, version: str) -> Path:
    """The interpreter of an environment with a version of diffusers. It takes torch and numpy from this one."""
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    *without_torch, hub, tokenizers = VERSIONS[version].split()
    subprocess.run([*pip, "--no-deps", f"diffusers=={version}", *without_torch], check=True)
    subprocess.run([*pip, "--ignore-installed", hub, tokenizers, "safetensors", "httpx<1"], check=True)
    (folder / "complete").touch()
    return python


def table(cases: list[str], rows: dict[str, dict[str, int | str]]) -> str:
    """Markdown: a row for each case, a column for each version."""
    lines = [f"| | {' | '.join(rows)} |", f"|---|{'---|' * len(rows)}"]
    lines += [f"| {case} | {' | '.join(str(row[case]) for row in rows.values())} |" for case in cases]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
