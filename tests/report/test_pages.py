"""What a user copies from a page: commands that resume, load and export, whatever texts they are made of."""

import subprocess
from itertools import product

import pytest

from dbtrain.report.facts import Facts
from dbtrain.report.pages import View, about, resume, snippets
from dbtrain.results.card import python_snippet


def test_resume_command():
    facts = Facts("rex", {}, {}, {}, [], {})
    assert resume(View("runs/a b", ""), facts) == (
        "dbtrain train MANIFEST --subject rex --config 'runs/a b/subjects/rex/config.yaml' --out 'runs/a b'"
    )
    origin = {"verb": "train", "manifest": "p.csv", "config": "tiny", "overrides": ["train.steps=5", "a.b=[1, 2]"]}
    assert resume(View("out", "", origin=origin), facts) == (
        "dbtrain train p.csv --subject rex --config tiny --out out train.steps=5 'a.b=[1, 2]'"
    )
    assert resume(View("out", "", origin={**origin, "overrides": [], "skip_bad": True}), facts) == (
        "dbtrain train p.csv --subject rex --config tiny --out out --skip-bad"
    )


NASTY = [
    "a\ntouch PWNED\n",
    "a\rtouch PWNED\r",
    "'; touch PWNED; '",
    "$(touch PWNED)`touch PWNED`",
    "\u2028\x1b[2J\x00 | touch PWNED",
    '"; touch PWNED #',
    "a \\\ntouch PWNED",
    "run\n#'\ntouch PWNED",
]


def nasty_snippets(nasty):
    """Every text that a page offers for copying, each once, with a word of a foreign file in every field."""
    origin = {"manifest": nasty, "config": nasty, "out": nasty, "verb": nasty, "overrides": [nasty]}
    view = View(nasty.replace("\x00", ""), "", origin=origin)
    fields = dict.fromkeys(("class", "caption", "base", "identifier", "family"), nasty)
    for method, ledger in product(("lora", "full"), ({}, {"state": "quarantined", "reason": nasty, "class": nasty})):
        for made in snippets(view, Facts("rex", {**fields, "method": method}, ledger, {}, [], {})):
            yield made["title"], made["text"]


@pytest.mark.parametrize("nasty", NASTY)
def test_what_is_copied_into_a_shell_runs_nothing_else(tmp_path, nasty):
    """The snippets run by a real bash in which the commands do nothing; also without comments, as zsh at a keyboard."""
    for title, text in set(nasty_snippets(nasty)):
        if title == "diffusers":
            compile(text, "snippet", "exec")
            continue
        text = text.replace("\x00", "")  # no argument holds one
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0, (text, done.stderr)
        for option, words in (("-s", ["bash"]), ("-u", ["bash", "--norc", "-i"])):
            script = f"shopt {option} interactive_comments\ndbtrain() {{ :; }}\ncp() {{ :; }}\n{text}\n"
            subprocess.run(words, input=script, text=True, capture_output=True, check=False, cwd=tmp_path)
            assert not (tmp_path / "PWNED").exists(), (option, text)


@pytest.mark.parametrize("method, base, wanted", [
    ("lora", "embedded", "from_pretrained(BASE, safety_checker=None)"),
    ("lora", "some/hub", "DiffusionPipeline.from_pretrained('some/hub')"),
    ("lora", "base.safetensors", "StableDiffusionXLPipeline.from_single_file('base.safetensors')"),
    ("full", "base.safetensors", "DiffusionPipeline.from_pretrained('run/subjects/rex/model')"),
])  # fmt: skip
def test_the_card_and_the_report_show_one_way_to_load(method, base, wanted):
    record = {"method": method, "base": base, "family": "sdxl", "caption": "a photo of srx dog"}
    text = snippets(View("run", ""), Facts("rex", record, {}, {}, [], {}))[0]["text"]
    assert wanted in text and ("load_lora_weights('run/subjects/rex')" in text) == (method == "lora")
    assert text == python_snippet(record, "run/subjects/rex", "rex.png")


def test_stages_are_named_and_chained():
    stage = {"folder": "upscaler", "base": "some/x4", "family": "x4_upscaler", "method": "lora", "level": 3}
    record = {"base": "some/sd", "method": "lora", "caption": "a zq dog", "stages": [stage, 7]}
    facts = Facts("rex", record, {}, {}, [], {}, [])
    code = snippets(View("run", ""), facts)[0]["text"]
    compile(code, "snippet", "exec")
    assert "'run/subjects/rex/upscaler'" in code and "image=image, noise_level=3" in code
    assert ("Enlarged by", "some/x4 (upscaler/)") in about(facts, None)
    for odd in ("x", {"a": 1}, [{"folder": "'\n", "level": "1); exit("}]):
        strange = Facts("rex", {**record, "stages": odd}, {}, {}, [], {}, [])
        code = snippets(View("run", ""), strange)[0]["text"]
        compile(code, "snippet", "exec")
        assert "exit" not in code
