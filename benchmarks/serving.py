"""The server against transformers' generate, the same questions about the same pictures, in one run on one machine.

    python benchmarks/serving.py [MODEL] [--json FILE]

Starts `mmv1 serve` (a tiny random model when none is given), asks NUM_REQUESTS questions, each with a picture never seen
before, 32 at a time; reads the server process's resident memory; ends the server; then asks transformers one by one.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pybase64
from environment import describe
from PIL import Image

# As `mmv1 serve` starts its engine on a CPU; transformers gets the same, before torch is imported: it is as good for it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NUM_REQUESTS = 200
NUM_CONCURRENT = 32
NUM_ONE_BY_ONE = 24
MAX_TOKENS = 32
QUESTION = "Describe this image in detail."


def picture(seed: int, size: int = 640) -> bytes:
    """A unique JPEG of smooth colour fields with some texture."""
    rng = np.random.default_rng(seed)
    fields = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    texture = Image.fromarray(rng.integers(0, 40, (size // 4, size // 4, 3), dtype=np.uint8)).resize((size, size))
    out = io.BytesIO()
    Image.blend(fields, texture, 0.15).save(out, "JPEG", quality=88)
    return out.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resident_mib(pid: int) -> float:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1024


async def wait_until_healthy(client: httpx.AsyncClient, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if server.poll() is not None:
            sys.exit("the server ended while starting")
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.2)
    sys.exit("the server did not become healthy")


async def ask_all(client: httpx.AsyncClient, pictures: list[bytes]) -> float:
    """Requests per second with NUM_CONCURRENT open at a time."""
    slots = asyncio.Semaphore(NUM_CONCURRENT)

    async def ask(data: bytes) -> None:
        url = "data:image/jpeg;base64," + pybase64.b64encode(data).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        body = {
            "model": "bench",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        async with slots:
            answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        assert answer.json()["usage"]["completion_tokens"] == MAX_TOKENS

    started = time.perf_counter()
    await asyncio.gather(*(ask(data) for data in pictures))
    return len(pictures) / (time.perf_counter() - started)


async def measure_server(model: Path) -> dict[str, float]:
    port = free_port()
    command = [sys.executable, "-m", "mmv1", "serve", str(model), "--port", str(port), "--served-model-name", "bench"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            await wait_until_healthy(client, server)
            await ask_all(client, [picture(10_000 + i) for i in range(8)])
            pictures = [picture(i) for i in range(NUM_REQUESTS)]
            rate = await ask_all(client, pictures)
            return {"mmv1_requests_per_s": rate, "api_server_resident_mib": resident_mib(server.pid)}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def measure_transformers(model_dir: Path) -> float:
    """Requests per second of generate, one by one, from JPEG bytes to text."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_dir)

    def ask(data: bytes) -> str:
        content = [{"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, min_new_tokens=MAX_TOKENS, do_sample=False)
        return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :]))

    ask(picture(20_000))
    pictures = [picture(i) for i in range(NUM_ONE_BY_ONE)]
    started = time.perf_counter()
    for data in pictures:
        ask(data)
    return len(pictures) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="model directory; default: a tiny random one")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model
        if model is None:
            sys.path.insert(0, str(Path(__file__).parent.parent))
            from examples.tiny_model import make_tiny_model

            model = make_tiny_model(Path(directory) / "tiny")
        figures: dict[str, Any] = asyncio.run(measure_server(model))
        figures["transformers_requests_per_s"] = measure_transformers(model)
    figures["ratio"] = figures["mmv1_requests_per_s"] / figures["transformers_requests_per_s"]
    print(f"mmv1 serve, {NUM_CONCURRENT} at a time      {figures['mmv1_requests_per_s']:8.2f} requests/s")
    print(f"transformers, one by one       {figures['transformers_requests_per_s']:8.2f} requests/s")
    print(f"ratio                          {figures['ratio']:8.2f}   (goal: at least 4)")
    memory = figures["api_server_resident_mib"]
    print(f"API server, resident memory    {memory:8.0f} MiB after {NUM_REQUESTS} requests (goal: below 250)")
    if args.json:
        args.json.write_text(json.dumps({**describe(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
