"""Tiny engines of vLLM in this process, one after the other."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # errors come as they are raised, and the model can be looked at
sys.path.insert(0, str(Path(__file__).parents[1] / "python"))  # for the models of its tests

import torch
import vllm
from vllm.distributed import cleanup_dist_env_and_memory

PROMPTS = [list(range(5, 100, 5)), [7, 3, 250, 18], [9] * 30]
NEW_TOKENS = 12


@contextmanager
def engine(path: Path, **options: Any) -> Iterator[vllm.LLM]:
    options = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True, **options}
    llm = None
    try:
        llm = vllm.LLM(str(path), skip_tokenizer_init=True, **options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()  # not when the traceback of a failed test lets go of it
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def overrides(**plan: Any) -> dict[str, Any]:
    """Options of an engine that quantizes while loading."""
    return {"quantization": "higgs_quant", "hf_overrides": {"quantization_config_dict_json": json.dumps(plan)}}


def served_tokens(llm: vllm.LLM) -> list[list[int]]:
    """Greedy, of all prompts in one batch."""
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.inference_mode()
def expected_tokens(model: torch.nn.Module) -> list[list[int]]:
    """The same of a model of transformers, without a cache."""
    result = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        result.append(ids[0, len(prompt) :].tolist())
    return result
