"""/start_profile and /stop_profile: there only when asked for, and a trace on disk."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from mmv1.config import DeviceConfig
from mmv1.errors import RequestError
from tests.api.fake_llm import FakeLLM, client_of, make_model_dir
from tests.cli.command import mmv1
from tests.integration.server import serving


class ProfiledLLM(FakeLLM):
    is_on = False

    async def profile(self, *, start: bool) -> None:
        if self.is_on is start:
            raise RequestError("it is so already", code="profile_failed", status=409)
        self.is_on = start


def statuses_of(llm: FakeLLM, *paths: str) -> list[int]:
    async def main() -> list[int]:
        async with client_of(llm) as client:
            return [(await client.post(path)).status_code for path in paths]

    return asyncio.run(main())


def test_routes(tmp_path: Path) -> None:
    llm = ProfiledLLM(make_model_dir(tmp_path))
    assert statuses_of(llm, "/start_profile", "/stop_profile") == [404, 404]
    llm.config = dataclasses.replace(llm.config, device=DeviceConfig(torch_profiler_dir=str(tmp_path)))
    assert statuses_of(llm, "/stop_profile", "/start_profile", "/start_profile", "/stop_profile") == [409, 200, 409, 200]


@pytest.mark.slow
def test_a_load_is_recorded(tiny_model_dir: Path, tmp_path: Path) -> None:
    with serving(tiny_model_dir, tmp_path, "--torch-profiler-dir", str(tmp_path / "traces")) as server:
        load = ("--num-prompts", "2", "--random-input-len", "16", "--random-output-len", "3", "--ignore-eos")
        result = mmv1("bench", "serve", "--base-url", server.url, *load, "--profile")
        assert result.returncode == 0, result.stderr
        (trace,) = (tmp_path / "traces").iterdir()
        events = json.loads(trace.read_text())["traceEvents"]
        assert any(event.get("name") == "aten::linear" for event in events)  # of the thread that launches steps
        assert server.http.post(f"{server.url}/stop_profile").status_code == 409
        assert server.is_healthy()
