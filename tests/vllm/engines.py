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
import transformers
import vllm
from conftest import save_random
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


def make_deepseek(path: Path) -> Path:
    """Latent attention, and experts whose tensors the model of vLLM reads by itself."""
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(
        vocab_size=256, hidden_size=128, intermediate_size=192, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=64,
        v_head_dim=32, max_position_embeddings=128, topk_method="greedy", n_group=1, topk_group=1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return save_random(transformers.DeepseekV2ForCausalLM(config), path)


def overrides(**plan: Any) -> dict[str, Any]:
    """Options of an engine that quantizes while loading."""
    return {"quantization": "higgs_quant", "hf_overrides": {"quantization_config_dict_json": json.dumps(plan)}}


def served(llm: vllm.LLM, **options: Any) -> list[vllm.CompletionOutput]:
    """Greedy, of all prompts in one batch."""
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, **options)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], greedy, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def served_tokens(llm: vllm.LLM) -> list[list[int]]:
    return [list(output.token_ids) for output in served(llm)]


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


@torch.inference_mode()
def assert_same_logits(llm: vllm.LLM, model: torch.nn.Module) -> None:
    """The same tokens, and at every step the logits of ``model`` of transformers (but for a constant). The engine must
    have ``max_logprobs=-1``."""
    outputs = served(llm, logprobs=-1)
    assert [list(output.token_ids) for output in outputs] == expected_tokens(model)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        logits = model(torch.tensor([prompt + list(output.token_ids)])).logits[0, len(prompt) - 1 : -1]
        found = torch.tensor([[step[i].logprob for i in range(logits.shape[1])] for step in output.logprobs])
        assert torch.allclose(found, logits.log_softmax(-1), rtol=0, atol=1e-4)
