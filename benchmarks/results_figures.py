"""The figures of each result in benchmarks/results/: what docs/results.md shows of it, and under which title."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
Figures = list[tuple[str, str]]
"""What each figure is, and the figure with its unit."""


@dataclass(frozen=True)
class Measurement:
    """How results of one name are shown.

    command: what made the result. It is empty where the result says that itself.
    """

    title: str
    figures: Callable[[Result], Figures]
    command: str = ""


def campaign(result: Result, kinds: tuple[str, ...], parts: tuple[str, ...] = ("",)) -> str:
    """`good of cases` over the campaigns whose names begin with one of the parts and end with one of the kinds."""
    chosen = [
        entry for entry in result["campaigns"] if entry["name"].startswith(parts) and entry["name"].endswith(kinds)
    ]
    return f"{sum(entry['good'] for entry in chosen):,} of {sum(entry['cases'] for entry in chosen):,}"


def faults(result: Result) -> Figures:
    costs = result["costs"]
    interrupted = ("cut", "from then on", "EIO", "SIGTERM")
    return [
        ("one subject's run, killed at every one of its file operations: the same files after", same_files(result)),
        ("a pack of two, killed at every one of its file operations", campaign(result, ("kill",), ("packed",))),
        ("power cuts, full disks, failing operations, requests to stop", campaign(result, interrupted)),
        ("damage to checkpoints, shards and prior stores that was found", campaign(result, ("damage",))),
        ("preflight of 1,000 subjects", f"{costs['preflight']['subjects']['1000']['seconds']:.1f} s"),
        ("proofs, share of training time", f"{costs['proofs in a tiny run']['share_of_training']:.2%}"),
    ]


def same_files(result: Result) -> str:
    return campaign(result, ("kill",), ("train",))


NAMES = {"zygote": "warm parent"}
"""What a process is called today, by its name in older results."""


def kills(title: str, result: Result) -> Figures:
    """What a campaign of SIGKILLs came to; title: put before each line."""
    # A machine's warm parent (`host`) leaves no work waiting, so nothing answers its death.
    back = {name: one for name, one in result["recovery_s"].items() if "p50" in one}
    return [
        (f"{title}: lost, finished twice, adapters that differ from the undisturbed run", unharmed(result)),
        (
            f"{title}: throughput kept under {result['kills_per_min']:.0f} kills a minute",
            f"{result['throughput_kept']:.0%}",
        ),
        (
            f"{title}: seconds until a killed process's work goes on, median and 95 %",
            ", ".join(f"{NAMES.get(name, name)} {one['p50']:.1f} and {one['p95']:.1f}" for name, one in back.items()),
        ),
    ]


def unharmed(result: Result) -> str:
    return f"{result['lost']}, {result['duplicated']}, {result['adapters_that_differ']}"


def fleet(result: Result) -> Figures:
    scale = result["scale"]
    figures = [
        (
            f"planning and scheduling, {scale['subjects']:,} subjects",
            f"{scale['plan_and_schedule_ms_a_subject']:.2f} ms a subject",
        ),
        (f"`batch status` of {scale['subjects']:,} subjects", f"{scale['status_command_s']:.2f} s"),
    ]
    for key in [key for key in ("kills before", "kills", "kills slowly", "soak", "kills gang 2") if key in result]:
        one = result[key]
        gang = f", gangs of {one['gang']}" if one["gang"] > 1 else ""
        commit = f" at {one['about']['commit']}"
        figures += kills(f"{one['subjects']:,} subjects{gang}, {one['kills_total']:,} SIGKILLs{commit}", one)
    if one := result.get("living"):
        title = f"{one['subjects']:,} subjects that join with photos and steps, {one['kills_total']:,} SIGKILLs"
        figures += [(f"{title}: lost, finished twice, adapters unlike a run's that knew all", unharmed(one))]
    if one := result.get("watch"):
        title = f"`--watch`, {one['subjects']:,} subjects in {one['seconds'] // 60} minutes and a restart"
        wait, (first, *_, last) = one["appearance_to_published_s"], one["driver"]
        figures += [
            (f"{title}: seconds from appearance to result, median, 95 %", f"{wait['p50']:.1f} and {wait['p95']:.1f}"),
            (
                f"{title}: the driver's MiB and open files, early and late",
                "; ".join(f"{one['mib']:.0f}, {one['files']}" for one in (first, last)),
            ),
        ]
    for key in [key for key in ("start before", "start") if key in result]:
        spent = ", ".join(f"{kind} {result[key][f'cpu_s_after_a_{kind}s_death']:.1f}" for kind in ("driver", "actor"))
        figures += [(f"processor seconds from a death until work goes on, at {result[key]['about']['commit']}", spent)]
    return figures


def multinode(result: Result) -> Figures:
    lost, subjects = result["one host lost"], result["about"]["subjects"]
    return [
        (
            "one of two hosts lost midway: subjects finished, finished twice",
            f"{lost['finished']} of {subjects}, {lost['finished_twice']}",
        ),
        ("the lost subject is taken up again after", f"{lost['taken_up_again_s'][0]:.0f} s"),
        ("largest difference of a weight from the undisturbed run", f"{result['largest difference of a weight']:g}"),
    ]


def pack(result: Result) -> Figures:
    line = result["line"]
    figures = [
        (
            f"{name}: a subject's step, processor time; solo / this",
            f"{1000 * step['cost_s']:.1f} ms; {step['times_solo']:.2f}",
        )
        for name, step in result["steps"].items()
    ]
    figures += [
        (f"{name}: share of a matrix product's FLOP/s", f"{step['mfu']:.0%}")
        for name, step in result["steps"].items()
        if step.get("mfu")
    ]
    whole = f"{line['start_s']:.1f} + {line['class_s']:.1f} K + {line['subject_s']:.2f} S processor seconds"
    return [*figures, ("a whole run of S subjects of K classes", whole)]


def pack_peers(result: Result) -> Figures:
    return [
        ("what is trained", f"{result['about']['subjects']}; {result['about']['recipe']}"),
        *(
            (
                f"{name}: a subject, all in",
                f"{seconds:.1f} processor seconds, {result['less_than'][name]:.1f} times a pack's",
            )
            for name, seconds in result["cpu_s_a_subject"].items()
        ),
        ("turns", str(result["about"]["turns"])),
    ]


def paper_shape(result: Result) -> Figures:
    return [
        (entry["what"], f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}] {entry['verdict']}".strip())
        for entry in result["findings"]
    ]


def recipe_quality(result: Result) -> Figures:
    """Cost and main scores of each recipe."""
    names = {"closed": "share of the identity gap closed", "identity": "identity", "placed identity": "placed identity",
             "scene accuracy": "scenes kept", "pres": "PRES, lower is better"}  # fmt: skip
    figures: Figures = []
    for row in result["summary"]:
        figures.append((f"{row['recipe']}: ten subjects", f"{row['cpu_s']:.0f} processor seconds"))
        known, form = {key: what for key, what in names.items() if row.get(key)}, "{value:.3f} [{low:.3f}, {high:.3f}]"
        figures += [(f"{row['recipe']}: {what}", form.format(**row[key])) for key, what in known.items()]
    return figures


def masks_and_captions(result: Result) -> Figures:
    """Every score of the arms' differences, and of the arms themselves."""
    names = {"scene": "scene drawn as asked", "leak": "a scene of the photos instead",
             "identity": "identity in scenes", "plain": "identity, plain prompt"}  # fmt: skip
    rows = sorted(result["rows"], key=lambda row: "minus" not in row["row"])
    return [
        (f"{row['row']}: {what}", "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row[key]))
        for row in rows
        for key, what in names.items()
    ]


def times(ratio: float) -> str:
    """How many times less ours takes than theirs, or more."""
    return f"{ratio:.2f} times less" if ratio >= 1 else f"{1 / ratio:.2f} times more"


def peers(result: Result) -> Figures:
    measured = {
        "step_cpu_s": "one step, processor time",
        "start_cpu_s": "start-up, load, cache, save",
        "wall_s": "long run, wall",
    }
    return [
        (f"`{result[method]['script']}`, {what}", times(result[method]["ratio"][key]))
        for method in ("lora", "full")
        for key, what in measured.items()
    ]


def report(result: Result) -> Figures:
    shown = result["browser"]["ms"]
    slowest_sort = max(milliseconds for name, (milliseconds, _) in shown.items() if name.startswith("sort"))
    return [
        (f"pages of {result['subjects']:,} subjects: built", f"{result['first']['seconds']:.0f} s"),
        ("made again with nothing changed", f"{result['unchanged']['seconds']:.1f} s"),
        ("the index opens in Chromium", f"{shown['open, clock'][0] / 1000:.1f} s"),
        ("it sorts, slowest column", f"{slowest_sort:.0f} ms"),
    ]


def step_counts(result: Result) -> Figures:
    return [
        (f"{step['model']}, {step['form']}, {step['subjects']} subjects: launches a step, a subject",
         f"{step['launches']:,}; {step['launches'] / step['subjects']:,.0f}")
        for step in result["steps"]
    ]  # fmt: skip


def fused_projections(result: Result) -> Figures:
    return [
        (f"{row['model']}, pack of {row['subjects']}, {row['form']}: launches a step; modelled ms of a subject",
         f"{row['kernels'] - row['parts'].get('layout of convolutions', [0])[0]:,}; {row['a_subject_ms']:.1f}")
        for row in result["rows"]
    ]  # fmt: skip


def family_costs(result: Result) -> Figures:
    return [
        (f"{row['model']}, {row['pixels']} px: kernels a step; TFLOP forward; GiB of a LoRA step, plain and recomputed",
         f"{row['kernels']:,}; {row['forward_tflop']:.1f}; {row['memory_gib']:.0f}, {row['memory_recomputed_gib']:.0f}")
        for row in result["rows"] if "error" not in row
    ]  # fmt: skip


def tiny_quality(result: Result) -> Figures:
    drawn, vae = result["generated"], result["vae"]
    return [
        ("class accuracy of drawn pictures", f"{drawn['class accuracy, plain prompt']:.1%}"),
        ("scene accuracy of drawn pictures", f"{drawn['scene accuracy, placed']:.1%}"),
        ("mean absolute error of the VAE, unseen scenes", f"{vae['train']:.3f}"),
    ]




def blind_judging(result: Result) -> Figures:
    return [
        (f"{part}: {what}", told) for part, found in result.items()
        for what, told in found.items() if what in ("class named", "scene named", "picked out")
    ]  # fmt: skip


def upscaler_quality(result: Result) -> Figures:
    """The first set: its first two ways are bicubic and the upscaler as it is used."""
    bicubic, ours = list(next(iter(result["found"].values())).values())[:2]
    mean = {name: [sum(way[name]) / len(way[name]) for way in (bicubic, ours)] for name in bicubic}
    return [
        ("held-out art, PSNR to the truth, bicubic; upscaler", "{:.1f}; {:.1f} dB".format(*mean["PSNR"])),
        ("patch distance to the truth, bicubic; upscaler", "{:.4f}; {:.4f}".format(*mean["patch distance"])),
        ("error of 255 near the border, bicubic; upscaler", "{:.1f}; {:.1f}".format(*mean["border error"])),
        ("size", f"{result['bytes'] / 1e6:.1f} MB"),
    ]


def second_stage(result: Result) -> Figures:
    """Each arm's mean over subjects of their pictures."""
    figures = []
    for arm, found in result["arms"].items():
        values = [[sum(one[what]) / len(one[what]) for one in found.values()] for what in ("PSNR", "patch distance")]
        told = "{:.2f} dB; {:.4f}".format(*(sum(each) / len(each) for each in values))
        figures.append((f"{len(found)} subjects, {arm}: PSNR and patch distance to the truth", told))
    return figures


def packed_drawing(result: Result) -> Figures:
    figures = []
    for row in result["rows"]:
        alone, joint = (1000 * row[f"{way} (s)"] for way in ("one by one", "together"))
        what = f"{row['subjects']} subjects of {row['pictures a subject']} pictures: one by one / together"
        figures.append((what, f"{alone:.0f} / {joint:.0f} ms of a processor a picture, {row['ratio']:.2f} times"))
    return figures


def halving(result: Result) -> Figures:
    """What is kept in seeded orders of the pilots, and in every choice of the first four."""
    figures = []
    for key, title in (("orders", "seeded orders"), ("sets", "choices of the first four")):
        games = result[key]
        for name in ("keeps the best", "chooses the same"):
            figures.append((f"{len(games)} {title}: {name}", f"{sum(game[name] for game in games)}"))
        trained = sum(game["trained"] for game in games) / len(games)
        figures.append((f"{len(games)} {title}: trainings, of {result['rows']}", f"{trained:.0f}"))
    return figures


def study_cost(result: Result) -> Figures:
    """Seconds of a row in both ways, and their ratio."""
    rows = len(result["pilots"]) * result["variants"]
    figures = [
        (f"a row, {way}: training + scoring", f"{parts['training']:.1f} + {parts['scoring']:.1f} processor seconds")
        for way, parts in result["seconds a row"].items()
    ]
    return [*figures, (f"a study of {rows} rows, of them one by one", f"{result['ratio']:.2f}")]


def early_stop(result: Result) -> Figures:
    """Each variant's means over subjects."""
    figures = []
    for rate, variant in dict.fromkeys((row["rate"], row["variant"]) for row in result["rows"]):
        own = [row for row in result["rows"] if (row["rate"], row["variant"]) == (rate, variant)]
        steps, cost, dino = (sum(row[key] for row in own) / len(own) for key in ("steps", "cost_s", "dino"))
        told = f"{steps:.0f} steps, {cost:.0f} s a subject, DINO {dino:.3f}"
        figures.append((f"{len(own)} subjects, {rate} rate, {variant}", told))
    return figures


PEERS_TITLE = "A pack of 16 beside diffusers' script, run once for each subject: {}"
PAPER_SHAPE = "python benchmarks/paper_shape.py --images"
SIXTY_STEPS = f"{PAPER_SHAPE} 4 --name paper-shape-60-steps --seeds 0 1 2 --overrides train.steps=60"
MEASUREMENTS = {
    "pack": Measurement("A pack's step beside solo training", pack),
    "pack-line": Measurement("What a run of packs costs, by subjects and classes", pack),
    "packed-drawing": Measurement(
        "Pictures of many subjects, drawn one by one and together",
        packed_drawing,
        "python benchmarks/packed_drawing.py --steps 4",
    ),
    "halving": Measurement("What halving keeps of a whole study", halving, "python benchmarks/halving.py"),
    "study-cost": Measurement(
        "What a study costs beside its rows one by one",
        study_cost,
        "python benchmarks/study_cost.py --steps 30 60 120 --sampling 12",
    ),
    "early-stop": Measurement("What `train.stop` buys", early_stop, "python benchmarks/early_stop.py"),
    "pack-peers-one-class-short": Measurement(PEERS_TITLE.format("one class, 60 steps"), pack_peers),
    "pack-peers-one-class": Measurement(PEERS_TITLE.format("one class, 250 steps"), pack_peers),
    "pack-peers-short": Measurement(PEERS_TITLE.format("two classes, 60 steps"), pack_peers),
    "pack-peers-priors": Measurement(PEERS_TITLE.format("two classes, 250 steps, more priors"), pack_peers),
    "pack-peers": Measurement(PEERS_TITLE.format("two classes, 250 steps"), pack_peers),
    "peers": Measurement(
        "One subject beside diffusers' scripts",
        peers,
        "python benchmarks/peers.py --script lora=PATH --script full=PATH",
    ),
    "step-counts": Measurement("What a LoRA step launches on a GPU, counted without one", step_counts),
    "fused-projections": Measurement("Fused projections, gates and norms, counted without a GPU", fused_projections),
    "family-costs": Measurement("What each family costs, counted without a GPU", family_costs),
    "faults": Measurement("Kills, power cuts, full disks and damage", faults),
    "faults-forget": Measurement(
        "Forgetting a person, struck at every one of its file operations",
        lambda result: [("no byte of the person is left, and every bit of the others", campaign(result, ("",)))],
    ),
    "fleet": Measurement("The fleet under kills, and at size", fleet),
    "multinode": Measurement("A fleet over two hosts, one of them lost", multinode, "python benchmarks/multinode.py"),
    "report": Measurement("The report of 10,000 subjects", report),
    "tiny-quality": Measurement("The embedded base", tiny_quality, "python benchmarks/tiny_quality.py"),
    "blind-judging": Measurement(
        "The embedded base and the demo, judged blind", blind_judging, "python benchmarks/blind.py"
    ),
    "upscaler-quality": Measurement(
        "The embedded upscaler", upscaler_quality, "python benchmarks/upscaler_quality.py --count 16"
    ),
    "second-stage": Measurement(
        "The embedded upscaler, tuned on a subject", second_stage, "python benchmarks/second_stage.py"
    ),
    "second-stage-packed": Measurement(
        "The same in a pack, as the demo trains it",
        second_stage,
        "python benchmarks/second_stage.py --name second-stage-packed",
    ),
    "paper-shape": Measurement(
        "The shape of the paper's tables on the embedded base",
        paper_shape,
        f"{PAPER_SHAPE} 4 --recipe tiny_packed --overrides engine.packed.size=10",
    ),
    "paper-shape-60-steps": Measurement("The same with 60 steps and three seeds", paper_shape, SIXTY_STEPS),
    "recipe-quality": Measurement("What recipes of the embedded base buy", recipe_quality),
    "masks-and-captions": Measurement("Masks, and captions of each photo, on the embedded base", masks_and_captions),
}
"""How each result is shown, by the part of its file's name before the device, in the page's order."""
