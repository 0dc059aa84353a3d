"""A GGUF file is read as llama.cpp reads it, or refused by the name of what would be read otherwise."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from support import gguf_files
from support.gguf_files import CASES, CONTEXT, Change
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from besa_cli.errors import BesaError
from besa_cli.models.gguf import convert as gguf_models
from besa_cli.models.gguf import file_header, splits, vocabulary


def converted(file: Path, directory: Path) -> Path:
    directory.mkdir()
    gguf_models.convert(file, directory)
    return directory


def logits(model: PreTrainedModel, count: int) -> torch.Tensor:
    tokens = torch.randint(0, 260, (1, count), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model.float().eval()(tokens).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_comes_back_and_computes_the_same(case: str, tmp_path: Path) -> None:
    """The windows, the caps and the scaling of positions all show within 120 tokens."""
    model = gguf_files.model(case)
    back = converted(gguf_files.write(tmp_path / "x.gguf", case, model), tmp_path / "back")
    stored = load_file(back / "model.safetensors")
    wanted = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    assert stored.keys() == wanted.keys()
    for name, value in stored.items():  # a norm stored with 1 added loses its last bits
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=3e-7)
    found = AutoModelForCausalLM.from_pretrained(back)
    torch.testing.assert_close(logits(found, 120), logits(model, 120), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the plain case with a change of its metadata, its tensors or its configuration."""
    model = gguf_files.model("llama")
    count = iter(range(1000))

    def write(change: Change = lambda _: None) -> Path:
        return gguf_files.write(tmp_path_factory.mktemp(str(next(count))) / "x.gguf", "llama", model, change=change)

    return write


def setting(key: str, value: Any) -> Change:
    """Sets a field, or leaves it out for None."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        add: dict[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool,
            int: writer.add_int64,
            float: writer.add_float64,
            str: writer.add_string,
        }
        if value is not None:
            put: Callable[[str, Any], None] = writer.add_array
            add.get(type(value), put)(key, value)

    return change


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.sliding_window", 16),
        ("llama.attention.key_length_mla", 16),
        ("llama.attention.scale", 0.5),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.attention.max_alibi_bias", 8.0),
        ("llama.attention.causal", False),
        ("llama.attn_logit_softcapping", 50.0),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.logit_scale", 0.5),
        ("llama.expert_count", 8),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.type", 3),
        ("llama.rope.scaling.factor", 0.0),
        ("llama.rope.scaling.factor", float("nan")),
        ("llama.rope.scaling.attn_factor", 1.2),
        ("llama.rope.dimension_count", 8),
        ("llama.rope.dimension_sections", [4, 4, 8, 0]),
        ("llama.rope.freq_base", -1.0),
        ("llama.rope.freq_base", "10000"),
        ("llama.attention.head_count", [4, 2]),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.value_length", 8),
        ("llama.attention.layer_norm_rms_epsilon", None),
        ("llama.attention.layer_norm_rms_epsilon", 0.0),
        ("llama.block_count", 10**9),
        ("llama.block_count", 1),
        ("llama.context_length", 10**9),
        ("llama.vocab_size", 5),
        ("llama.something_new", True),
        ("qwen2.block_count", 2),
        ("adapter.type", "lora"),
        ("split.count", 2),
        ("split.tensors.count", 7),
        ("general.type", "adapter"),
        ("tokenizer.ggml.pre", "jais-2"),
        ("tokenizer.ggml.pre", 7),
        ("tokenizer.ggml.model", "bert"),
        ("tokenizer.ggml.tokens", ["a", "b"]),
        ("tokenizer.ggml.tokens", ["a"] * gguf_files.WORDS),
        ("tokenizer.ggml.merges", ["zz yy"]),
        ("tokenizer.ggml.merges", ["ab"]),
        ("tokenizer.ggml.token_type", [1, 2, 3]),
        ("tokenizer.ggml.bos_token_id", 10**6),
        ("tokenizer.ggml.eos_token_id", -2),
        ("tokenizer.ggml.add_space_prefix", True),
        ("tokenizer.ggml.add_bos_token", "yes"),
        ("tokenizer.ggml.remove_extra_whitespaces", True),
        ("tokenizer.ggml.normalizer.lowercase", True),
        ("tokenizer.ggml.precompiled_charsmap", [1, 2]),
        ("tokenizer.huggingface.json", "{}"),
        ("tokenizer.chat_template", 5),
    ],
)
def test_what_would_mean_another_model_is_refused_by_its_key(
    key: str, value: Any, llama: Callable[..., Path], tmp_path: Path
) -> None:
    path = llama(setting(key, value))
    with pytest.raises(BesaError) as caught:
        converted(path, tmp_path / "back")
    assert key in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.author", "somebody"),
        ("general.sampling.temp", 0.7),
        ("quantize.imatrix.entries_count", 24),
        ("somebody.note", "converted on a Sunday"),
        ("split.count", 1),
        ("llama.attention.sliding_window", CONTEXT),
        ("llama.attention.scale", 0.25),
        ("llama.attention.causal", True),
        ("llama.expert_count", 0),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.attention.head_count", [4, 4]),
        ("llama.rope.scaling.type", "none"),
        ("llama.rope.scaling.factor", 1.0),
        ("llama.rope.scaling.finetuned", False),
        ("llama.tensor_data_layout", "Meta AI original pth"),
        ("tokenizer.ggml.eot_token_id", 261),
        ("tokenizer.ggml.fim_pre_token_id", 3),
        ("tokenizer.ggml.add_sep_token", False),
    ],
)
def test_what_changes_nothing_is_passed_over(key: str, value: Any, llama: Callable[..., Path], tmp_path: Path) -> None:
    plain = converted(llama(), tmp_path / "plain")
    found = converted(llama(setting(key, value)), tmp_path / "found")
    for file in plain.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_rot_embd.weight", "blk.1.attn_q_norm.weight", "blk.0.ffn_gate_inp.weight", "output.bias", "foo"],
)
def test_a_tensor_that_the_model_has_no_place_for_is_refused_by_its_name(
    name: str, llama: Callable[..., Path], tmp_path: Path
) -> None:
    path = llama(lambda writer: writer.add_tensor(name, torch.ones(64).numpy()))
    with pytest.raises(BesaError, match=name):
        converted(path, tmp_path / "back")


def test_a_bias_that_no_block_has_is_zero_and_one_that_some_lack_is_missing(
    llama: Callable[..., Path], tmp_path: Path
) -> None:
    def biased(*blocks: int) -> Change:
        def change(writer: gguf.GGUFWriter) -> None:
            for block in blocks:
                writer.add_tensor(f"blk.{block}.attn_v.bias", torch.ones(32).numpy())

        return change

    weights = load_file(converted(llama(biased(0, 1)), tmp_path / "both") / "model.safetensors")
    assert weights["model.layers.1.self_attn.v_proj.bias"].eq(1).all()
    assert not weights["model.layers.1.self_attn.q_proj.bias"].any()
    with pytest.raises(BesaError, match=r"lacks model\.layers\.1\.self_attn\.v_proj\.bias"):
        converted(llama(biased(0)), tmp_path / "one")


def test_factors_of_frequencies_count_whatever_they_were_made_from(llama: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp divides frequency i by factor i; transformers' own Llama 3 rule would not give these."""
    factors = torch.tensor([1.0, 1.5, 1.25, 2.0, 3.0, 2.5, 7.0, 4.0])
    back = converted(llama(lambda writer: writer.add_tensor("rope_freqs.weight", factors.numpy())), tmp_path / "back")
    found = AutoModelForCausalLM.from_pretrained(back)
    logits(found, CONTEXT)  # what frequencies it uses may depend on the length
    wanted = 10000.0 ** -(torch.arange(0, 16, 2) / 16) / factors
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, wanted)
    assert found.model.rotary_emb.attention_scaling == 1.0


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(BesaError, match=r"x\.gguf is a pipe"):
        file_header.read(tmp_path / "x.gguf")


# What llama.cpp (xllamacpp 2026.10) makes of TEXT with the vocabulary of `revealing`: pairs show where words end.
TEXT = "aaa aA1'a \n!a11 1aa'A'!  1\n\n a!1111"


def revealing() -> tuple[list[str], list[str]]:
    """Tokens and merges: every byte, every pair of seven characters, and a word that no merge makes."""
    from tokenizers import pre_tokenizers

    seven = "aA1'!ĠĊ"
    pairs = [(first, second) for first in seven for second in seven]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs), "aaa"]
    return tokens, [" ".join(pair) for pair in pairs]


# Names -> the tokens, "Ġ" a space and "Ċ" a line feed.
SPLITS = {
    "gpt-2 phi-2 mpt olmo jais exaone4 mellum modern-bert gigachat a.x-4.0 trillion":
        "aa a Ġ aA 1 ' a Ġ Ċ ! a 11 Ġ1 aa ' A '! Ġ Ġ1 ĊĊ Ġa ! 11 11",
    "smollm starcoder refact codeshell minerva-7b":
        "aa a Ġ aA 1 ' a Ġ Ċ ! a 1 1 Ġ 1 aa ' A '! ĠĠ 1 ĊĊ Ġa ! 1 1 1 1",
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2":
        "aaa Ġ aA 1 'a ĠĊ !a 11 Ġ 1 aa 'A '! Ġ Ġ 1 ĊĊ Ġa ! 11 1 1",
    "dbrx smaug-bpe": "aa a Ġ aA 1 'a ĠĊ !a 11 Ġ 1 aa 'A '! Ġ Ġ 1 ĊĊ Ġa ! 11 1 1",
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open qwen35":
        "aa a Ġ aA 1 'a ĠĊ !a 1 1 Ġ 1 aa 'A '! Ġ Ġ 1 ĊĊ Ġa ! 1 1 1 1",
    "tekken": "aaa Ġa A 1 'a ĠĊ !a 1 1 Ġ 1 aa 'A '! Ġ Ġ 1 ĊĊ Ġa ! 1 1 1 1",
    "gpt-4o llama4 kanana2 talkie minimax-m2": "aa a Ġa A 1 'a ĠĊ !a 11 Ġ 1 aa 'A '! Ġ Ġ 1 ĊĊ Ġa ! 11 1 1",
    "bloom gpt3-finnish": "aa a Ġ aA 1' a ĠĊ ! a1 1 Ġ1 aa ' A' !Ġ Ġ1 ĊĊ Ġa ! 11 11",
    "falcon": "aa a Ġ aA 1 ' a ĠĊ ! a 11 Ġ1 aa ' A '! Ġ Ġ1 ĊĊ Ġa ! 11 1 1",
}  # fmt: skip


def header(path: Path, fields: dict[str, Any]) -> file_header.Header:
    return file_header.Header(path=path, architecture="llama", tensors={}, fields=fields)


def tokenizer(directory: Path, tokens: list[str], **fields: Any) -> Any:
    """What stock transformers makes of the tokenizer of a file with these fields."""
    named = {f"tokenizer.ggml.{key}": value for key, value in {"tokens": tokens, **fields}.items()}
    vocabulary.save(header(directory / "x.gguf", named), directory, vocab_size=len(tokens), longest=None)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(("name", "wanted"), [(name, SPLITS[key]) for key in SPLITS for name in key.split()])
def test_words_are_split_as_llama_cpp_splits_them(name: str, wanted: str, tmp_path: Path) -> None:
    tokens, merges = revealing()
    found = tokenizer(tmp_path, tokens, model="gpt2", pre=name, merges=merges)
    assert found.tokenize(TEXT) == wanted.split()


def test_every_way_to_split_words_is_compared_with_llama_cpp() -> None:
    assert splits.WAYS.keys() == {name for names in SPLITS for name in names.split()}


CHARACTERS = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
    *"▁theinabg", "in", "he", "th", "the", "▁the", "▁in", "▁▁", "ing", "<keep>",
]  # fmt: skip
KINDS = [2, 3, 3, *[6] * 256, *[1] * (len(CHARACTERS) - 260), 4]


@pytest.mark.parametrize(
    ("text", "prefixed", "wanted"),  # as llama.cpp reads them
    [
        ("the in", True, "▁the ▁in"),
        ("the in", False, "the ▁in"),
        (" the", True, "▁ ▁the"),
        ("thing é\n", True, "▁ th ing ▁ <0xC3> <0xA9> <0x0A>"),
        ("a</s>the<keep>in", True, "▁ a </s> ▁the <keep> ▁in"),
    ],
)
def test_characters_are_joined_as_llama_cpp_joins_them(text: str, prefixed: bool, wanted: str, tmp_path: Path) -> None:
    scores = [-float(number) for number in range(len(CHARACTERS))]
    found = tokenizer(
        tmp_path, CHARACTERS, model="llama", scores=scores, token_type=KINDS, add_space_prefix=prefixed,
        bos_token_id=1, eos_token_id=2, unknown_token_id=0,
    )  # fmt: skip
    assert found.tokenize(text) == wanted.split()
    assert found(text).input_ids[0] == 1  # what llama.cpp puts before a text of such a tokenizer by itself


@pytest.mark.parametrize(
    ("name", "fields", "framed"),
    [
        ("gpt-2", {}, "a"),
        ("llama-bpe", {}, "<s> a"),
        ("llama-bpe", {"add_bos_token": False}, "a"),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, "<s> a </s>"),
    ],
)
def test_the_tokens_around_a_text_are_those_that_the_file_or_its_kind_says(
    name: str, fields: dict[str, Any], framed: str, tmp_path: Path
) -> None:
    tokens, merges = revealing()
    found = tokenizer(
        tmp_path, [*tokens, "<s>", "</s>"], model="gpt2", pre=name, merges=merges, bos_token_id=len(tokens),
        eos_token_id=len(tokens) + 1, **fields,
    )  # fmt: skip
    assert found.convert_ids_to_tokens(found("a").input_ids) == framed.split()


def test_a_file_from_before_ways_had_names_is_read_as_gpt_2s_and_says_so(
    llama: Callable[..., Path], tmp_path: Path, notes: list[str]
) -> None:
    named = gguf_models.directory(llama(), notify=notes.append)
    unnamed = gguf_models.directory(llama(setting("tokenizer.ggml.pre", None)), notify=notes.append)
    assert ["tokenizer.ggml.pre" in note for note in notes] == [False, True]
    assert (named / "tokenizer.json").read_bytes() == (unnamed / "tokenizer.json").read_bytes()


def test_the_chat_template_comes_along(llama: Callable[..., Path], tmp_path: Path) -> None:
    back = converted(llama(setting("tokenizer.chat_template", "{{ messages[0].content }}!")), tmp_path / "back")
    found = AutoTokenizer.from_pretrained(back)
    assert found.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab!"
