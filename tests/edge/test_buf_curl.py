"""A client that is not ours and not grpcio: ``buf curl``, by reflection. Skipped where its npm package is not at hand;
nothing is downloaded."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import pytest
from tests.edge.serving import rig, run

BUF = ["npx", "--no-install", "@bufbuild/buf@1.75.0"]


def _at_hand() -> bool:
    if shutil.which("npx") is None:
        return False
    return subprocess.run([*BUF, "--version"], capture_output=True, check=False, timeout=60).returncode == 0


def test_generate_and_its_refusal_by_buf_curl() -> None:
    if not _at_hand():
        pytest.skip("npm package @bufbuild/buf is not installed here")

    async def curl(port: int, data: str) -> tuple[int, str, str]:
        url = f"http://127.0.0.1:{port}/moestro.v1.InferenceService/Generate"
        words = [*BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", data, url]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*words, stdout=pipe, stderr=pipe)
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def test() -> None:
        async with rig() as it:
            code, out, _ = await curl(it.port, '{"text": "abc", "stop": {"maxTokens": 3}, "sampling": {"seed": 5}}')
            decoder, events = json.JSONDecoder(), []
            while out := out.lstrip():
                event, end = decoder.raw_decode(out)
                events.append(event["event"])
                out = out[end:]
            assert code == 0
            assert [int(e.get("sequenceNumber", 0)) for e in events] == [0, 1, 2]
            assert events[-1]["deltas"][0]["finishReason"] == "FINISH_REASON_LENGTH"
            assert events[-1]["usage"]["outputTokens"] == 3
            code, _, err = await curl(it.port, '{"text": "abc", "sampling": {"topP": 2}}')
            assert code != 0
            assert "sampling.top_p: must be in (0, 1], is 2" in err
            assert "google.rpc.BadRequest" in err

    run(test())
