"""The preflight sheet in a real browser: hostile text is text, nothing is asked for, and the sheet has its look."""

import pytest

from dbtrain.report.photo_sheet import write_sheet
from dbtrain.settings.config import RunConfig
from dbtrain.subjects.finding import Finding
from dbtrain.values import Subject
from tests.kit.made_photos import mask_of, picture, png
from tests.web.test_safety import PAYLOADS

INTRUDERS = """() => [...document.querySelectorAll('*')].filter((e) =>
  !'HTML HEAD BODY META TITLE STYLE A HEADER MAIN FOOTER P H1 H2 SMALL SECTION UL LI IMG SPAN B CODE'.split(' ')
    .includes(e.tagName.toUpperCase())
  || [...e.attributes].some((a) => /^on|^style$/i.test(a.name)
    || /href|src|action/.test(a.name) && !/^(#|data:image\\/jpeg;base64,)/.test(a.value))
  || e.tagName === 'META' && e.httpEquiv === 'refresh').map((e) => e.outerHTML.slice(0, 200))"""


@pytest.fixture
def sheet(tmp_path):
    """The sheet of subjects with one payload in all of their texts."""
    subjects, findings = [], []
    for number, payload in enumerate(PAYLOADS):
        name = "".join(letter for letter in payload if letter.isprintable() and letter != "/")[:60]
        (tmp_path / f"{name}.png").write_bytes(png(picture(seed=number)))
        (tmp_path / f"{name}-mask.png").write_bytes(png(mask_of()))
        photos = (tmp_path / f"{name}.png", tmp_path / f"{name} gone.png")
        subjects.append(Subject(f"s{number}", payload, photos, caption=payload, identifier=payload))
        findings += [Finding(f"s{number}", str(photos[0]), payload, payload), Finding("", payload, payload, payload)]
    write_sheet(tmp_path / "sheet.html", subjects, findings, RunConfig())
    return tmp_path / "sheet.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_sheet_shows_hostile_text_as_text_and_reads_nothing_but_itself(sheet, visit, scheme):
    seen = visit(color_scheme=scheme)
    seen.open(sheet)
    page = seen.page
    page.wait_for_load_state("networkidle")
    assert page.evaluate("window.pwned ?? null") is None and page.evaluate(INTRUDERS) == []
    asked = [url for url in seen.requests if not url.startswith("data:image/jpeg")]
    assert (asked, seen.said) == ([sheet.as_uri()], [])
    assert page.locator("img").count() == page.locator(".missing").count() == len(PAYLOADS)
    words = page.evaluate("document.querySelector('main').textContent")
    assert all(words.count(payload.replace("\0", "").replace("\ud800", "?").replace("\r\n", "\n")) >= 5
               for payload in PAYLOADS)  # fmt: skip


def test_the_policy_lets_the_sheets_own_style_in_and_no_other(sheet, visit):
    seen = visit()
    seen.open(sheet)
    size = "getComputedStyle(document.querySelector('.photos img')).width"
    assert seen.page.evaluate(size) == "192px"
    page = sheet.read_text()
    sheet.write_text(page.replace("</head>", "<style>.photos img { width: 7px !important }</style></head>"))
    seen.open(sheet)
    assert seen.page.evaluate(size) == "192px" and "Content Security Policy" in seen.said[0]
