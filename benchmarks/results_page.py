"""Make docs/results.md, and the five figures in README.md, from the files in benchmarks/results/.

python benchmarks/results_page.py            # write both
python benchmarks/results_page.py --check    # exit code 1 if one of them is not what would be written
"""

import argparse
import json
import sys
from pathlib import Path

from results_figures import MEASUREMENTS, Result, same_files, times, unharmed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
FAMILIES = ROOT / "docs" / "families.md"
STATED = "## What trainers state"
"""The heading in docs/families.md before its second table."""
BEGIN, END = "<!-- figures: made by benchmarks/results_page.py -->", "<!-- end of figures -->"

INTRODUCTION = """\
# Results

Everything that was measured, with the machine, the commit and the command. **Nothing has been timed on a GPU yet**, and
what is not measured is not claimed. `make results` makes this page and the figures of the README from the files in
`benchmarks/results/`. No number is copied by hand.

Numbers that tests hold are not here. They are: LoRA against PEFT and torch's AdamW ([tests/parity](../tests/parity)), a
pack against each of its subjects alone ([tests/packing](../tests/packing)), ZeRO 0-3 at several rank counts
([tests/e2e](../tests/e2e)), adapters that diffusers loads ([tests/results](../tests/results)). Each tolerance stands in
its test.
"""


def read_results() -> dict[str, list[tuple[str, Result]]]:
    """(file name without ending, content) of every result, by the name of its measurement."""
    found: dict[str, list[tuple[str, Result]]] = {name: [] for name in MEASUREMENTS}
    for path in sorted(RESULTS.glob("*.json")):
        found[path.stem.rsplit("_", 2)[0]].append((path.stem, json.loads(path.read_text("utf-8"))))
    return found


def provenance(result: Result, command: str) -> list[str]:
    """Lines that say on what machine, at which commit and by which command a result was made.

    A file of several parts has these facts in each part.
    """
    parts = {"": result} if {"about", "commit"} & set(result) else result
    lines = []
    for name, part in parts.items():
        about = part.get("about", part)
        machine = about.get("machine") or about.get("device") or "no GPU used"
        made_by = about.get("command") or command
        lines.append(f"{f'{name}: ' if name else ''}{machine}; commit `{about['commit']}`; `{made_by}`")
    return lines


def page() -> str:
    """docs/results.md."""
    lines = [INTRODUCTION.rstrip()]
    for name, results in read_results().items():
        measurement = MEASUREMENTS[name]
        for stem, result in results:
            lines += ["", f"## {measurement.title}", ""]
            lines += [f"- {line}" for line in provenance(result, measurement.command)]
            links = [f"[{stem}.{ending}](../benchmarks/results/{stem}.{ending})" for ending in ("md", "json")]
            lines += [f"- full result: {', '.join(links)}"]
            lines += ["", "| what | measured |", "|---|---|"]
            lines += [f"| {what} | {figure} |" for what, figure in measurement.figures(result)]
    return "\n".join(lines) + "\n"


def five_figures() -> str:
    """The table in README.md."""
    newest = {name: results[-1][1] for name, results in read_results().items() if results}
    packs = [result["less_than"] for name, result in newest.items() if name.startswith("pack-peers")]
    made, given = (sorted(ratios[f"peer, priors {kind}"] for ratios in packs) for kind in ("made", "given"))
    attacked = newest["fleet"]["kills"]
    shipped = next(row for row in newest["recipe-quality"]["summary"] if row["recipe"] == "tiny_packed")
    harm = f"{attacked['subjects']:,} subjects under {attacked['kills_total']:,} kills: lost, finished twice, changed"
    rows = {
        "16 subjects in a pack beside diffusers' script run for each: processor time": (
            f"{made[0]:.1f} to {made[-1]:.1f} times less; "
            f"{given[0]:.1f} to {given[-1]:.1f} times less if the script is given its priors"
        ),
        "a LoRA step of one subject beside diffusers' script: processor time": times(
            newest["peers"]["lora"]["ratio"]["step_cpu_s"]
        ),
        "a run killed at each of its file operations and started again: the same files": same_files(newest["faults"]),
        f"a fleet of {harm}": unharmed(attacked),
        "DreamBooth on the embedded base: gap to the photos closed; scenes drawn as asked": (
            f"{shipped['closed']['value']:.2f}; {shipped['scene accuracy']['value']:.2f}"
        ),
    }
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows.items())])


def sizes() -> str:
    """The table in docs/families.md: what a LoRA step of each architecture needs, and the cards that have it."""
    heads = ("model", "image, px", "parameters", "TFLOP forward", "LoRA step, GiB", "recomputed, GiB", "fits",
             "fits, recomputed")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in read_results()["family-costs"][-1][1]["rows"]:
        if "error" not in row:
            more = [card for card in row["fits_recomputed"] if card not in row["fits"]]
            cells = (row["model"], row["pixels"], f"{row['params'] / 1e9:.2f}B", f"{row['forward_tflop']:.1f}",
                     f"{row['memory_gib']:.0f}", f"{row['memory_recomputed_gib']:.0f}",
                     ", ".join(row["fits"]) or "none", ", ".join(more) or "no more")  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def stated() -> str:
    """The table in docs/families.md: the memory that trainers' documents state, and our counts for such settings."""
    lines = ["| model | stated | its settings | counted, GiB | counted with | source |", "|---|---|---|---|---|---|"]
    for row in read_results()["family-costs"][-1][1]["stated"]:
        wide = f"{row['wide']:g} byte{'s' if row['wide'] > 1 else ''} a weight"
        ways = f"{wide}, batch {row['samples']}, rank {row['rank']}"
        cells = (row["model"], row["memory"], row["settings"], f"{row['counted_gib']:.0f}",
                 f"{ways}, {'recomputed' if row['again'] else 'plain'}", row["source"])  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """A page with the table between its marks made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def families(text: str) -> str:
    """docs/families.md with its two tables made anew."""
    before, line, after = text.partition(STATED)
    return f"{with_table(before, sizes())}{line}{with_table(after, stated())}"


def readme(text: str) -> str:
    """README.md with its figures made anew."""
    return with_table(text, five_figures())


def main() -> int:
    """Write the files, or say which ones are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file would change")
    check = parser.parse_args().check
    wanted = {PAGE: page(), README: readme(README.read_text("utf-8"))}
    wanted[FAMILIES] = families(FAMILIES.read_text("utf-8"))
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is not up to date' if check else 'written'}")
        if not check:
            path.write_text(wanted[path], "utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
