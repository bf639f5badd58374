"""A vLLM instance as a process of its own, for tests: a real `LLM` with its workers."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from running import PROMPTS, TOKENS, EngineProcess

from peerload.testing.processes import orders

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
#: On a CPU, with workers that share cores, forked from a process that has imported everything.
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}
#: On a GPU, without compiling kernels ahead that these few tokens don't need: that takes minutes.
ON_GPU = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_DEEP_GEMM_WARMUP": "skip"}
#: Of `LLM`: as little as a test needs.
SMALL = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 64,
    "disable_log_stats": True,
    "skip_tokenizer_init": True,
    "worker_extension_cls": "workers.Looks",
}


class Vllm(EngineProcess):
    def __init__(
        self,
        model: Path,
        tp: int,
        config: dict[str, object] | None = None,
        *,
        gpu: bool = False,
        packed: bool = False,
        python: str = sys.executable,
        log: Path | None = None,
        **arguments: object,
    ) -> None:
        """config: peerload's; None: vLLM loads by itself. packed: linear weights as the CPU backend packs them for oneDNN, out of
        sight; else they stay to be looked at. arguments: more of `LLM`'s."""
        arguments = {**SMALL, "model": str(model), "tensor_parallel_size": tp, **arguments}
        if config is not None:
            arguments |= {"load_format": "peerload", "model_loader_extra_config": config}
        environment = {**os.environ, **ENVIRONMENT, **(ON_GPU if gpu else ON_CPU)}
        if not gpu and not packed:
            environment["KEEP_WEIGHTS"] = "1"
        super().__init__(Path(__file__).parent, arguments, python=python, environment=environment, log=log)

    def sha256(self) -> list[dict[str, str]]:
        """[ranks], of every tensor by its path."""
        return self.ask("sha256_of_tensors")

    def load_nothing(self) -> None:
        """Begin to change the weights of every rank."""
        self.ask("load_nothing")

    def withdraw(self) -> list[bool]:
        """[ranks], whether it was a seed until now."""
        return self.ask("peerload_withdraw")


def main(arguments: dict[str, object], link: Connection) -> None:
    """Orders other than "tokens" are methods of the workers (`workers.Looks`)."""
    from vllm import LLM, SamplingParams

    llm = LLM(**arguments)
    link.send("ready")
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    for order in orders(link):
        if order == "tokens":
            found = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], greedy, use_tqdm=False)
            link.send([list(f.outputs[0].token_ids) for f in found])
        else:
            link.send(llm.collective_rpc(order))
    llm.llm_engine.engine_core.shutdown()
