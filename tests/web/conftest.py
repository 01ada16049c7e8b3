"""A real headless Chromium, driven by Playwright: found on the machine, never downloaded by a test.

Any of these will do: $CHROMIUM, a browser on PATH (Debian: `apt-get install chromium-headless-shell`), or Playwright's
own (`playwright install --only-shell chromium`). Without one the tests are skipped, and say so.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SKIP = (
    "needs a Chromium: `apt-get install chromium-headless-shell`, or `playwright install --only-shell chromium`, "
    "or CHROMIUM=/path/to/one"
)


def executable(own: str) -> str | None:
    """The browser to drive; `own` is where Playwright would have put its own."""
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES), own if Path(own).exists() else None]
    return next(filter(None, found), None)


@pytest.fixture(scope="module")
def browser():
    """A browser of this module's own: Playwright's event loop must not outlive it, for other tests start theirs."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the `test` extra)")
    with playwright.sync_playwright() as driver:
        path = executable(driver.chromium.executable_path)
        if path is None:
            pytest.skip(SKIP)
        running = driver.chromium.launch(executable_path=path)
        yield running
        running.close()


class Visit:
    """A page and everything it did that a report must not do."""

    def __init__(self, context):
        self.page = context.new_page()
        self.said, self.requests = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path, fragment: str = "") -> None:
        self.page.goto(path.as_uri() + fragment)

    def until(self, expression: str) -> None:
        """Wait for an expression to hold; Playwright's own way would need the eval that the page's policy forbids."""
        from playwright.sync_api import Error

        for _ in range(400):
            with suppress(Error):  # the page was just loading itself again
                if self.page.evaluate(expression):
                    return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never true: {expression}")

    def outside(self, report: Path) -> list[str]:
        """Requests for anything but files of the report."""
        return [url for url in self.requests if not url.startswith(report.resolve().as_uri() + "/")]


@pytest.fixture
def visit(browser):
    """A function that opens a fresh page; options are those of a browser context, such as color_scheme."""
    contexts = []

    def start(**options) -> Visit:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        contexts[-1].set_default_timeout(20_000)
        return Visit(contexts[-1])

    yield start
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """The report folder of a made-up run of 60 subjects with photos, samples by step and scores; read only."""
    from dbtrain.report import build
    from tests.kit.made_up_run import make_run

    run = tmp_path_factory.mktemp("web") / "run"
    make_run(run, 60, sheets=("step-000100", "step-000200", "samples"), photos=3, pool=40)
    for gone in ("dog-00000", "cat-00001"):  # subjects that nobody scored sort last
        (run / "subjects" / gone / "evaluation.json").unlink()
    return build(run).parent
