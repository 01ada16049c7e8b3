"""What a user copies from a page: commands that resume, load and export, whatever texts they are made of."""

import subprocess

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


@pytest.mark.parametrize("comments", [True, False], ids=["bash", "without comments, as zsh reads the keyboard"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("nasty", NASTY)
def test_what_is_copied_into_a_shell_runs_nothing_else(tmp_path, nasty, method, comments):
    """Every word of a foreign file in every field, the snippets run by a real bash in which the commands do nothing."""
    record = dict.fromkeys(("class", "caption", "base", "identifier", "family"), nasty) | {"method": method}
    origin = {"manifest": nasty, "config": nasty, "out": nasty, "verb": nasty, "overrides": [nasty]}
    run = nasty.replace("\x00", "")
    for ledger in ({}, {"state": "quarantined", "reason": nasty, "class": nasty}):
        for made in snippets(View(run, "", origin=origin), Facts("rex", record, ledger, {}, [], {})):
            if made["title"] == "diffusers":
                compile(made["text"], "snippet", "exec")
                continue
            script = f"shopt -{'s' if comments else 'u'} interactive_comments\ndbtrain() {{ :; }}\ncp() {{ :; }}\n"
            text = made["text"].replace("\x00", "")  # no argument holds one
            done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
            assert done.returncode == 0, (made, done.stderr)
            words = ["bash", "-i"] if not comments else ["bash"]
            subprocess.run(words, input=script + text + "\n", text=True, capture_output=True, check=False, cwd=tmp_path)
            assert not (tmp_path / "PWNED").exists(), made


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
