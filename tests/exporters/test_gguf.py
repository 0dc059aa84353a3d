"""GGUF files, read by the gguf package and by transformers; what cannot be written is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from safetensors.torch import load_file
from support import exported, tiny_models
from support.llamas import MERGES, VOCABULARY, byte_tokenizer, stage
from torch import Tensor

from besa_cli import exporters
from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.exporters.gguf import vocabulary
from besa_cli.jobs.export import ExportJob
from besa_cli.models.gguf import convert as gguf_models


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Run directories, each made once."""
    made: dict[str, Run] = {}

    def run(name: str = "plain") -> Run:
        changes: dict[str, dict[str, Any]] = {
            "plain": {},
            "tied": {"tied": True},
            "biased": {"attention_bias": True, "mlp_bias": True},
            "llama3": {"rope": "llama3"},
            "linear": {"rope": "linear"},
        }
        if name not in made:
            made[name] = stage(tmp_path_factory.mktemp(name), **changes[name])
        return made[name]

    return run


def export(run: Run, kind: str) -> Path:
    directory = run.exports / f"gguf-{kind}"
    return (directory if directory.exists() else exported.export(run, "gguf", type=kind)) / f"model-{kind}.gguf"


def values(file: Path) -> dict[str, tuple[str, Tensor]]:
    """Name → type and values of each tensor, as the gguf package reads them."""
    found = {}
    for tensor in GGUFReader(file).tensors:
        kind = GGMLQuantizationType(tensor.tensor_type)
        whole = quants.dequantize(np.array(tensor.data), kind).astype(np.float32)
        found[tensor.name] = (kind.name, torch.from_numpy(whole.reshape(tuple(reversed(tensor.shape.tolist())))))
    return found


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order, row by row: row 2 i of a head is its row i, row 2 i + 1 its row i + half."""
    rows = tensor.shape[0] // heads
    order = [head * rows + index // 2 + (index % 2) * (rows // 2) for head in range(heads) for index in range(rows)]
    return tensor[order]


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def expected(run: Run) -> dict[str, Tensor]:
    """The stage's tensors by llama.cpp's names, rows of queries and keys in its order."""
    found = {}
    for name, tensor in tiny_models.weights(run.stage("pruned")).items():
        renamed = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        renamed = renamed.replace("lm_head", "output").replace("model.layers.", "blk.")
        for own, theirs in NAMES.items():
            renamed = renamed.replace(f".{own}.", f".{theirs}.")
        heads = 4 if "attn_q." in renamed else 2 if "attn_k." in renamed else 0
        found[renamed] = interleaved(tensor.float(), heads) if heads else tensor.float()
    return found


@pytest.mark.parametrize("name", ["plain", "tied", "biased"])
def test_bf16_holds_the_stage_bit_for_bit(name: str, runs: Callable[..., Run]) -> None:
    found, wanted = values(export(runs(name), "BF16")), expected(runs(name))
    assert found.keys() == wanted.keys()
    for key, (kind, tensor) in found.items():
        assert kind == ("BF16" if tensor.dim() == 2 else "F32")
        assert torch.equal(tensor, wanted[key]), key


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_values_are_those_of_the_type_and_zeros_stay(kind: str, runs: Callable[..., Run]) -> None:
    run = runs()
    found, wanted, lost = values(export(run, kind)), expected(run), 0
    for key, (stored, tensor) in found.items():
        exact = wanted[key]
        if tensor.dim() < 2:
            assert torch.equal(tensor, exact)
            continue
        assert not tensor[exact == 0].any(), key
        if stored == "F16":
            assert torch.equal(tensor, exact.half().float())
        elif stored == "Q8_0":
            blocks, there = exact.reshape(-1, 32), tensor.reshape(-1, 32)
            step = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
            assert ((there - blocks).abs() <= 0.57 * step).all()  # half a step, and what fp16 rounds off 127 of them
        else:
            assert (stored, tensor.shape[1] % 32 != 0) == ("BF16", True)
            assert torch.equal(tensor, exact)
        if key.startswith("blk."):
            lost += int(((tensor == 0) & (exact != 0)).sum())
    manifest = json.loads((run.exports / f"gguf-{kind}" / "export.json").read_text())
    assert manifest["sizes"]["rounded_to_zero"] == lost
    assert any(stored == kind for stored, _ in found.values())


@pytest.mark.parametrize("name", ["plain", "tied", "biased", "llama3", "linear"])
def test_it_is_read_back_as_the_stage(name: str, runs: Callable[..., Run], tmp_path: Path) -> None:
    tmp_path.joinpath("back").mkdir()
    gguf_models.convert(export(runs(name), "BF16"), tmp_path / "back")
    back, wanted = load_file(tmp_path / "back" / "model.safetensors"), tiny_models.weights(runs(name).stage("pruned"))
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key].bfloat16(), wanted[key]) for key in wanted)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    there = json.loads((runs(name).stage("pruned") / "config.json").read_text())
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
            "rms_norm_eps", "max_position_embeddings", "rope_parameters")  # fmt: skip
    assert {key: config[key] for key in same} == {key: there[key] for key in same}


@pytest.mark.parametrize("name", ["plain", "linear", "llama3"])
def test_rotary_frequencies_are_those_of_transformers(name: str, runs: Callable[..., Run]) -> None:
    """llama.cpp turns channel pair i by position · theta^(−2i/d) / factor_i; a linear factor divides the position."""
    file = export(runs(name), "BF16")
    fields = {key: field.contents() for key, field in GGUFReader(file).fields.items() if "rope" in key}
    width = fields["llama.rope.dimension_count"]
    plain = fields["llama.rope.freq_base"] ** (-torch.arange(0, width, 2) / width)
    factors = values(file).get("rope_freqs.weight", ("", torch.ones(width // 2)))[1]
    found = plain / factors / fields.get("llama.rope.scaling.factor", 1.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(runs(name).stage("pruned"))
    torch.testing.assert_close(found, model.model.rotary_emb.inv_freq)
    assert ("rope_freqs.weight" in values(file)) == (name == "llama3")


def test_tokens_merges_and_special_tokens_are_the_tokenizers(runs: Callable[..., Run]) -> None:
    fields = {key: field.contents() for key, field in GGUFReader(export(runs(), "BF16")).fields.items()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs().stage("pruned"))
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == VOCABULARY
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    kinds = fields["tokenizer.ggml.token_type"]
    assert [kinds[number] for number in (0, tokenizer.bos_token_id, len(tokenizer))] == [1, 3, 5]
    assert fields["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("family", [family for family in tiny_models.FAMILIES if family != "llama"])
def test_other_architectures_are_refused_by_name(family: str, tmp_path: Path) -> None:
    run = exported.stage(tmp_path, family)
    with pytest.raises(
        BesaError, match=f"is a '{json.loads((run.stage('pruned') / 'config.json').read_text())['model_type']}'"
    ):
        ExportJob(run, exporters.load("gguf"))
    assert not run.exports.exists()


def test_other_tokenizers_and_rotary_embeddings_are_refused(tmp_path: Path, runs: Callable[..., Run]) -> None:
    words = exported.stage(tmp_path / "words")
    with pytest.raises(BesaError, match="is a tokenizer of kind WordLevel"):
        ExportJob(words, exporters.load("gguf"))
    (words.stage("pruned") / "tokenizer.json").unlink()
    with pytest.raises(BesaError, match=r"has no tokenizer\.json"):
        ExportJob(words, exporters.load("gguf"))
    run = exported.copy_of(runs(), tmp_path / "run")
    path = run.stage("pruned") / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    path.write_text(json.dumps(config))
    with pytest.raises(BesaError, match="rotary embeddings of type 'dynamic'"):
        ExportJob(run, exporters.load("gguf"))


def tokenizer_file(directory: Path, **changes: Any) -> Path:
    byte_tokenizer(directory)
    facts = json.loads((directory / "tokenizer.json").read_text())
    facts |= changes
    (directory / "tokenizer.json").write_text(json.dumps(facts))
    return directory


def test_words_split_in_a_way_without_a_name_are_refused(tmp_path: Path) -> None:
    assert vocabulary.read(tokenizer_file(tmp_path / "a"), VOCABULARY).pre == "gpt-2"
    digits = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]}  # fmt: skip
    assert vocabulary.read(tokenizer_file(tmp_path / "b", pre_tokenizer=digits), VOCABULARY).pre == "smollm"
    prefixed = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for number, unusual in enumerate((prefixed, {"type": "Whitespace"}, None)):
        with pytest.raises(BesaError, match="splits words by a rule"):
            vocabulary.read(tokenizer_file(tmp_path / str(number), pre_tokenizer=unusual), VOCABULARY)
    with pytest.raises(BesaError, match="has the token id 261, the model has 100 embeddings"):
        vocabulary.read(tmp_path / "a", 100)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PREPEND = {"type": "Prepend", "prepend": "▁"}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def character_tokenizer(directory: Path, merges: list[list[str]], *more: str, **changes: Any) -> Path:
    """Pairs of characters with bytes for what has no token, as sentencepiece makes them."""
    singles = sorted({*"".join("".join(pair) for pair in merges), *"▁aA1"})
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *singles, *dict.fromkeys("".join(pair) for pair in merges), *more]
    model = {
        "type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges,
        "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True,
    }  # fmt: skip
    special = [
        {"id": number, "content": tokens[number], "special": True, "normalized": False, "lstrip": False,
         "rstrip": False, "single_word": False} for number in range(3)
    ]  # fmt: skip
    normalizer = {"type": "Sequence", "normalizers": [PREPEND, SPACES]}
    plain = {"model": model, "added_tokens": special, "normalizer": normalizer, "pre_tokenizer": None, "decoder": None}
    return tokenizer_file(directory, **{**plain, **changes})


def test_pairs_of_plain_characters_get_scores_in_the_order_of_their_merges(tmp_path: Path) -> None:
    merges = [["b", "a"], ["a", "b"], ["▁", "ab"]]
    found = vocabulary.read(character_tokenizer(tmp_path, merges), 272)
    place = {token: number for number, token in enumerate(found.tokens)}
    assert (found.model, found.tokens[271], found.prefixed) == ("llama", "[PAD271]", True)
    kinds = [found.kinds[place[token]] for token in ("<unk>", "<s>", "<0x0A>", "a", "▁ab", "[PAD271]")]
    assert kinds == [2, 3, 6, 1, 1, 5]
    scores = {token: found.scores[place[token]] for token in ("ba", "ab", "▁ab", "a", "<0x0A>")}
    assert scores["ba"] > scores["ab"] > scores["▁ab"] > max(scores["a"], scores["<0x0A>"])


@pytest.mark.parametrize(
    ("changes", "prefixed"),
    [
        ({}, True),
        ({"normalizer": SPACES}, False),
        ({"normalizer": SPACES, "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        }}, False),
        ({"normalizer": None, "pre_tokenizer": {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False,
        }}, True),
        ({"normalizer": None, "pre_tokenizer": {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True,
        }}, False),
    ],
)  # fmt: skip
def test_a_space_before_the_text_is_written_as_the_tokenizer_has_it(
    changes: dict[str, Any], prefixed: bool, tmp_path: Path
) -> None:
    found = vocabulary.read(character_tokenizer(tmp_path / "a", [["a", "b"], ["▁", "ab"]], **changes), 300)
    assert found.prefixed is prefixed
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    found.add_to(writer, tmp_path / "a")
    assert writer.kv_data[0]["tokenizer.ggml.add_space_prefix"].value is prefixed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [PREPEND, {"type": "Lowercase"}, SPACES]}}, "Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, SPACES]}}, "NFKC"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "Digits"),
        ({"normalizer": None}, "normalizes or splits texts"),
        ({"normalizer": None, "pre_tokenizer": {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True,
        }}, "Metaspace"),
    ],
)  # fmt: skip
def test_texts_changed_or_split_as_llama_cpp_does_not_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = character_tokenizer(tmp_path, [["a", "b"], ["▁", "ab"], ["▁", "▁"]], **changes)
    with pytest.raises(BesaError, match=said):
        vocabulary.read(path, 300)


@pytest.mark.parametrize(
    "merges",
    [
        [["a", "b"], ["b", "c"], ["ab", "c"]],  # llama.cpp joins a and bc, too
        [["a", "b"], ["b", "c"], ["ab", "c"], ["b", "a"], ["a", "bc"]],  # one score cannot be before and after ba
    ],
)
def test_merges_that_scores_cannot_express_are_refused(merges: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="merges for the 2 pairs that form 'abc'"):
        vocabulary.read(character_tokenizer(tmp_path, merges), 300)


def test_tokens_for_all_bytes_and_bare_special_tokens_are_demanded(tmp_path: Path) -> None:
    path = character_tokenizer(tmp_path / "a", [["a", "b"]])
    facts = json.loads((path / "tokenizer.json").read_text())
    facts["added_tokens"][2]["rstrip"] = True
    (path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(BesaError, match="'</s>' with rstrip"):
        vocabulary.read(path, 300)
    facts["added_tokens"][2]["rstrip"] = False
    facts["model"]["vocab"] |= {"<0x41>_": facts["model"]["vocab"].pop("<0x41>")}
    (path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(BesaError, match="no token for 1 of 256 bytes"):
        vocabulary.read(path, 300)


def test_words_taken_whole_matter_only_where_merges_do_not_reach_them(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    facts = json.loads((tmp_path / "tokenizer.json").read_text())
    facts["model"]["ignore_merges"] = True  # llama.cpp merges in a tokenizer of GPT-2's kind
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    assert vocabulary.read(tmp_path, VOCABULARY).pre == "gpt-2"
    facts["model"]["merges"].remove(["ab", "c"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(BesaError, match="which changes 'abc'"):
        vocabulary.read(tmp_path, VOCABULARY)


@pytest.mark.parametrize("begins", [False, True])
def test_the_first_token_of_a_text_is_written_as_stock_transformers_puts_it(begins: bool, tmp_path: Path) -> None:
    first = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] if begins else []
    template = {
        "type": "TemplateProcessing", "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [260], "tokens": ["<s>"]}} if begins else {},
    }  # fmt: skip
    tokenizer_file(tmp_path, post_processor=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) is begins
    assert vocabulary.read(tmp_path, VOCABULARY).framed == {"bos": begins, "eos": False}


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_other_activations_than_llama_cpp_computes_are_refused(
    act: str, tmp_path: Path, runs: Callable[..., Run]
) -> None:
    run = exported.copy_of(runs(), tmp_path / "run")
    path = run.stage("pruned") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": act}))
    with pytest.raises(BesaError, match=f"hidden_act '{act}'"):
        ExportJob(run, exporters.load("gguf"))


def logits(directory: Path) -> Tensor:
    """What stock transformers computes in fp32 for tokens that reach as far as any scaling of positions does."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.randint(0, 260, (1, tiny_models.LONGEST), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("name", ["plain", "tied", "biased", "llama3", "linear"])
def test_what_is_exported_computes_the_same_when_it_is_read_back(
    name: str, runs: Callable[..., Run], tmp_path: Path
) -> None:
    gguf_models.convert(export(runs(name), "BF16"), tmp_path)
    torch.testing.assert_close(logits(tmp_path), logits(runs(name).stage("pruned")), rtol=1e-5, atol=1e-5)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path, runs(name).stage("pruned"))]
    text = " abc ab12 1212\n\n</s>ab  \t"
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
