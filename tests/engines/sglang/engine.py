"""A SGLang instance as a process of its own, for tests: a real `Engine` with its schedulers, on the CPU, asked over pipes.

As a script: reads one JSON object of `Engine` arguments from standard input, then answers each line, a JSON list of an order
and its arguments, with one line of JSON on standard output, and ends with standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from peerload.testing import sglang_stubs

PROMPTS = [[5, 17, 300, 42], [9, 8, 7, 6, 5, 4]]
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


class Sglang:
    """A running instance. Starting it takes ten seconds and more. config: peerload's; None loads as ever.

    Several may be started before the first is waited for. python: of an environment that has SGLang."""

    def __init__(
        self, model: Path, tp: int, config: dict[str, object] | None = None, *, python: str = sys.executable, **arguments: object
    ) -> None:
        self._arguments = {**ON_CPU, "model_path": str(model), "tp_size": tp, **arguments}
        if config is not None:
            self._arguments |= {"load_format": "peerload", "model_loader_extra_config": json.dumps(config)}
        self._python, self._size = python, tp
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed on exit
        self._scratch = tempfile.TemporaryDirectory(prefix="peerload-sglang-")

    def __enter__(self) -> Sglang:
        scratch = Path(self._scratch.name)
        (scratch / "tests.dist-info").mkdir()
        for name, content in DISTRIBUTION.items():
            (scratch / "tests.dist-info" / name).write_text(content)
        environment = sglang_stubs.environment() | {"OMP_NUM_THREADS": "1"}
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([cores] * self._size)  # else a rank wants a NUMA node to itself
        environment["PYTHONPATH"] += os.pathsep + os.pathsep.join([str(scratch), str(Path(__file__).parent)])
        self._process = subprocess.Popen(
            [self._python, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._tell(self._arguments)
        return self

    def wait(self) -> Sglang:
        """Until it serves."""
        self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self.kill()
            self._scratch.cleanup()
            self._log.close()

    def kill(self) -> None:
        """Every process of the instance, as a crash of its host would."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
        self._process.wait()

    @property
    def log(self) -> str:
        """What it has said on standard error so far."""
        self._log.seek(0)
        return self._log.read()

    def tokens(self) -> list[list[int]]:
        """The twelve that greedily follow each prompt."""
        return self.ask("tokens")  # type: ignore[return-value]

    def sha256(self) -> list[dict[str, str]]:
        """[ranks], of every tensor by its path."""
        at = Path(self._scratch.name)
        self.ask("rpc", "write_sha256", {"directory": str(at)})
        return [json.loads(path.read_text()) for path in sorted(at.glob("rank-*.json"))]

    def ask(self, *order: object) -> object:
        self._tell(order)
        return self._answer()

    def _tell(self, message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> object:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError(f"SGLang ended with {self._process.wait()}\n{self.log[-8000:]}")


def main() -> None:
    import sglang

    def answer(value: object) -> None:
        sys.stdout.write(f"ANSWER {json.dumps(value)}\n")
        sys.stdout.flush()

    engine = sglang.Engine(**json.loads(sys.stdin.readline()))
    answer("ready")
    greedy = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        if order == "tokens":
            answer([engine.generate(input_ids=p, sampling_params=greedy)["output_ids"] for p in PROMPTS])
        elif order == "rpc":
            name, values = arguments
            engine.collective_rpc(name, **values)
            answer("done")
        elif order == "update":
            answer(engine.update_weights_from_disk(*arguments))
    engine.shutdown()


if __name__ == "__main__":
    main()
