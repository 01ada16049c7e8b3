"""The report in a real browser: sorting, filtering, lazy pictures, keyboard, colours, print, live pages."""

import json
import re

import pytest

from dbtrain.report import rebuild
from tests.kit.made_up_run import CLASSES, make_run

ORDER = "[...document.querySelectorAll('#body a')].map((link) => link.textContent)"
BRIGHTNESS = "getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => +a + +b)"


def entries(report):
    """The rows that the report was made from, by subject."""
    state = json.loads((report / ".state.json").read_text())["subjects"]
    return {name: entry["row"] for name, entry in state.items()}


def shown(page, count=None):
    """Subjects in the table in order, the first `count` of them."""
    return page.evaluate(ORDER)[:count]


def test_pages_open_without_a_complaint_and_read_only_themselves(report, visit):
    seen = visit()
    for path in (report / "index.html", report / "subjects" / "dog-00012" / "index.html"):
        seen.open(path)
        seen.page.wait_for_load_state("networkidle")
    assert (seen.said, seen.outside(report)) == ([], [])
    assert len(seen.requests) > 10


def test_a_column_sorts_both_ways_and_unknown_values_stand_last(report, visit):
    page = (seen := visit()).page
    seen.open(report / "index.html")
    rows = entries(report)
    known = sorted((row["dino"], name) for name, row in rows.items() if row["dino"] is not None)
    page.click("th[data-name=dino] button")
    assert page.get_attribute("th[data-name=dino]", "aria-sort") == "ascending"
    assert shown(page, 20) == [name for _, name in known[:20]]
    page.click("th[data-name=dino] button")
    assert page.get_attribute("th[data-name=dino]", "aria-sort") == "descending"
    assert shown(page, 20) == [name for _, name in known[::-1][:20]]
    assert page.locator("th[aria-sort]").count() == 1
    page.evaluate("document.getElementById('scroll').scrollTop = 1e6")
    seen.until("document.querySelector('#body').lastChild.textContent.includes('dog-00000')")
    assert shown(page)[-2:] == ["cat-00001", "dog-00000"]


@pytest.mark.parametrize(
    "words, holds",
    [
        ("teapot", lambda row: row["class"] == "teapot"),
        ("TEAPOT 0", lambda row: row["class"] == "teapot" and "0" in row["id"]),
        ("dino<0.6", lambda row: row["dino"] is not None and row["dino"] < 0.6),
        ("clip-i>=0.8 dog", lambda row: row["clip_i"] is not None and row["clip_i"] >= 0.8 and row["class"] == "dog"),
        ("loss<5e-1", lambda row: row["loss"] < 0.5),
        ("attempts>.5E0", lambda row: False),  # no run without a ledger counts them
        ("seconds>=+2.5e+1", lambda row: row["seconds"] >= 25),
        ("nothing-like-this", lambda row: False),
    ],
)
def test_words_and_comparisons_filter(report, visit, words, holds):
    page = (seen := visit()).page
    seen.open(report / "index.html")
    page.fill("#find", words)
    wanted = sorted(name for name, row in entries(report).items() if holds(row))
    seen.until(f"document.getElementById('status').textContent.startsWith('{len(wanted)} of 60')")
    page.keyboard.press("Enter")
    assert sorted(shown(page)) == wanted[: len(shown(page))]
    assert page.url.split("#")[0] == (report / "index.html").as_uri()


def test_menus_filter_and_the_address_keeps_it_all(report, visit):
    page = (seen := visit()).page
    seen.open(report / "index.html")
    page.select_option("#class", "vase")
    page.check("#warned")
    page.click("th[data-name=loss] button")
    rows = [row for row in entries(report).values() if row["class"] == "vase" and row["warnings"]]
    wanted = [row["id"] for row in sorted(rows, key=lambda row: row["loss"])]
    assert shown(page) == wanted
    page.reload()
    assert shown(page) == wanted
    assert page.input_value("#class") == "vase" and page.is_checked("#warned")


def test_jumps_within_the_page_keep_what_the_table_was_asked_for(report, visit):
    page = (seen := visit()).page
    seen.open(report / "index.html", "#q=dog&sort=-loss")
    for name in ("extremes", "summary", "recipe", "subjects"):
        page.click(f".bar nav a[href='#{name}']")
        assert page.evaluate("document.activeElement.id") == name
        seen.until(f"Math.abs(document.getElementById('{name}').getBoundingClientRect().top) < innerHeight")
        assert page.url.endswith("#q=dog&sort=-loss")
    before = shown(page)
    page.reload()
    assert shown(page) == before and page.input_value("#find") == "dog"


def test_the_keyboard_alone_sorts_walks_opens_and_comes_back(report, visit):
    page = (seen := visit()).page
    seen.open(report / "index.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("th[data-name=seconds] button")
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    rows = entries(report)
    slowest = sorted(rows, key=lambda name: -rows[name]["seconds"])
    page.focus("#scroll")
    for _ in range(40):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == slowest[39]
    assert page.evaluate("document.activeElement.closest('tr').getAttribute('aria-rowindex')") == "41"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == slowest[-1]
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1")
    assert page.inner_text("h1").startswith(slowest[0])
    page.go_back()
    page.wait_for_selector("#body a")
    assert shown(page, 5) == slowest[:5]
    assert seen.said == []


def test_only_rows_in_sight_are_in_the_document(report, visit):
    page = (seen := visit()).page
    seen.open(report / "index.html")
    assert len(shown(page)) < 60
    assert page.get_attribute("#table", "aria-rowcount") == "61"


def test_gallery_pictures_load_when_they_come_into_sight(report, visit):
    page = (seen := visit(viewport={"width": 700, "height": 500})).page
    seen.open(report / "index.html", "#view=gallery")
    page.wait_for_load_state("networkidle")
    early = {url for url in seen.requests if url.endswith(".jpg")}
    named = page.locator("#gallery img").count()
    assert page.locator("#gallery img:not([loading=lazy])").count() == 0
    assert named > 0 and len(early) < 2 * 60
    while page.is_visible("#more"):
        page.locator("#more").scroll_into_view_if_needed()
        page.wait_for_timeout(50)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_load_state("networkidle")
    assert page.locator("#gallery .card").count() == 60
    assert {url for url in seen.requests if url.endswith(".jpg")} > early
    page.click("#gallery .card a >> nth=0")
    page.wait_for_selector("#samples")


def test_a_subject_shows_photos_beside_samples_by_step(report, visit):
    page = (seen := visit()).page
    seen.open(report / "subjects" / "dog-00012" / "index.html")
    page.wait_for_load_state("networkidle")
    page.evaluate("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
    seen.until("[...document.images].every((image) => image.complete)")
    assert page.evaluate("[...document.images].every((image) => image.naturalWidth === 64)")
    assert page.locator("section:has(#photos) img").count() == 3
    film = page.locator(".film").first
    assert film.locator("thead th").all_inner_texts()[1:] == ["step 100", "step 200", "finished"]
    assert film.locator("tbody th").all_inner_texts() == ["seed 0", "seed 1"]
    assert film.locator("img").count() == 6
    assert page.locator(".beside figure").count() == 2
    assert [cell.strip()[:4] for cell in page.locator(".scores tbody th").all_inner_texts()][:2] == ["DINO", "CLIP"]
    assert page.locator("path.line").count() == 3
    assert "same as the run's" in page.inner_text("section:has(#differs)")
    page.click("#back")
    page.wait_for_selector("#body a")


def test_snippets_are_copied(report, visit):
    seen = visit(permissions=["clipboard-read", "clipboard-write"])
    seen.open(report / "subjects" / "dog-00012" / "index.html")
    code = seen.page.locator(".snippet code").first.text_content()
    seen.page.locator(".copy").first.click()
    seen.until("document.querySelector('.copy').textContent !== 'Copy'")
    assert "load_lora_weights" in code and seen.page.locator(".copy").first.inner_text() == "Copied"
    assert seen.page.evaluate("navigator.clipboard.readText()") == code


def test_where_copying_is_refused_the_snippet_is_selected(report, visit):
    seen = visit(permissions=[])
    seen.open(report / "subjects" / "dog-00012" / "index.html")
    code = seen.page.locator(".snippet code").first.text_content()
    seen.page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    seen.page.locator(".copy").first.click()
    seen.until("document.querySelector('.copy').textContent === 'Selected'")
    assert seen.page.evaluate("getSelection().toString()") == code


def test_dark_and_light_follow_the_system_until_the_reader_chooses(report, visit):
    for scheme, dark in (("dark", True), ("light", False)):
        page = (seen := visit(color_scheme=scheme)).page
        seen.open(report / "index.html")
        assert (page.evaluate(BRIGHTNESS) < 300) == dark
        page.click("#theme")
        assert (page.evaluate(BRIGHTNESS) < 300) != dark
        seen.open(report / "subjects" / "dog-00012" / "index.html")
        assert (page.evaluate(BRIGHTNESS) < 300) != dark


CONTRASTS = """() => {
  const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const paper = light(rgb(getComputedStyle(document.body).backgroundColor));
  return [...document.querySelectorAll('main *, .bar *, footer *')]
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && e.checkVisibility()
      && !e.closest('[aria-pressed], svg, .alert, .unseen, .skip, option, select'))
    .map((e) => { const ink = light(rgb(getComputedStyle(e).color));
      return [(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), e.tagName + '.' + e.className]; })
    .filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_the_contrast_that_wcag_asks_for(report, visit, scheme):
    seen = visit(color_scheme=scheme)
    for path in (report / "index.html", report / "subjects" / "dog-00012" / "index.html"):
        seen.open(path)
        assert seen.page.evaluate(CONTRASTS) == []


NAMELESS = """() =>
  [...document.querySelectorAll('button, a, input, select, img, svg[role=img], [role=region], section')]
  .filter((e) => e.checkVisibility() && !(e.textContent.trim() || e.getAttribute('aria-label') || e.alt
    || e.querySelector('img')?.alt || e.labels?.length || e.getAttribute('aria-labelledby')))
  .map((e) => e.outerHTML.slice(0, 120))"""


def test_everything_has_a_name_for_those_who_listen(report, visit):
    page = (seen := visit()).page
    for path in (report / "index.html", report / "subjects" / "dog-00012" / "index.html"):
        seen.open(path)
        assert page.evaluate(NAMELESS) == []
        assert page.locator("h1").count() == 1
        assert page.locator("table th:not([scope])").count() == 0
        assert page.locator("html[lang=en], main, header, footer").count() == 4
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("view", ["table", "gallery"])
def test_a_phone_does_not_scroll_sideways(report, visit, view):
    page = (seen := visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)).page
    for path in (report / "index.html", report / "subjects" / "dog-00012" / "index.html"):
        seen.open(path, f"#view={view}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_print_shows_every_subject_and_none_of_the_tools(report, visit):
    page = (seen := visit()).page
    seen.open(report / "index.html")
    before = len(shown(page))
    page.evaluate(
        "addEventListener('beforeprint', () => { window.printed = document.querySelectorAll('#body a').length; })"
    )
    pages = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4")))
    assert page.evaluate("window.printed") == 60 and before < 60
    assert 3 <= pages <= 12
    page.emulate_media(media="print")
    assert not page.is_visible("#tools") and not page.is_visible(".bar nav")
    assert page.evaluate(BRIGHTNESS) == 3 * 255


def test_print_of_the_gallery_shows_every_subject_with_its_pictures(report, visit):
    page = (seen := visit(viewport={"width": 700, "height": 400})).page
    seen.open(report / "index.html", "#view=gallery&sort=-loss")
    page.evaluate("""() => { addEventListener('beforeprint', () => {
      const images = [...document.querySelectorAll('#gallery img')];
      window.printed = [document.querySelectorAll('#gallery .card').length, images.length,
        images.filter((image) => image.loading === 'lazy').length]; }); }""")
    page.pdf(format="A4")
    assert page.evaluate("window.printed") == [60, 120, 0]


@pytest.mark.parametrize("place", ["th[data-name=loss] button", "#body a >> nth=2", "#live"])
def test_a_page_that_loads_itself_again_keeps_focus_and_place(tmp_path, visit, place):
    run = make_run(tmp_path / "run", 30, pool=4)
    page = (seen := visit(viewport={"width": 900, "height": 500})).page
    seen.open(rebuild(run, refresh_s=1).index)
    page.locator(place).evaluate("(each) => each.focus({ preventScroll: true })")
    focused = "document.activeElement.outerHTML"
    before = page.evaluate(focused)
    page.evaluate("scrollTo({ top: 300, behavior: 'instant' }); window.old = true")
    page.wait_for_timeout(100)
    seen.until("!window.old && document.readyState === 'complete'")
    assert page.evaluate(focused) == before
    assert page.evaluate("scrollY") == 300  # at once: nothing glides there


def test_an_ongoing_run_shows_news_by_itself_until_it_is_paused(tmp_path, visit):
    run = make_run(tmp_path / "run", 4, pool=4)
    page = (seen := visit()).page
    index = rebuild(run, refresh_s=1).index
    seen.open(index, "#sort=-loss&q=o")
    make_run(tmp_path / "more", 7, pool=4)
    (tmp_path / "more" / "subjects" / f"{CLASSES[6]}-00006").rename(run / "subjects" / "news")
    built = rebuild(run, refresh_s=1)
    assert (built.made, built.kept) == (1, 4)
    seen.until("document.querySelector('.lead').textContent.includes('5 subjects')")
    assert page.input_value("#find") == "o"
    page.click("#live")
    page.evaluate("window.stays = true")
    page.wait_for_timeout(1500)
    assert page.evaluate("window.stays") and page.inner_text("#live") == "Paused"
    assert seen.outside(index.parent) == [] and seen.said == []
    rebuild(run)
    seen.open(index)
    assert page.locator("#live, noscript meta").count() == 0
