"""The report of a large run: time to build it, its size, memory, and how fast it opens and sorts in Chromium.

    python benchmarks/report.py                       # 500 subjects, half a minute
    python benchmarks/report.py --subjects 10000      # what the results folder holds

The run is made up (tests/kit/made_up_run.py): for each subject 4 photos in shards, 6 samples, a log of 40 lines,
scores, 4 evaluation pictures; all pictures 64 x 64, as the embedded base draws. --side 512 costs what a large model's
would.
Chromium is measured from a fresh start, on the file itself, with the machine's own software rendering.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dbtrain.bench import commit  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / f"report_cpu_{time.strftime('%Y%m')}"
BUILD = """
import json, resource, sys
from pathlib import Path
from dbtrain.report import rebuild
if __name__ == "__main__":
    built = rebuild(Path(sys.argv[1]))
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent = sum(each.ru_utime + each.ru_stime for each in use)
    # ru_maxrss of a process counts that of the one that started it, too.
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps({"seconds": built.seconds, "made": built.made, "processor_s": spent,
                      "peak_mib": peak / 1024, "peak_mib_of_a_helper": use[1].ru_maxrss / 1024}))
"""
SORT = """(name) => { const button = document.querySelector(`th[data-name=${name}] button`);
  const begin = performance.now(); button.click(); document.body.offsetHeight; return performance.now() - begin; }"""
FILTER = """() => new Promise((done) => { const field = document.getElementById('find'); field.value = 'dino<0.6 dog';
  const begin = performance.now(); const status = document.getElementById('status'), before = status.textContent;
  new MutationObserver(() => { document.body.offsetHeight; done(performance.now() - begin); })
    .observe(status, { childList: true, characterData: true, subtree: true });
  field.dispatchEvent(new Event('input')); })"""
ALL = """() => { const begin = performance.now(); dispatchEvent(new Event('beforeprint')); document.body.offsetHeight;
  const spent = performance.now() - begin, rows = document.querySelectorAll('#body a').length;
  dispatchEvent(new Event('afterprint')); return [spent, rows]; }"""


def build(run: Path, script: Path) -> dict:
    """Seconds, processor seconds and peak memory of one build in a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    words = [sys.executable, str(script), str(run)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return {key: round(value, 2) for key, value in json.loads(done.stdout).items()}


def sizes(folder: Path) -> dict:
    """Files and bytes of the report, and what its parts take on the disk."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return {
        "files": len(files),
        "mb": round(sum(each.st_size for each in files) / 1e6, 1),
        "mb_on_disk": round(sum(each.st_blocks * 512 for each in files) / 1e6, 1),
        "index_mb": round((folder / "index.html").stat().st_size / 1e6, 2),
    }


def browse(index: Path, turns: int) -> dict:
    """Milliseconds in Chromium, medians and slowest of `turns`: opening, sorting, filtering, all rows at once."""
    from playwright.sync_api import sync_playwright

    from tests.web.conftest import executable

    found: dict[str, list[float]] = {}
    with sync_playwright() as driver:
        path = executable(driver.chromium.executable_path)
        for _ in range(turns):
            browser = driver.chromium.launch(executable_path=path)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            begin = time.perf_counter()
            page.goto(index.as_uri())
            page.wait_for_selector("#body a")
            found.setdefault("open, clock", []).append((time.perf_counter() - begin) * 1000)
            times = "performance.getEntriesByType('navigation')[0]"
            found.setdefault("open, until the table stands", []).append(page.evaluate(f"{times}.domComplete"))
            paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
            found.setdefault("open, first paint", []).append(page.evaluate(paint))
            for name in ("id", "class", "dino", "seconds", "finished"):
                found.setdefault(f"sort by {name}", []).append(page.evaluate(SORT, name))
            found.setdefault("filter", []).append(page.evaluate(FILTER))
            page.fill("#find", "")
            page.wait_for_timeout(200)
            spent, rows = page.evaluate(ALL)
            found.setdefault("all rows in the document instead (print)", []).append(spent)
            heap = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
            version = browser.version
            browser.close()
    milliseconds = {name: [round(statistics.median(each), 1), round(max(each), 1)] for name, each in found.items()}
    return {"chromium": version, "turns": turns, "ms": milliseconds, "rows": rows, "script_heap_mib": round(heap, 1)}


def markdown(result: dict) -> str:
    """The result as a page."""
    first, again, one, size, web = (result[key] for key in ("first", "unchanged", "one_changed", "size", "browser"))
    rows = "\n".join(f"| {name} | {median} | {most} |" for name, (median, most) in web["ms"].items())
    return f"""# The report of {result["subjects"]:,} subjects

`{result["command"]}` at {result["commit"]}, {result["machine"]}; Python {platform.python_version()},
Chromium {web["chromium"]}. Pictures of {result["side"]} x {result["side"]}; load average at the start {result["load"]}.

| build | seconds | processor seconds | peak memory, MiB | of a helper process, MiB |
|---|---|---|---|---|
| everything | {first["seconds"]} | {first["processor_s"]} | {first["peak_mib"]} | {first["peak_mib_of_a_helper"]} |
| nothing changed | {again["seconds"]} | {again["processor_s"]} | {again["peak_mib"]} | – |
| one subject changed | {one["seconds"]} | {one["processor_s"]} | {one["peak_mib"]} | – |

{size["files"]:,} files, {size["mb"]} MB ({size["mb_on_disk"]} MB on the disk); index.html {size["index_mb"]} MB.

| in Chromium | median ms of {web["turns"]} | slowest |
|---|---|---|
{rows}

The page keeps only the rows in sight in its document; the last line is what all {web["rows"]:,} rows cost: hence that.
Script memory: {web["script_heap_mib"]} MiB.
"""


def main() -> None:
    """Make the run, build thrice, browse, print, and write the results if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=500)
    parser.add_argument("--side", type=int, default=64, help="pixels of the pictures")
    parser.add_argument("--turns", type=int, default=5, help="fresh browsers")
    parser.add_argument("--work", type=Path, help="keep the run here; it is used again if it is there")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    from tests.kit.made_up_run import make_run

    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as temporary:
        run = (options.work or Path(temporary)) / f"run-{options.subjects}-{options.side}"
        if not run.exists():
            make_run(run, options.subjects, side=options.side, photos=4)
        script = Path(temporary) / "build.py"
        script.write_text(BUILD)
        shutil.rmtree(run / "report", ignore_errors=True)
        first, unchanged = build(run, script), build(run, script)
        next((run / "subjects").iterdir()).joinpath("record.json").touch()
        one = build(run, script)
        result = {
            "command": f"python benchmarks/report.py --subjects {options.subjects} --side {options.side} "
                       f"--turns {options.turns}",
            "commit": commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores shared with other work",
            "load": load, "subjects": options.subjects, "side": options.side,
            "first": first, "unchanged": unchanged, "one_changed": one, "size": sizes(run / "report"),
            "browser": browse(run / "report" / "index.html", options.turns),
        }  # fmt: skip
    print(markdown(result))
    if options.write:
        RESULTS.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
