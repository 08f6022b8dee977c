"""Settings of who may call: a section within a section, and what does not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from treadle.config import field_docs, load_settings, origin_of_each_value
from treadle.errors import ConfigError


def test_a_nested_section_comes_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "treadle.toml"
    file.write_text(
        """
        [auth]
        methods = ["keys", "modelscope"]
        [auth.modelscope]
        organization = "from-the-file"
        timeout_s = 2.0
        """
    )
    monkeypatch.setenv("TREADLE_AUTH__MODELSCOPE__ORGANIZATION", "from-the-environment")
    settings = load_settings(file, {"auth.modelscope.max_calls": 3})

    auth = settings.auth
    assert (auth.methods, auth.jwt) == (("keys", "modelscope"), True)
    found = auth.modelscope
    assert (found.organization, found.timeout_s, found.max_calls) == ("from-the-environment", 2.0, 3)
    origins = {origin.key: origin for origin in origin_of_each_value(file)}
    assert origins["auth.modelscope.timeout_s"].source == f"file {file}: auth.modelscope.timeout_s"
    assert origins["auth.modelscope.verdict_age_s"].source == "default"
    assert origins["auth.methods"].shown == "keys, modelscope"


def test_every_setting_of_a_nested_section_is_documented() -> None:
    docs = {doc.key: doc for doc in field_docs()}
    assert docs["auth.modelscope.endpoint"].variable == "TREADLE_AUTH__MODELSCOPE__ENDPOINT"
    assert docs["auth.methods"].type_text == "list of any of open, keys, modelscope"
    assert all(doc.text for doc in docs.values())


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MODELSCOPE__ORGANISATION": "x"}, "MODELSCOPE__ORGANISATION: unknown setting; did you mean 'organization'"),
        ({"MODELSCOPE": "x"}, "is a section|JSON|mapping|unknown"),
        ({"MODE": "keys"}, "methods"),
        ({"METHODS": '["keys", "keys"]'}, "twice"),
        ({"METHODS": '["passwords"]'}, "'open', 'keys' or 'modelscope'"),
        ({"METHODS": '["modelscope"]'}, r"auth\.modelscope\.organization"),
        ({"METHODS": '["open"]', "BOOTSTRAP_KEY_FILE": "/run/key"}, "methods has no keys"),
        ({"MODELSCOPE__TOKEN_PATTERN": "("}, "TOKEN_PATTERN: .* not a regular expression"),
        ({"MODELSCOPE__JOIN_URL": "https://x/{org}"}, "no other braces"),
        ({"MODELSCOPE__MEMBERSHIP_PATH": "/x/{"}, "no other braces"),
        ({"MODELSCOPE__ENDPOINT": "www.modelscope.cn"}, "ENDPOINT"),
        ({"MODELSCOPE__TIMEOUT_S": "99"}, "TIMEOUT_S: .*less than or equal to 30"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"TREADLE_AUTH__{name}", value)
    with pytest.raises(ConfigError, match=words):
        load_settings()
