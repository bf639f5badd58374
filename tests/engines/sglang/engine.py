"""A SGLang instance as a process of its own, for tests: a real `Engine` with its schedulers, on the CPU."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from running import PROMPTS, TOKENS, EngineProcess

from peerload.testing import sglang_stubs
from peerload.testing.processes import orders

#: Without a GPU: the operations of torch itself, and nothing that is compiled or captured.
ON_CPU = {
    "device": "cpu",
    "dtype": "bfloat16",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "disable_radix_cache": True,
    "skip_server_warmup": True,
    "skip_tokenizer_init": True,
    "max_total_tokens": 1024,
    "max_running_requests": 4,
    "mem_fraction_static": 0.5,
    "log_level": "info",
    "sleep_on_idle": True,
}
#: A distribution that SGLang finds on the module path, with a plug-in of the tests'.
DISTRIBUTION = {
    "METADATA": "Metadata-Version: 2.1\nName: peerload-sglang-tests\nVersion: 0\n",
    "entry_points.txt": "[sglang.srt.plugins]\npeerload-tests = workers:register\n",
}


class Sglang(EngineProcess):
    def __init__(
        self, model: Path, tp: int, config: dict[str, object] | None = None, *, python: str = sys.executable, **arguments: object
    ) -> None:
        """config: peerload's; None: SGLang loads by itself. arguments: more of `Engine`'s."""
        arguments = {**ON_CPU, "model_path": str(model), "tp_size": tp, **arguments}
        if config is not None:
            arguments |= {"load_format": "peerload", "model_loader_extra_config": json.dumps(config)}
        self._scratch = tempfile.TemporaryDirectory(prefix="peerload-sglang-")
        scratch = Path(self._scratch.name)
        (scratch / "tests.dist-info").mkdir()
        for name, content in DISTRIBUTION.items():
            (scratch / "tests.dist-info" / name).write_text(content)
        environment = sglang_stubs.environment() | {"OMP_NUM_THREADS": "1"}
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([cores] * tp)  # else a rank wants a NUMA node to itself
        environment["PYTHONPATH"] += os.pathsep + str(scratch)
        super().__init__(Path(__file__).parent, arguments, python=python, environment=environment)

    def close(self) -> None:
        super().close()
        self._scratch.cleanup()

    def sha256(self) -> list[dict[str, str]]:
        """[ranks], of every tensor by its path."""
        self.ask(("sha256", self._scratch.name))  # in files: SGLang hands on no answers of its schedulers
        return [json.loads(path.read_text()) for path in sorted(Path(self._scratch.name).glob("rank-*.json"))]

    def update(self, model: Path) -> tuple[bool, str]:
        """Load the weights of `model` from disk: whether it has, and what SGLang says of it."""
        success, message, *_ = self.ask(("update", str(model)))
        return success, message


def main(arguments: dict[str, object], link: Connection) -> None:
    import sglang

    engine = sglang.Engine(**arguments)
    link.send("ready")
    greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    for order in orders(link):
        if order == "tokens":
            link.send([engine.generate(input_ids=p, sampling_params=greedy)["output_ids"] for p in PROMPTS])
        elif order[0] == "sha256":
            link.send(engine.collective_rpc("write_sha256", directory=order[1]))
        else:
            link.send(engine.update_weights_from_disk(order[1]))
    engine.shutdown()
