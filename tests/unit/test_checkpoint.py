from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Self

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

from peerload.deadline import Deadline  # noqa: E402
from peerload.engines.checkpoint import Checkpoint, ModelFiles, name_of  # noqa: E402
from peerload.engines.transformers.architecture import catalog_of, config_of  # noqa: E402
from peerload.engines.transformers.open import layout_for, open_model, stock_model, whole_layout  # noqa: E402
from peerload.errors import ConfigError, HostError, LayoutError, ManifestError  # noqa: E402
from peerload.memory.region import Region  # noqa: E402
from peerload.model.catalog import Catalog, ModelKey, Parallel, TensorSpec  # noqa: E402
from peerload.model.layout import Layout  # noqa: E402
from peerload.planning.batch import Batch  # noqa: E402
from peerload.testing.checkpoints import Family, make_checkpoint, model_config, tokenizer  # noqa: E402
from peerload.transport.files import FilesTransport  # noqa: E402

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    save_file({"w": torch.arange(12.0).view(3, 4), "scale": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def rewrite(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """The same file with another header."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    change(header)
    header_of(path, json.dumps(header).encode())


def header_of(path: Path, raw: bytes) -> None:
    """The same data under these bytes as the header."""
    content = path.read_bytes()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + int.from_bytes(content[:8], "little") :])


def nested(depth: int) -> object:
    value: object = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_every_tensor_is_read_through_the_offer_as_safetensors_reads_it(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    offer = checkpoint.offer()
    checkpoint.layout.prove_cover()
    assert len(checkpoint.files.path) >= 3
    truth: dict[str, torch.Tensor] = {}
    for path in checkpoint.files.path:
        truth |= load_file(path)
    assert set(checkpoint.catalog.names) == set(truth)
    with closing(FilesTransport()) as transport:
        pieces, nbytes = offer.layout.pieces, offer.layout.piece_nbytes
        memory = np.zeros(int(nbytes.sum()), np.uint8)
        begin = np.cumsum(nbytes) - nbytes
        transport.register([Region(memory.ctypes.data, memory.nbytes)])
        peer = transport.connect(offer.binding.endpoints[0].description, "disk", Deadline.after(20))
        source = offer.binding.address[pieces.buffer] + pieces.offset
        transport.read(peer, Batch.of_runs(source, memory.ctypes.data + begin, nbytes), Deadline.after(10))
    for i in range(len(pieces)):
        spec = offer.layout.tensor_of(i)
        assert offer.layout.box_of(i).shape == spec.shape == tuple(truth[spec.name].shape)
        found = memory[begin[i] : begin[i] + nbytes[i]]
        assert np.array_equal(found, truth[spec.name].view(torch.uint8).numpy().ravel()), spec.name


def test_one_file_and_a_scalar(one_file: Path) -> None:
    checkpoint = Checkpoint.open(one_file)
    assert checkpoint.catalog == Catalog.of([TensorSpec("scale", "F32", ()), TensorSpec("w", "F32", (3, 4))])
    checkpoint.layout.prove_cover()


def test_identity_follows_content(directory: Path, tmp_path: Path) -> None:
    same = make_checkpoint(tmp_path / "same")
    other = make_checkpoint(tmp_path / "other", seed=1)
    first = Checkpoint.open(directory)
    assert first.identity() == Checkpoint.open(same).identity() != Checkpoint.open(other).identity()
    assert first.key() == first.key(directory.name, first.identity())
    assert first.key("org/model", "main").revision == "main"
    assert first.offer().source.generation != Checkpoint.open(same).offer().source.generation


def test_a_model_has_one_name_whatever_it_is_started_with(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--my-model" / "snapshots" / "0123abcd"
    plain, link, other = tmp_path / "plain", tmp_path / "link", tmp_path / "other"
    for directory in (snapshot, plain):
        directory.mkdir(parents=True)
    link.symlink_to(snapshot)
    other.symlink_to(plain)
    assert {name_of("org/my-model"), name_of(snapshot), name_of(link), name_of("", str(link))} == {"org/my-model"}
    assert {name_of(plain), name_of(other), name_of(f"{plain}/"), name_of(plain / ".." / "plain")} == {"plain"}
    assert name_of("mine", snapshot) == "mine"
    assert name_of() == ""


def test_a_checkpoint_of_the_same_content_takes_the_name_it_is_offered_under(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    own, same, other = checkpoint.key(), ModelKey("org/model", checkpoint.identity()), ModelKey("a", "0123")
    assert checkpoint.key(offered=[other, same]) == same
    assert checkpoint.key(offered=[same, own]) == own
    assert checkpoint.key("mine", offered=[same]).name == "mine"
    assert checkpoint.key(revision="1", offered=[same]) == ModelKey(own.name, "1")


def test_missing_things_are_the_operators_fault(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"the index names model-00001-of-\d+.safetensors, which isn't there"):
        Checkpoint.open(tmp_path)
    for text in ("[", "{}", '{"weight_map": {}}', '{"weight_map": {"w": 1}}', "[" * 200_000):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ManifestError, match="weight_map"):
            Checkpoint.open(tmp_path)
    for name in ("../model.safetensors", "nul\0", "\ud800", "long" * 100, ""):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ConfigError, match="isn't there"):
            Checkpoint.open(tmp_path)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ModelFiles.of(tmp_path)
    for content in (b"{", b"[" * 50_000, b"\xff", b'{"a": ' + b"[" * 50_000):
        with pytest.raises(ConfigError, match="not JSON"):
            ModelFiles({"config.json": content})


def test_an_index_that_lies(one_file: Path) -> None:
    (one_file / "model.safetensors").rename(one_file / "shard.safetensors")
    (one_file / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"gone": "shard.safetensors"}}))
    with pytest.raises(ManifestError, match=r"index.json\[gone\]: says shard.safetensors, which doesn't hold it"):
        Checkpoint.open(one_file)


def test_headers_that_lie(one_file: Path) -> None:
    path = one_file / "model.safetensors"
    original = path.read_bytes()

    def refused(change: Callable[[dict[str, dict[str, object]]], None], message: str) -> None:
        path.write_bytes(original)
        rewrite(path, change)
        with pytest.raises(ManifestError, match=message):
            Checkpoint.open(one_file)

    refused(lambda h: h["w"].update(dtype="F4"), r"model.safetensors\[w\].dtype: 'F4' is none of")
    refused(lambda h: h["w"].update(data_offsets=[4, 4000]), r"\[4, 4000\) lies outside the file's 52 bytes")
    refused(lambda h: h["w"].update(shape=[3, 5]), r"spans 48 bytes, F32\[3, 5\] needs others")
    refused(lambda h: h["w"].pop("shape"), r"\[w\]: does not have data_offsets, dtype, shape")
    refused(lambda h: h["w"].update(shape=[3.0, 4]), r"\[w\].shape: is no list .* extents of at least 1: \[3.0, 4\]")
    refused(lambda h: h["w"].update(shape=[3, "4"]), r"\[w\].shape: is no list")
    refused(lambda h: h["w"].update(shape=[3, 4, True]), r"\[w\].shape: is no list")
    refused(lambda h: h["w"].update(data_offsets=[0]), r"\[w\].data_offsets: is no pair of bytes: \[0\]")
    refused(lambda h: h["w"].update(data_offsets=[0, 48]), r"\[w\].data_offsets: \[0, 48\) overlaps the tensor before it")
    refused(lambda h: h["w"].update(x=nested(126)), r"\[w\]: is nested deeper than 127 levels")
    refused(lambda h: h.update(w=h["scale"]), r"\[w\].data_offsets: \[0, 4\) overlaps the tensor before it")
    refused(lambda h: h.pop("scale"), r"\[w\].data_offsets: \[4, 52\) leaves a gap: it must begin at byte 0")
    refused(lambda h: h.pop("w"), r"model.safetensors: its tensors cover 4 of 52 bytes of data")
    refused(lambda h: h.update(__metadata__="pt"), r"model.safetensors.__metadata__: does not map strings to strings")
    refused(lambda h: h.update(__metadata__={"step": 1}), r"__metadata__: does not map strings to strings")
    path.write_bytes(original)
    header_of(path, b"[" * 200_000 + b"]" * 200_000)
    with pytest.raises(ManifestError, match=r"model.safetensors: has a header that can't be read: maximum recursion"):
        Checkpoint.open(one_file)
    path.write_bytes(original)
    header_of(path, b'{"w": {"dtype": "F32", "dtype": "F32", "shape": [12], "data_offsets": [0, 48]}}')
    with pytest.raises(ManifestError, match=r"has a header that can't be read: 'dtype' is listed twice"):
        Checkpoint.open(one_file)
    path.write_bytes(original[:20])
    with pytest.raises(ManifestError, match="is no safetensors file"):
        Checkpoint.open(one_file)
    path.write_bytes(b"")
    with pytest.raises(ManifestError, match="is no safetensors file"):
        Checkpoint.open(one_file)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_config_alone_tells_the_checkpoints_tensors(tmp_path: Path, family: Family, tied: bool) -> None:
    made = make_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    stored = Checkpoint.open(made).catalog
    assert catalog_of(ModelFiles.of(made)) == stored
    assert catalog_of(ModelFiles.of(made / "config.json")) == stored
    assert ("lm_head.weight" in stored.row) is not tied


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_share_the_model_out(family: Family) -> None:
    """Each element is held by a rank; what is split, by one only. Repeated in one process, in any order of ranks."""
    files = ModelFiles({"config.json": json.dumps(model_config(family)).encode()})
    whole = layout_for(files, Parallel())
    for tp in (2, 3, 4):
        ranks = [layout_for(files, Parallel(tp), rank) for rank in reversed(range(tp))]
        held = np.zeros(len(whole.catalog), np.int64)
        for layout in ranks:
            layout.prove_cover()
            np.add.at(held, layout.pieces.tensor, (layout.pieces.stop - layout.pieces.start).prod(axis=1))
        size = whole.catalog.shape.prod(axis=1)
        copies = held / size
        split = [n for n, c in zip(whole.catalog.names, copies.tolist(), strict=True) if c == 1]
        assert set(copies.tolist()) == {1, tp}
        assert {"lm_head.weight", "model.layers.0.self_attn.q_proj.weight"} <= set(split)


def names_in(layout: Layout) -> set[str]:
    return {layout.tensor_of(i).name for i in range(len(layout.pieces))}


@pytest.mark.skipif(not hasattr(DistributedConfig, "ep_size"), reason="this transformers has no ep_size")
def test_expert_and_pipeline_parallel() -> None:
    files = ModelFiles({"config.json": json.dumps(model_config("qwen3_moe")).encode()})
    ranks = [layout_for(files, Parallel(2, ep=2), rank) for rank in range(2)]
    experts = [{name.split(".")[5] for name in names_in(layout) if ".experts." in name} for layout in ranks]
    assert experts == [{"0", "1", "2", "3"}, {"4", "5", "6", "7"}]
    stages = [layout_for(files, Parallel(pp=2), rank) for rank in range(2)]
    names = [names_in(layout) for layout in stages]
    assert names[0].isdisjoint(names[1])
    assert names[0] | names[1] == set(stages[0].catalog.names)


def test_models_that_are_refused() -> None:
    def config(**changes: object) -> ModelFiles:
        return ModelFiles({"config.json": json.dumps({**model_config("llama"), **changes}).encode()})

    with pytest.raises(ConfigError, match="model_type 'martian' is unknown"):
        layout_for(config(model_type="martian"), Parallel())
    with pytest.raises(ConfigError, match="architectures names MartianForCausalLM"):
        layout_for(config(architectures=["MartianForCausalLM"]), Parallel())
    for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "martian"):
        with pytest.raises(LayoutError, match=f"quantization_config: quantizer {method} can't be used here: "):
            layout_for(config(quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True}), Parallel())
    with pytest.raises(ConfigError, match="rank 2 is not below 2"):
        layout_for(config(), Parallel(2), 2)


BAD_CONFIGS: dict[str, list[object]] = {
    "hidden_size": [float("nan"), "64", True, 65, 2**70],
    "num_attention_heads": [0, 7, 1.5],
    "head_dim": [0],
    "vocab_size": [-5, "x"],
    "num_hidden_layers": ["2", 10**9, 10**400, float("inf")],
    "architectures": [5, [5], "Llama", {"a": 1}, ["AutoModel"]],
    "layer_types": [5],
    "num_labels": ["x", 10**9],
    "text_config": [{"num_experts": 1e9}],
    "id2label": [5],
    "hidden_act": ["nope"],
    "pad_token_id": [10**9],
    "quantization_config": [5],
    "rope_parameters": [5, {"rope_type": "yarn"}],
    "dtype": [5],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_CONFIGS.items() for value in values])
def test_a_config_that_makes_no_sense_is_refused_at_once(key: str, value: object) -> None:
    right = ModelFiles({"config.json": json.dumps(model_config("llama")).encode()})
    wrong = ModelFiles({"config.json": json.dumps({**model_config("llama"), key: value}).encode()})
    with pytest.raises(ConfigError, match=r"^config\.json: "):
        catalog_of(wrong)
    for parallel in (Parallel(), Parallel(2)):
        with pytest.raises(ConfigError, match=r"^config\.json: "):
            layout_for(wrong, parallel, 0, catalog_of(right))


def test_as_many_layers_as_the_checkpoint_has_tensors_are_no_matter() -> None:
    config = {**model_config("llama"), "num_hidden_layers": 5000}
    files = ModelFiles({"config.json": json.dumps(config).encode()})
    with pytest.raises(ConfigError, match="num_hidden_layers is 5000, at most 4999 are possible here"):
        config_of(files, 4999)
    assert config_of(files, 5000).num_hidden_layers == 5000


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(directory: Path) -> None:
    catalog = Checkpoint.open(directory).catalog
    norm = "model.layers.1.input_layernorm.weight"

    def changed(**fields: object) -> Catalog:
        return Catalog.of(spec._replace(**fields) if spec.name == norm else spec for spec in catalog)

    with pytest.raises(LayoutError, match=rf"^{norm}: the engine made it without a checkpoint tensor"):
        layout_for(directory, Parallel(2), 0, Catalog.of(spec for spec in catalog if spec.name != norm))
    with pytest.raises(LayoutError, match=rf"^{norm}: the engine casts F8_E4M3 to BF16"):
        layout_for(directory, Parallel(2), 0, changed(dtype="F8_E4M3"))
    with pytest.raises(LayoutError, match=r"LlamaForCausalLM at tp=2: transformers fails"):
        layout_for(directory, Parallel(2), 0, changed(shape=(95,)))
    extra = Catalog.of([*catalog, TensorSpec("visual.weight", "BF16", (4,))])
    assert layout_for(directory, Parallel(2), 0, extra).ignored == {"visual.weight": "unknown to LlamaForCausalLM"}


class Keeping(LlamaForCausalLM):
    """Keeps a value, as one may for a heuristic."""

    def eval(self) -> Self:
        self.first = self.model.norm.weight[0].item()
        return super().eval()


class Doubling(LlamaForCausalLM):
    """Keeps a tensor of its own, computed out of weights."""

    def eval(self) -> Self:
        self.doubled = self.model.norm.weight.data * 2
        return super().eval()


@pytest.mark.parametrize(("kind", "reason"), [(Keeping, "keeps the value"), (Doubling, "outside of its parameters")])
def test_what_a_model_keeps_outside_its_parameters_is_refused(directory: Path, kind: type[LlamaForCausalLM], reason: str) -> None:
    """Its values are not there while the layout is found out."""
    with pytest.raises(LayoutError, match=reason):
        whole_layout(ModelFiles.of(directory), Checkpoint.open(directory).catalog, kind)


def test_names_that_should_be_tied_and_differ_are_not_tied(directory: Path, tmp_path: Path) -> None:
    """As after transformers' own load, which compares their values."""
    for file in directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    opened = open_model(tmp_path, Checkpoint.open(tmp_path).catalog)
    assert opened.model.all_tied_weights_keys == stock_model(tmp_path).all_tied_weights_keys == {}


def test_a_process_group_is_left_alone(directory: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with pytest.raises(HostError, match="already has a process group"):
            layout_for(directory, Parallel(2))
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def test_the_tokenizer_spells_any_text() -> None:
    words = tokenizer(2000)
    text = "Weights travel; naïve 漢字\n\ttoo."
    assert words.decode(words(text)["input_ids"]) == text
    assert len(words) == 2000
    assert len(words("weights")["input_ids"]) < 7
