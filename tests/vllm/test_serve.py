"""``vllm serve`` of a real model, asked by the openai client: 32 requests at once, half of them streamed."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import higgs  # noqa: F401  # registers with transformers
import openai
import pytest
import torch
from higgs.demo import TEXT, get_model
from higgs.progress import NullProgress
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUESTS, NEW_TOKENS = 32, 24
BITS = {
    "4": ["--bits", "4", "--scales", "random"],
    "3.25": ["--bits", "3.25", "--scales", "none", "--untie"],  # mixed, also within fused layers
}


@pytest.fixture(scope="module", params=BITS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M, which stays beside the packages that it comes in."""
    source, work = get_model(Path(sys.prefix), NullProgress()), tmp_path_factory.mktemp("smollm2")
    options = list(BITS[request.param])
    if "--untie" in options:
        run("measure", source, "-o", work / "s.json", "--text", "random", "--tokens", 256, "--context", 256,
            "--scales", "none")  # fmt: skip
        options += ["--sensitivities", work / "s.json"]
    run("quantize", source, "-o", work / "quantized", *options)
    return work / "quantized"


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "higgs.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def server(checkpoint: Path, log: Path) -> Iterator[str]:
    """The URL of ``vllm serve`` when it is ready."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", checkpoint, "--port", port, "--dtype", "float32",
               "--served-model-name", "quantized", "--max-model-len", 256]  # fmt: skip
    own = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")  # of the other tests
    env = {name: value for name, value in os.environ.items() if name not in own}
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=env)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(1)
        else:
            raise TimeoutError(log.read_text()[-4000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


async def complete(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
    options = {"model": "quantized", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    if not stream:
        return (await client.completions.create(**options)).choices[0].text
    pieces = [chunk.choices[0].text async for chunk in await client.completions.create(**options, stream=True)]
    assert len(pieces) > 1
    return "".join(pieces)


async def ask(url: str, prompts: list[str]) -> tuple[list[str], str]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
        requests = [complete(client, prompt, stream=i % 2 == 0) for i, prompt in enumerate(prompts)]
        texts = await asyncio.gather(*requests)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        chat = await client.chat.completions.create(
            model="quantized", messages=messages, max_tokens=NEW_TOKENS, temperature=0
        )
        return texts, chat.choices[0].message.content


@torch.inference_mode()
def continuation(model: torch.nn.Module, tokenizer, ids: torch.Tensor) -> str:
    new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def test_thirty_two_at_once(checkpoint: Path, tmp_path: Path) -> None:
    words = TEXT.read_text().split()
    prompts = [" ".join(words[50 * i : 50 * i + 3 + i]) for i in range(REQUESTS)]
    with server(checkpoint, tmp_path / "log") as url:
        texts, chat = asyncio.run(ask(url, prompts))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    encoded = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    assert texts == [continuation(model, tokenizer, ids) for ids in encoded]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert chat == continuation(model, tokenizer, ids.input_ids)
