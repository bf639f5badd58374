"""Architectures from before Llama, each with names of its own."""

from __future__ import annotations

from collections.abc import Iterator

from .. import rules
from ..rules import Sizes
from .decoder import TWO_NORMS, Layers
from .family import Family


def older(s: Sizes) -> Iterator[Family]:
    yield _gpt2(s)
    yield _opt(s)
    yield _gpt_neox(s)
    yield _falcon(s)


def _common(s: Sizes) -> dict[str, object]:
    return {"torch_dtype": "bfloat16", "vocab_size": s.vocab, "bos_token_id": 0, "eos_token_id": 1}


def _gpt2(s: Sizes) -> Family:
    config = {
        **_common(s),
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": s.hidden,
        "n_layer": s.layers,
        "n_head": s.heads,
        "n_positions": 512,
    }
    layer = list(rules.norms(["ln_1", "ln_2"], s.hidden, bias=True))
    for name, rows, cols in (
        ("attn.c_attn", s.hidden, 3 * s.hidden),
        ("attn.c_proj", s.hidden, s.hidden),
        ("mlp.c_fc", s.hidden, 4 * s.hidden),
        ("mlp.c_proj", 4 * s.hidden, s.hidden),
    ):
        layer += [rules.tensor(f"{name}.weight", rows, cols), rules.tensor(f"{name}.bias", cols)]
    outside = [rules.tensor("transformer.wte.weight", s.vocab, s.hidden), rules.tensor("transformer.wpe.weight", 512, s.hidden)]
    outside += rules.norms(["transformer.ln_f"], s.hidden, bias=True)
    return Family("gpt2", "GPT-2", config, Layers([layer] * s.layers, outside, "transformer.h").tensors(), kv_heads=s.heads)


def _opt(s: Sizes) -> Family:
    config = {
        **_common(s),
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": s.hidden,
        "ffn_dim": s.inter,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "word_embed_proj_dim": s.hidden,
        "max_position_embeddings": 512,
        "pad_token_id": 1,
        "do_layer_norm_before": True,
    }
    layer = [t for x in ("q", "k", "v", "out") for t in rules.biased(f"self_attn.{x}_proj", s.hidden, s.hidden)]
    layer += [*rules.biased("fc1", s.inter, s.hidden), *rules.biased("fc2", s.hidden, s.inter)]
    layer += rules.norms(["self_attn_layer_norm", "final_layer_norm"], s.hidden, bias=True)
    outside = [rules.tensor("model.decoder.embed_tokens.weight", s.vocab, s.hidden)]
    outside += [rules.tensor("model.decoder.embed_positions.weight", 514, s.hidden)]
    outside += rules.norms(["model.decoder.final_layer_norm"], s.hidden, bias=True)
    return Family("opt", "OPT", config, Layers([layer] * s.layers, outside, "model.decoder.layers").tensors(), kv_heads=s.heads)


def _gpt_neox(s: Sizes) -> Family:
    config = {
        **_common(s),
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": s.hidden,
        "intermediate_size": s.inter,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    layer = [
        *rules.biased("attention.query_key_value", 3 * s.hidden, s.hidden),
        *rules.biased("attention.dense", s.hidden, s.hidden),
    ]
    layer += [*rules.biased("mlp.dense_h_to_4h", s.inter, s.hidden), *rules.biased("mlp.dense_4h_to_h", s.hidden, s.inter)]
    layer += rules.norms(TWO_NORMS, s.hidden, bias=True)
    outside = [rules.tensor(name, s.vocab, s.hidden) for name in ("gpt_neox.embed_in.weight", "embed_out.weight")]
    outside += rules.norms(["gpt_neox.final_layer_norm"], s.hidden, bias=True)
    tensors = Layers([layer] * s.layers, outside, "gpt_neox.layers").tensors()
    return Family("gpt-neox", "GPT-NeoX", config, tensors, kv_heads=s.heads)


def _falcon(s: Sizes) -> Family:
    config = {
        **_common(s),
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_kv_heads": s.kv_heads,
        "new_decoder_architecture": True,
        "bias": False,
        "parallel_attn": True,
        "multi_query": True,
        "alibi": False,
    }
    layer = [*rules.bf16("self_attention.query_key_value", (s.heads + 2 * s.kv_heads) * s.head, s.hidden)]
    layer += rules.bf16("self_attention.dense", s.hidden, s.hidden)
    layer += [
        *rules.bf16("mlp.dense_h_to_4h", 4 * s.hidden, s.hidden),
        *rules.bf16("mlp.dense_4h_to_h", s.hidden, 4 * s.hidden),
    ]
    layer += rules.norms(["ln_attn", "ln_mlp"], s.hidden, bias=True)
    outside = [rules.tensor("transformer.word_embeddings.weight", s.vocab, s.hidden)]
    outside += rules.norms(["transformer.ln_f"], s.hidden, bias=True)
    tensors = Layers([layer] * s.layers, outside, "transformer.h").tensors()
    return Family("falcon", "Falcon", config, tensors, kv_heads=s.kv_heads)
