"""Hostile text in every field, in a real browser: nothing runs, nothing is asked for, everything is shown as text."""

import json
import shutil

import pytest

from dbtrain.report import build
from tests.kit.made_up_run import make_run, picture

MARK = "window.pwned=1"
PAYLOADS = [
    f"<script>{MARK}</script>",
    f"</script><script>{MARK}</script>",
    f"<img src=x onerror={MARK}>",
    f'"><img src=x onerror={MARK}>',
    f"'><svg/onload={MARK}>",
    f"<svg><script>{MARK}</script></svg>",
    f"<svg><animate onbegin={MARK} attributeName=x dur=1s>",
    f"<body onload={MARK}>",
    f"<iframe srcdoc='<script>parent.{MARK[7:]}</script>'></iframe>",
    "<iframe src=http://127.0.0.1:9/></iframe>",
    "<link rel=stylesheet href=http://127.0.0.1:9/x.css>",
    "<style>*{background:url(http://127.0.0.1:9/x)}</style>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<base href=http://127.0.0.1:9/>",
    f"<form action=http://127.0.0.1:9/><button autofocus onfocus={MARK}>x</button></form>",
    f"<a href=javascript:{MARK}>x</a>",
    f"javascript:{MARK}",
    f"data:text/html,<script>{MARK}</script>",
    f'" autofocus onfocus="{MARK}',
    f"' onmouseover='{MARK}",
    f"</title><script>{MARK}</script>",
    f"</textarea></style></noscript><script>{MARK}</script>",
    f"--><script>{MARK}</script><!--",
    f"]]><script>{MARK}</script>",
    f"<details open ontoggle={MARK}>",
    f"<video><source onerror={MARK}></video>",
    f"<object data=javascript:{MARK}></object><embed src=http://127.0.0.1:9/>",
    f"<math><mi xlink:href=data:x,{MARK}>",
    "{{ 7*7 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "${alert(1)}`${fetch('http://127.0.0.1:9/')}`",
    f"&lt;script&gt;{MARK}&lt;/script&gt;",
    f"\\u003cscript\\u003e{MARK}\\u003c/script\\u003e",
    f"\u2028{MARK}\u2029//",
    f"\0<script\0>{MARK}</script>",
    f"<ſcript>{MARK}</ſcript>＜script＞{MARK}＜/script＞",
    f"\ud800<script>{MARK}</script>",
    f"\u202e<script>{MARK}</script>",
    f"__proto__ constructor <template><script>{MARK}</script></template>",
    f"\x1b[31m\r\n<script>{MARK}</script>\r\n",
    f"../../../../etc/passwd?<script>{MARK}</script>#",
]


def poison(value, payload):
    """A JSON value with the payload for every text in it, and for a new name beside its names."""
    if isinstance(value, dict):
        return {**{key: poison(each, payload) for key, each in value.items()}, payload: payload}
    if isinstance(value, list):
        return [poison(each, payload) for each in value]
    return payload if isinstance(value, str) else value


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """The report of a run in which each subject has one payload in all of its texts, and the folder has a bad name."""
    folder = tmp_path_factory.mktemp("safety") / "run <img src=x onerror=window.pwned=1>"
    make_run(folder, len(PAYLOADS), pool=4)
    rows = {}
    for number, (place, payload) in enumerate(zip(sorted((folder / "subjects").iterdir()), PAYLOADS, strict=True)):
        for name in ("record.json", "evaluation.json"):
            content = json.loads((place / name).read_text())
            kept = {key: content[key] for key in ("stages_s", "steps", "finished") if key in content and number % 2}
            (place / name).write_text(json.dumps({**poison(content, payload), **kept}))
        warned = json.loads((place / "evaluation.json").read_text())
        warned["warnings"] = [{"kind": payload, "text": payload}]
        strange = "".join(letter for letter in payload if letter.isprintable() and letter != "/")[:60] + ".png"
        (place / "evaluation" / strange).write_bytes(picture(number))
        warned["images"] = [
            {"file": f"evaluation/{strange}", "prompt": payload, "seed": payload, "row": row}
            for row in ("tuned", "base", payload)
        ] + [{"file": payload, "prompt": f"{payload} 2", "seed": 0, "row": "tuned"}]
        (place / "evaluation.json").write_text(json.dumps(warned))
        config = {"train": {"lr": payload}, "sample": {"prompts": [payload, payload]}, "seed": payload}
        (place / "config.yaml").write_text(json.dumps(config))
        lines = [{"step": step, "loss": 0.5 / step, payload: payload, "note": payload} for step in (1, 2, 3)]
        (place / "log.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + payload.encode("utf-8", "replace").decode()
        )
        told = dict.fromkeys(("class", "reason", "cause", "worker", "after"), payload)
        state = payload if number % 3 == 0 else "quarantined"
        counted = {"attempts": 2, "seconds": 3.0, "gpu_seconds": 2.0, "stages_s": {payload: 1.0}}
        rows[place.name] = {"subject": place.name, "state": state, "finished": payload, **counted, **told}
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    totals = {"scores": {"dino": score, PAYLOADS[0]: score}, "base": {}, "real": PAYLOADS[2]}
    (folder / "evaluation.json").write_text(json.dumps({"macro": totals, "warnings": dict.fromkeys(PAYLOADS, 1)}))
    origin = dict.fromkeys(("manifest", "config", "out", "verb"), PAYLOADS[3])
    (folder / "run.json").write_text(json.dumps({**origin, "overrides": PAYLOADS}))
    (folder / "shards").mkdir()
    (folder / "shards" / "index.jsonl").write_text(PAYLOADS[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dbtrain.report.building.read_ledger", lambda run: (rows, dict.fromkeys(PAYLOADS, 3)))
        return build(folder).parent


INTRUDERS = """() => {
  const tags = new Set('IFRAME OBJECT EMBED BASE STYLE VIDEO MATH TEMPLATE ANIMATE'.split(' '));
  const bad = (a) => /^on/i.test(a.name)
    || /href|src|action/.test(a.name) && /^(javascript|data|https?):/i.test(a.value.trim());
  return [...document.querySelectorAll('*')].filter((e) => tags.has(e.tagName.toUpperCase())
    || [...e.attributes].some(bad)
    || e.tagName === 'SCRIPT' && !(e.getAttribute('src') ?? '').endsWith('report.js') && e.type !== 'application/json'
    || e.tagName === 'FORM' && e.id !== 'tools' || e.tagName === 'META' && e.httpEquiv === 'refresh')
    .map((e) => e.outerHTML.slice(0, 200));
}"""


def check(seen, report):
    """Nothing ran, came in, was asked for or complained."""
    page = seen.page
    assert page.evaluate("window.pwned ?? null") is None
    assert page.evaluate(INTRUDERS) == []
    assert seen.outside(report) == []
    assert seen.said == []


def test_at_least_thirty_payloads():
    assert len(set(PAYLOADS)) >= 30


def test_the_run_page_shows_hostile_text_as_text(poisoned, visit):
    page = (seen := visit()).page
    for fragment in ("", "#view=gallery", f"#q={'%3Cscript%3E'}", f"#sort={PAYLOADS[0]}&class={PAYLOADS[2]}&state=x"):
        seen.open(poisoned / "index.html", fragment)
        page.wait_for_timeout(100)
        check(seen, poisoned)
    assert page.inner_text("h1") == "run <img src=x onerror=window.pwned=1>"
    seen.open(poisoned / "index.html")
    for _ in range(3):
        page.fill("#find", PAYLOADS[0])
        page.fill("#find", "")
    for name in page.evaluate("[...document.querySelectorAll('#head th')].map((cell) => cell.dataset.name)"):
        page.click(f"th[data-name={name}] button")
    for number in range(page.locator("#class option").count()):
        page.select_option("#class", index=number)
    page.hover("#body tr >> nth=0")
    check(seen, poisoned)
    causes = page.locator("table:has(caption:text('Retries')) th[scope=row]").all_text_contents()
    assert PAYLOADS[0] in causes and PAYLOADS[28] in causes


@pytest.mark.parametrize("part", range(4))
def test_subject_pages_show_hostile_text_as_text(poisoned, visit, part):
    seen = visit()
    places = sorted((poisoned / "subjects").iterdir())
    for place, payload in list(zip(places, PAYLOADS, strict=True))[part::4]:
        seen.open(place / "index.html")
        check(seen, poisoned)
        words = seen.page.evaluate("document.querySelector('main').textContent")
        plain = payload.replace("\0", "").replace("\ud800", "?").replace("\r\n", "\n")
        assert words.count(plain) >= 5, payload
    assert seen.page.locator(".alert").count() == 2


def test_the_policy_stops_what_escaping_would_let_through(report, tmp_path, visit):
    """The policy alone: pages into which markup did get run none of it and get none of what it asks for.

    A refresh to another address is left out: no policy of a page governs where it goes, only escaping does.
    """
    copy = tmp_path / "report"
    shutil.copytree(report, copy)
    top = (copy / "index.html").read_bytes().partition(b"<main")[0]
    extra = [
        "<img src=http://127.0.0.1:9/x.png>",
        "<script src=http://127.0.0.1:9/x.js></script>",
        "<p style='color:red'>p",
    ]
    got = []
    page = (seen := visit()).page
    page.on("requestfinished", lambda request: got.append(request.url))
    for payload in [*PAYLOADS, *extra]:
        if "refresh" not in payload:
            (copy / "index.html").write_bytes(top + payload.encode("utf-8", "replace"))
            seen.open(copy / "index.html")
            assert page.evaluate("window.pwned ?? null") is None, payload
    assert page.evaluate("getComputedStyle(document.querySelector('[style]')).color") != "rgb(255, 0, 0)"
    assert [url for url in got if not url.startswith((copy.as_uri(), "about:"))] == []
    assert len([line for line in seen.said if "Content Security Policy" in line]) >= 20


def test_without_the_policy_the_payloads_do_run(report, tmp_path, visit):
    """The test above means something: the same pages without their policy are taken over."""
    copy = tmp_path / "report"
    shutil.copytree(report, copy)
    top = (copy / "index.html").read_bytes().partition(b"<main")[0].replace(b"Content-Security-Policy", b"nothing")
    page = (seen := visit()).page
    ran = 0
    for payload in PAYLOADS[:9]:
        (copy / "index.html").write_bytes(top + payload.encode())
        seen.open(copy / "index.html")
        page.wait_for_timeout(50)
        ran += page.evaluate("window.pwned ?? null") is not None
    assert ran >= 6
