"""What counts as a secret, and what does not: real forms of tokens, and settings that only look like them."""

import pytest

from dbtrain.errors import ConfigError
from dbtrain_launchers.exposure import secret_words
from dbtrain_launchers.plan import make_plan

TOKENS = [
    "hf_" + "aB3" * 11,
    "ghp_" + "aB3" * 12,
    "github_pat_" + "aB3" * 12,
    "glpat-" + "aB3" * 7,
    "sk-proj-" + "aB3" * 12,
    "AKIA" + "AB3D" * 4,
    "AIza" + "aB3" * 12,
    "xoxb-123456789012-abc",
    "eyJ" + "hbGciOiJ" * 3 + ".eyJzdWIiOiIx." + "SflKxwRJ",
    "-----BEGIN RSA PRIVATE KEY-----\nMII",
    "https://me:pa55word@example.org/x",
    "s3://id:secretvalue@bucket/x",
]
NAMES = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PASSWD", "RAY_AUTH_TOKEN", "apikey",
         "GOOGLE_APPLICATION_CREDENTIALS", "RAY_AUTH_TOKEN_PATH"]  # fmt: skip
HARMLESS = [
    "train.lr=1e-3",
    "model.revision=" + "0123456789abcdef0123456789abcdef01234567",
    "s3://bucket/photos@2x/a:b",
    "http://head:8265",
    'sample.prompts=["a photo of {subject}"]',
    "identifier.tokens=1",
    "/data/risk-assessment-2026-photos-of-dogs",
]


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_refused_in_words_and_variables_and_not_repeated(token):
    for words, env in ((["train", token], []), (["train", f"a.b={token}"], []), (["train"], [f"PLAIN={token}"])):
        with pytest.raises(ConfigError, match="secret") as error:
            make_plan(words, env)
        assert token not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_telling_names_are_refused_as_variables(name):
    with pytest.raises(ConfigError, match="secret"):
        make_plan(["train"], [f"{name}=x"])


def test_opaque_values_are_refused_as_variables_only():
    opaque = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(ConfigError, match="secret"):
        make_plan(["train"], [f"PLAIN={opaque}"])
    assert make_plan(["train", opaque]).words[1] == opaque


@pytest.mark.parametrize("word", HARMLESS)
def test_settings_are_not_secrets(word):
    assert secret_words([word]) == []


@pytest.mark.parametrize("entry", ["TOKENIZERS_PARALLELISM=false", "NCCL_DEBUG=INFO", "OMP_NUM_THREADS=8", "EMPTY="])
def test_ordinary_variables_pass(entry):
    assert make_plan(["train"], [entry]).env == dict([entry.split("=", 1)])
