"""A vLLM instance as a process of its own, for tests: a real `LLM` with its workers, asked over pipes.

As a script: reads one JSON object of `LLM` arguments from standard input, then answers each line ("tokens", or a method of
`workers.Looks`) with one line of JSON on standard output, and ends with standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

PROMPTS = [[5, 17, 300, 42], [9, 8, 7, 6, 5, 4]]
#: vLLM offline, its log where we look for it.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "INFO",
}
#: On a CPU, with workers that share cores, forked from a process that has imported everything.
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}


class Vllm:
    """An instance, started by `with`. It takes half a minute until it serves (`wait`), so start several at once."""

    def __init__(
        self,
        model: Path,
        tp: int,
        config: dict[str, object] | None = None,
        *,
        gpu: bool = False,
        packed: bool = False,
        python: str = sys.executable,
        **arguments: object,
    ) -> None:
        """config: peerload's; None: vLLM loads by itself. packed: linear weights as the CPU backend packs them for oneDNN, out of
        sight; else they stay to be looked at. python: of an environment with vLLM. arguments: more of `LLM`'s."""
        self._python = python
        self._arguments: dict[str, object] = {
            "model": str(model),
            "tensor_parallel_size": tp,
            "dtype": "bfloat16",
            "enforce_eager": True,
            "max_model_len": 128,
            "max_num_seqs": 4,
            "num_gpu_blocks_override": 64,
            "disable_log_stats": True,
            "skip_tokenizer_init": True,
            "worker_extension_cls": "workers.Looks",
            **arguments,
        }
        if config is not None:
            self._arguments |= {"load_format": "peerload", "model_loader_extra_config": config}
        self._environment = {**os.environ, **ENVIRONMENT, **({} if gpu else ON_CPU)}
        if not gpu and not packed:
            self._environment["KEEP_WEIGHTS"] = "1"
        path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment["PYTHONPATH"] = os.pathsep.join(path)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the process has ended

    def __enter__(self) -> Vllm:
        self._process = subprocess.Popen(
            [self._python, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self._environment,
        )
        self._tell(self._arguments)
        return self

    def wait(self) -> Vllm:
        """Until it serves. Several may be started before the first is waited for."""
        self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        """What it has said on standard error so far."""
        self._log.seek(0)
        return self._log.read()

    def tokens(self) -> list[list[int]]:
        """The twelve that greedily follow each prompt."""
        self._tell("tokens")
        return self._answer()  # type: ignore[return-value]

    def sha256(self) -> list[dict[str, str]]:
        """[ranks], of every tensor by its path."""
        self._tell("sha256_of_tensors")
        return self._answer()  # type: ignore[return-value]

    def load_nothing(self) -> None:
        """Begin to change the weights of every rank."""
        self._tell("load_nothing")
        self._answer()

    def withdraw(self) -> list[bool]:
        """[ranks], whether it was a seed until now."""
        self._tell("peerload_withdraw")
        return self._answer()  # type: ignore[return-value]

    def _tell(self, message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> object:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError(f"vLLM ended with {self._process.wait()}\n{self.log[-8000:]}")


def main() -> None:
    from vllm import LLM, SamplingParams

    def answer(value: object) -> None:
        sys.stdout.write(f"ANSWER {json.dumps(value)}\n")
        sys.stdout.flush()

    llm = LLM(**json.loads(sys.stdin.readline()))
    answer("ready")
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    for line in sys.stdin:
        if json.loads(line) == "tokens":
            found = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], greedy, use_tqdm=False)
            answer([list(f.outputs[0].token_ids) for f in found])
        else:
            answer(llm.collective_rpc(json.loads(line)))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
