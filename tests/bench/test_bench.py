"""`besa bench`: rounds and their figures, the processes that answer, llama.cpp by stand-ins, and what is refused."""

import io
import json
import stat
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFReader
from safetensors.torch import load_file
from support import exported, tiny_models

from besa_cli.bench import contenders, entry, gguf_files, machine, worker
from besa_cli.bench.contenders import Contender, LlamaBench, Process, RunTiming, TokenLoad
from besa_cli.bench.rounds import Rounds, compare
from besa_cli.checkpoint.runs import Run
from besa_cli.commands import bench
from besa_cli.errors import BesaError
from besa_cli.inference import loading
from besa_cli.system import memory

Besa = Callable[..., Any]  # conftest.Outcome

SHORT, LONG = TokenLoad(prompt=10, new=5, batch=1), TokenLoad(prompt=40, new=3, batch=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run directory with a stage and its sparse export."""
    made = exported.stage(tmp_path_factory.mktemp("bench"))
    exported.export(made, "sparse")
    return made


class Scripted:
    """A runner whose timings are written down before."""

    def __init__(self, name: str, seconds: dict[TokenLoad, list[tuple[float, float]]], calls: list[Any]) -> None:
        self.contender = Contender(name=name, program="transformers")
        self.weights_read: int | None = 600
        self._seconds = {workload: iter(values) for workload, values in seconds.items()}
        self._calls = calls

    def run(self, workload: TokenLoad) -> RunTiming | None:
        self._calls.append((self.contender.name, workload))
        if workload not in self._seconds:
            return None
        prefill, decode = next(self._seconds[workload])
        return RunTiming(prefill=prefill, decode=decode, resident=round(1000 * decode))

    def close(self) -> None:
        pass


def scripted_rounds() -> tuple[Rounds, list[Any]]:
    """Five rounds of two contenders; the second cannot run the long workload."""
    calls: list[Any] = []
    warm = (100.0, 100.0)
    first = Scripted(
        "first",
        {
            SHORT: [warm, (1, 2), (2, 8), (3, 1), (9, 9), (4, 4)],
            LONG: [warm, (5, 5), (1, 1), (2, 2), (3, 3), (4, 4)],
        },
        calls,
    )
    second = Scripted("sparse", {SHORT: [warm, (1, 1), (1, 1), (2, 5), (2, 2), (1, 1)]}, calls)
    reader = Scripted("memory", {SHORT: [(0.001, 0), (3, 0), (2, 0), (5, 0), (4, 0), (6, 0)]}, [])
    return Rounds([first, second], reader, [SHORT, LONG], 5), calls


def test_rounds_take_turns_and_medians_of_all_but_the_first_count() -> None:
    rounds, calls = scripted_rounds()
    assert list(rounds) == [0, 1, 2, 3, 4, 5]
    assert [name for name, workload in calls if workload == SHORT] == ["first", "sparse", "sparse", "first"] * 3
    first, sparse, long = rounds.results()
    assert [(each.name, each.workload) for each in (first, sparse, long)] == [
        ("first", SHORT),
        ("sparse", SHORT),
        ("first", LONG),
    ]
    assert first.prefill == 10 / statistics.median([1, 2, 3, 9, 4])
    assert first.decode == 4 / statistics.median([2, 8, 1, 9, 4])
    assert long.prefill == 4 * 40 / 3
    assert long.decode == 4 * 2 / 3
    assert first.decode_seconds == [2, 8, 1, 9, 4]
    assert first.resident == 4000  # of the last round
    assert rounds.bandwidth == 600 / 2  # the fastest reading that counts
    assert first.share == pytest.approx(600 * (4 / 4) / 300)
    assert long.share == pytest.approx(600 * (2 / 3) / 300)  # the weights are read once for all four sequences


def test_sparse_is_compared_and_a_loss_is_said_plainly() -> None:
    rounds, _ = scripted_rounds()
    list(rounds)
    (comparison,) = compare(rounds.results(), "sparse")
    assert (comparison.other, comparison.workload) == ("first", SHORT)
    assert (comparison.prefill, comparison.decode, comparison.resident) == (3.0, 4.0, 0.25)
    assert "NOT faster" not in bench._sentence(comparison)
    assert bench._sentence(replace(comparison, prefill=0.9)).endswith("NOT faster: prefill")
    assert bench._sentence(replace(comparison, prefill=0.9, decode=1.0)).endswith("NOT faster: prefill and decode")


def test_a_model_whose_bytes_depend_on_the_token_has_no_share() -> None:
    rounds, _ = scripted_rounds()
    rounds.runners[0].weights_read = None
    list(rounds)
    assert [each.share is None for each in rounds.results()] == [True, False, True]


def asked(contender: Contender, *workloads: TokenLoad) -> list[dict[str, Any]]:
    """Answers of a worker in this process."""
    answers = io.StringIO()
    questions = io.StringIO("".join(json.dumps(each._asdict()) + "\n" for each in workloads))
    worker.serve(contender, questions, answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.mark.parametrize("packed", [False, True])
def test_a_worker_loads_a_model_and_times_every_workload(packed: bool, run: Run) -> None:
    contender = Contender(name="", program="transformers", path=str(run.exports / "sparse"), packed=packed)
    ready, *timings = asked(contender, SHORT, LONG)
    assert ready["weights_read"] > 0
    assert [set(each) for each in timings] == [{"prefill", "decode", "resident"}] * 2
    assert all(each["prefill"] > 0 and each["decode"] > 0 and each["resident"] > 1 << 20 for each in timings)


def test_every_new_token_is_generated_even_after_an_end_token(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks: list[Any] = []
    original = worker._clock

    def clock() -> Any:
        clocks.append(original())
        return clocks[-1]

    monkeypatch.setattr(worker, "_clock", clock)
    workload = TokenLoad(prompt=5, new=50, batch=2)
    asked(Contender(name="", program="transformers", path=str(run.stage("pruned"))), workload)
    assert len(clocks[0].times) == 1 + 50


def test_a_worker_answers_with_the_error() -> None:
    (answer,) = asked(Contender(name="", program="transformers", path="/nowhere"), SHORT)
    assert "/nowhere" in answer["error"]


def test_memory_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_READ", 1 << 20)
    ready, timing = asked(Contender(name="", program="reading"), SHORT)
    assert ready["weights_read"] == 1 << 20
    assert timing["prefill"] > 0
    loaded = worker._Reading()
    assert int(loaded._memory.view(torch.uint8).sum()) == 1 << 20  # every byte is there, as ones


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_that_a_token_reads_are_all_but_an_embedding_of_its_own(tied: bool, tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", tied=tied, dtype=torch.bfloat16)
    tensors = load_file(directory / "model.safetensors")
    expected = sum(tensor.nbytes for name, tensor in tensors.items() if tied or "embed_tokens" not in name)
    assert ("lm_head.weight" in tensors) is not tied
    assert loading.weights_read(loading.load(directory, torch.bfloat16)) == expected


def test_a_model_of_experts_reads_what_its_router_says(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    tiny_models.built(config).save_pretrained(tmp_path / "mixtral")
    assert loading.weights_read(loading.load(tmp_path / "mixtral", torch.float32)) is None


def test_packed_weights_are_counted_as_they_lie_in_memory(run: Run) -> None:
    dense = loading.weights_read(loading.load(run.stage("pruned"), torch.bfloat16))
    packed = loading.weights_read(loading.load(run.exports / "sparse", torch.bfloat16))
    stored = sum(
        tensor.nbytes
        for file in (run.exports / "sparse").glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if "embed_tokens" not in name and not name.endswith("weight_shape")
    )
    assert packed is not None
    assert dense is not None
    assert stored <= packed < dense


def test_dense_parameters_of_a_packed_model_are_no_part_of_a_mapped_file(run: Run) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what a process maps")
    model = loading.load(run.exports / "sparse", torch.bfloat16)
    assert model.training is False
    mapped = [line for line in maps.read_text().splitlines() if str(run.exports) in line]
    assert mapped == []


def test_the_weights_that_llama_cpp_reads_are_those_that_its_own_reader_lists(tmp_path: Path) -> None:
    for tied in (True, False):
        path = tmp_path / f"{tied}.gguf"
        _write_gguf(path, tied=tied)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
        expected = sum(size for name, size in sizes.items() if tied or name != "token_embd.weight")
        assert gguf_files.weights_read(path) == expected


def _write_gguf(path: Path, *, tied: bool, experts: bool = False) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    names = ["token_embd.weight", "blk.0.ffn_up.weight", *([] if tied else ["output.weight"])]
    for name in [*names, *(["blk.0.ffn_up_exps.weight"] if experts else [])]:
        writer.add_tensor(name, np.ones((4, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_mixtures_of_experts_read_what_the_router_says(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "experts.gguf", tied=True, experts=True)
    assert gguf_files.weights_read(tmp_path / "experts.gguf") is None


def program(path: Path, body: str) -> str:
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_llama_bench_is_asked_for_both_parts_and_read(tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    body = (
        f"open({str(words)!r}, 'w').write(json.dumps(sys.argv[1:]))\n"
        "print(json.dumps([{'n_prompt': 10, 'n_gen': 0, 'avg_ns': 2e9}, {'n_prompt': 0, 'n_gen': 4, 'avg_ns': 5e8}]))"
    )
    contender = Contender(name="llama.cpp", program="llama_cpp", path="model.gguf")
    runner = LlamaBench(contender, program(tmp_path / "llama-bench", body), 3, 100)
    timing = runner.run(SHORT)
    assert timing is not None
    assert (timing.prefill, timing.decode) == (2.0, 0.5)
    given = json.loads(words.read_text())
    pairs = dict(zip(given[::2], given[1::2], strict=True))
    assert pairs == {"-m": "model.gguf", "-p": "10", "-n": "4", "-r": "1", "-t": "3", "-o": "json"}
    assert runner.run(LONG) is None


@pytest.mark.parametrize("body", ["print('no json')", "print('[]')", "print(json.dumps([{'n_prompt': 10}]))"])
def test_other_answers_of_llama_bench_are_refused(body: str, tmp_path: Path) -> None:
    runner = LlamaBench(Contender(name="", program="llama_cpp"), program(tmp_path / "llama-bench", body), 1, None)
    with pytest.raises(BesaError, match="printed other results than expected"):
        runner.run(SHORT)


def test_a_llama_bench_that_fails_says_its_last_words(tmp_path: Path) -> None:
    body = "print('cannot load it', file=sys.stderr); sys.exit(3)"
    runner = LlamaBench(Contender(name="", program="llama_cpp"), program(tmp_path / "llama-bench", body), 1, None)
    with pytest.raises(BesaError, match="failed with code 3: cannot load it"):
        runner.run(SHORT)


def test_the_package_llama_cpp_evaluates_the_prompt_and_token_after_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[list[int]] = []

    class Llama:
        """The part of the package's class that is called."""

        def __init__(self, path: str, **options: Any) -> None:
            assert options["n_ctx"] == 64

        def n_vocab(self) -> int:
            return 100

        def reset(self) -> None:
            evaluated.clear()

        def eval(self, tokens: list[int]) -> None:
            evaluated.append(tokens)

        def sample(self, temp: float) -> int:
            return 7

    package = ModuleType("llama_cpp")
    monkeypatch.setattr(package, "Llama", Llama, raising=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    _write_gguf(tmp_path / "model.gguf", tied=True)
    contender = Contender(name="", program="llama_cpp", path=str(tmp_path / "model.gguf"), longest=64)
    ready, timing, other = asked(contender, SHORT, LONG)
    assert ready["weights_read"] == gguf_files.weights_read(tmp_path / "model.gguf")
    assert timing["decode"] >= 0
    assert [len(tokens) for tokens in evaluated] == [10, 1, 1, 1, 1]
    assert other == {"unsupported": True}


def test_a_process_that_cannot_load_passes_its_error_on() -> None:
    with pytest.raises(BesaError, match=r"^llama\.cpp Q4: \w+"):  # no package, or no file
        Process(Contender(name="llama.cpp Q4", program="llama_cpp", path="/nowhere"))


def test_a_process_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "WORKER", "besa_cli.no_such_module")
    with pytest.raises(BesaError, match="the process of dense ended with code 1"):
        Process(Contender(name="dense", program="transformers"))


def test_exports_of_another_stage_are_left_out(run: Run, tmp_path: Path) -> None:
    found = entry.of_stage(run, run.stage("pruned"))
    assert (found.dense, found.sparse) == (run.stage("pruned"), run.exports / "sparse")
    copied = exported.copy_of(run, tmp_path / "copy")
    other = exported.export(copied, "sparse")
    manifest = json.loads((other / "export.json").read_text())
    manifest["source"]["digest"] = "0" * 64
    (other / "export.json").write_text(json.dumps(manifest))
    assert entry.of_stage(copied, copied.stage("pruned")).sparse is None


def test_the_processor_is_the_one_that_the_system_names() -> None:
    name, information = machine.processor(), Path("/proc/cpuinfo")
    assert name
    assert not information.exists() or name in information.read_text()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run here, which takes seconds less than processes; one test starts real ones."""

    class Here:
        def __init__(self, contender: Contender) -> None:
            self.contender, self._loaded = contender, worker._load(contender)
            self.weights_read = self._loaded.weights_read

        def run(self, workload: TokenLoad) -> RunTiming | None:
            prefill, decode = self._loaded.run(workload) or (0.0, 0.0)
            return RunTiming(prefill=prefill, decode=decode, resident=1 << 30)

        def close(self) -> None:
            pass

    monkeypatch.setattr(entry, "Process", Here)
    monkeypatch.setattr(worker, "_READ", 1 << 20)


@pytest.mark.usefixtures("in_this_process")
def test_a_run_is_measured_dense_and_sparse(besa: Besa, run: Run, workplace: Path) -> None:
    sizes = ["--prompt-tokens", 8, "--prompt-tokens", 20, "--new-tokens", 3, "--batch", 1, "--batch", 2]
    outcome = besa("bench", "--run", run.path, *sizes, "--dtype", "bfloat16", "--json", "--plot", "speed.png")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert [(each["name"], *each["workload"].values()) for each in record["results"]] == [
        (name, prompt, 3, batch) for prompt in (8, 20) for batch in (1, 2) for name in ("dense bfloat16", "sparse")
    ]
    for each in record["results"]:
        size, batch = each["workload"]["prompt"], each["workload"]["batch"]
        assert len(each["prefill_seconds"]) == 5
        assert each["prefill"] == pytest.approx(size * batch / statistics.median(each["prefill_seconds"]))
        assert each["decode"] == pytest.approx(2 * batch / statistics.median(each["decode_seconds"]))
    assert len(record["comparisons"]) == 4
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert (workplace / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "llama.cpp is not installed" in outcome.err or entry.llama_cpp()
    (kept,) = run.speeds.glob("*.json")
    stored, names = json.loads(kept.read_text()), ("machine", "bandwidth", "rounds", "results", "comparisons")
    assert {name: stored[name] for name in names} == {name: record[name] for name in names}
    assert stored["model_digest"] == json.loads((run.path / "pruned/besa.json").read_text())["digest"]
    assert besa("bench", "--run", run.path, *sizes, "--dtype", "bfloat16").code == 0
    assert list(run.speeds.glob("*.json")) == [kept]  # the newest measurement of the same is kept
    assert kept.name in besa("show", run.path).out


def test_a_sparse_export_alone_is_measured_packed_and_expanded_in_processes(
    besa: Besa, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = besa("bench", "--model", run.exports / "sparse", "--prompt-tokens", 8, "--new-tokens", 3)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "GB/s from memory" in lines[0]
    assert [line.split()[0] for line in lines[3:5]] == ["dense", "sparse"]
    assert lines[5].startswith("sparse beside dense")
    assert not any(path.name == "speed" for path in run.exports.rglob("*"))


def refused(outcome: Any, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert len([line for line in outcome.err.splitlines() if line.startswith("error: ")]) == 1
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rounds", "4"], "--rounds 4 is less than 5"),
        (["--new-tokens", "1"], "--new-tokens 1 is not in 2"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0 is not in 1"),
        (["--batch", "1", "--batch", "-1"], "--batch -1 is not in 1"),
        (["--plot", "speed.txt"], "speed.txt is not a picture file"),
        (["--prompt-tokens", "60", "--new-tokens", "5"], "--prompt-tokens 60 and --new-tokens 5 are more than the 64"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(options: list[str], words: str, besa: Besa, run: Run) -> None:
    refused(besa("bench", "--run", run.path, *options), 2, words)


def test_a_directory_without_a_stage_is_refused(besa: Besa, tmp_path: Path) -> None:
    refused(besa("bench", "--run", tmp_path), 1, "has no stage")


def test_what_does_not_fit_into_memory_is_refused(besa: Besa, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    sizes = ["--prompt-tokens", 8, "--new-tokens", 3]
    refused(besa("bench", "--run", run.path, *sizes), 1, "GB together, 0.0 GB are free")
