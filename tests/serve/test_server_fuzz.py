"""Requests that nobody would write: by the server's own OpenAPI (schemathesis), and broken in general (hypothesis)."""

import json
import subprocess
import sys
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psyche_jax.serve import protocol

pytest.importorskip("schemathesis", reason="schemathesis is absent: pip install schemathesis")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [*protocol.ChatRequest.model_fields, "frobnicate"]


@pytest.mark.slow
def test_schemathesis_finds_nothing(server, tmp_path):
    before = server.resident_mib
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.address}/openapi.json"]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ["--checks", checks, "--max-examples", "60", "--request-timeout", "30", "--seed", "1", "--no-color"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert server.resident_mib - before < 400
    assert "Traceback" not in server.log


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6), st.booleans())
def test_strange_values_are_answered(server, changes, sensible):
    base = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 2} if sensible else {}
    body = json.dumps({**base, **changes}).encode("utf-8", errors="surrogatepass")
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.address}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert answer.status_code in (200, 400, 404)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200),
    st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]),
    st.text(st.characters(codec="utf-8"), max_size=30),
)
def test_any_bytes_to_any_address_are_answered(server, body, method, path):
    url = f"{server.address}/{quote(path)}"
    headers = {"content-type": "application/json"}
    answer = httpx.request(method, url, content=body, headers=headers, timeout=30)
    assert answer.status_code < 500


HEADERS = ["origin", "host", "authorization", "content-type", "content-encoding", "expect", "referer", "cookie"]
VALUES = st.sampled_from(["http://[", "//", "null", "Bearer", "gzip", "*/*; q=", "::1", "[::1", "a:b:c"])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(HEADERS), VALUES | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
    ),
    st.sampled_from(["/", "/v1/models", "/v1/chat/completions"]),
)
def test_any_headers_are_answered(server, changes, path):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}], "max_tokens": 1}
    headers = {name: value.strip() for name, value in changes.items()}
    answer = httpx.request(
        "GET" if path != "/v1/chat/completions" else "POST",
        server.address + path,
        json=body,
        headers=headers,
        timeout=30,
    )
    assert answer.status_code < 500
