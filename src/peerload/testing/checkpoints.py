"""Real checkpoints with random weights: config, shards with an index, tokenizer and generation settings, all by seed.

Weights are scaled so that every layer matters and greedy text neither loops at once nor hangs on near-ties.
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any, Final, Literal

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

Family = Literal["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"]
Size = Literal["tiny", "demo"]

_CONFIG: Final = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "mixtral": "MixtralConfig",
    "qwen3_moe": "Qwen3MoeConfig",
}
#: Heads and vocabulary divide by 1, 2, 3, 4 (before 5.23 transformers insists); the intermediate size only by 1.
_TINY: Final = {
    "hidden_size": 96,
    "intermediate_size": 139,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "num_key_value_heads": 12,
    "head_dim": 8,
    "vocab_size": 504,
    "max_position_embeddings": 256,
}
#: About 350 MB in BF16.
_DEMO: Final = {
    "hidden_size": 1536,
    "intermediate_size": 4099,
    "num_hidden_layers": 5,
    "num_attention_heads": 24,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "vocab_size": 16416,
    "max_position_embeddings": 4096,
}
#: torch's grouped matrix product wants rows of a multiple of 16 bytes on every rank: 96 divides by 8 and by 1, 2, 3, 4.
_EXPERTS: Final[dict[str, dict[str, Any]]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
}


def model_config(family: Family, size: Size = "tiny", **changes: object) -> dict[str, Any]:
    """The config.json of a model of this family, as a dictionary; `changes` are config keys."""
    sizes = _TINY if size == "tiny" else _DEMO
    values = {**sizes, **_EXPERTS.get(family, {}), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, **changes}
    config = getattr(transformers, _CONFIG[family])(**values)
    config.dtype = "bfloat16"
    config.architectures = [_CONFIG[family].removesuffix("Config") + "ForCausalLM"]
    parsed: dict[str, Any] = json.loads(config.to_json_string())
    return parsed


def make_checkpoint(
    directory: str | Path, family: Family = "llama", size: Size = "tiny", seed: int = 0, shards: int = 3, **changes: object
) -> Path:
    """Save a checkpoint of about `shards` files into `directory` (made if missing) and return its path.

    The model stands in memory once; transformers itself saves it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    values = model_config(family, size, **changes)
    config = getattr(transformers, _CONFIG[family]).from_dict(values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.to_empty(device="cpu")
    model.tie_weights()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_values(name, tuple(parameter.shape), random))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, max_new_tokens=32)  # type: ignore[no-untyped-call]
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(directory, max_shard_size=nbytes // shards + 1)
    transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer(values["vocab_size"]).save_pretrained(directory)
    return directory


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that spells any text: the bytes, then letter pairs, then syllables, as many as fit."""
    letters = string.ascii_lowercase
    special = ["<s>", "</s>"]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    pairs = [(a, b) for a, b in itertools.product("Ġ" + letters, letters)]
    triples = [(a + b, c) for (a, b), c in itertools.product(pairs, letters)]
    for left, right in [*pairs, *triples][: max(0, vocab_size - len(words))]:
        merges.append((left, right))
        words.append(left + right)
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token="<s>",  # noqa: S106 no password
        eos_token="</s>",  # noqa: S106
    )


def _values(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Norms near 1, small biases, unit-variance embeddings, matrices that keep the variance of what they multiply."""
    noise = torch.randn(shape, generator=random)
    if "norm" in name:
        return 1 + 0.1 * noise
    if len(shape) < 2:
        return 0.1 * noise
    return noise if "embed" in name else noise * (2.0 / shape[-1] ** 0.5)
