from __future__ import annotations

from pathlib import Path

from evergreen.release.deploy import server_client


def test_client_brings_the_first_word_of_the_token_file(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret of today\n")
    with_token, without = server_client("http://model", token), server_client("http://model")
    assert with_token is not None and with_token.headers["Authorization"] == "Bearer secret"
    assert without is not None and "Authorization" not in without.headers


def test_no_url_is_no_server() -> None:
    assert server_client("") is None
