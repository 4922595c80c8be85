"""What test_tensor_parallel runs under torchrun: loads a checkpoint in as many ranks as there are, saves what they say.

torchrun --nproc-per-node 2 tensor_parallel_ranks.py CHECKPOINT OUT [experts: expert parallelism]
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import higgs
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.distributed import DistributedConfig

path, out = map(Path, sys.argv[1:3])
torch.set_num_threads(1)
config = DistributedConfig(tp_plan="auto", enable_expert_parallel=sys.argv[3:] == ["experts"])
model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config).eval()
ids = torch.arange(20)[None] * 5 % 256
with torch.no_grad():
    logits = model(ids).logits
tokens = model.generate(ids, generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0))
model(ids).logits.square().mean().backward()
formats = {name: asdict(m.format) for name, m in model.named_modules() if isinstance(m, higgs.HiggsLinear)}
refused = []
try:
    higgs.dequantize_(model)
except higgs.UnsupportedError as e:
    refused.append(str(e))
gradient = model.get_input_embeddings().weight.grad
gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
torch.save((logits, tokens, gradient, formats, refused), out / f"rank{os.environ['RANK']}.pt")
model.save_pretrained(out / "saved")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)  # at the end of a process threads of torch.distributed now and then abort it
