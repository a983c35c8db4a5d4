"""`mpsearch fit` and `mpsearch search --device`: from a config alone, and what a run keeps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import BUDGET, Cli, one_line

from mpsearch.run import Run
from mpsearch.sizes import format_size, parse_size
from mpsearch.this_device import ThisDevice

EIGHT_B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
BARE = ["--overhead", "0", "--reserve", "0", "--utilization", "1", "--context", "16"]


@pytest.fixture
def eight_b(tmp_path: Path) -> Path:
    path = tmp_path / "llama-3.1-8b.json"
    path.write_text(json.dumps(EIGHT_B), encoding="utf-8")
    return path


def memory_for(mpsearch: Cli, model: object, weights_bytes: int) -> str:
    """What a device must have so that just so much is left for weights."""
    content = json.loads(mpsearch("fit", model, "--memory", "1GiB", *BARE, "--json").out)
    return f"{content['memory_bytes'] - content['left_bytes'] + weights_bytes}B"


# ------------------------------------------------------------------------------------ fit


def test_a_config_and_a_card_give_the_terms_the_formats_and_the_room(
    eight_b: Path, mpsearch: Cli
) -> None:
    asked = ["fit", eight_b, "--device", "rtx-3060-12gb", "--context", 8192]
    shown, content = mpsearch(*asked), json.loads(mpsearch(*asked, "--json").out)
    assert shown.code == 0
    assert shown.talk[-1].startswith(
        "next: mpsearch search MODEL --device rtx-3060-12gb --context 8192 -o"
    )
    assert content["device"] == "NVIDIA GeForce RTX 3060 12GB"
    assert content["parameters"] == 8_030_261_248
    assert content["kv_cache_bytes"] == 2**30
    lines = [line.strip() for line in shown.out.splitlines()]
    for term in content["terms"]:
        (row,) = [line for line in lines if line.startswith(term.replace("_", " "))]
        assert format_size(content[f"{term}_bytes"]) in row
        assert content["terms"][term] in row
    assert "█" in shown.out
    for row in content["formats"]:
        (line,) = [line for line in shown.out.splitlines() if line.split()[:1] == [row["format"]]]
        assert ("yes" if row["fits"] else "no") in line.split()
        assert format_size(row["weights_bytes"]) in line
    assert f"room for {content['bits_per_weight']:.2f} bits a weight" in shown.out
    assert "vllm's usual kernels do not take int2-g64, int3-g64: try" in shown.out
    assert [row["served"] for row in content["formats"]] == [False, False, True, True]
    plain = mpsearch(*asked, "--runtime", "transformers")
    assert "transformers unpacks compressed-tensors: in memory every weight is bf16" in plain.out
    assert "room for" not in plain.out


def test_every_flag_changes_its_term(eight_b: Path, mpsearch: Cli) -> None:
    def terms(*flags: object) -> dict[str, int]:
        asked = ["fit", eight_b, "--memory", "24GiB", "--context", 4096, *flags, "--json"]
        content = json.loads(mpsearch(*asked).out)
        return {key: content[f"{key}_bytes"] for key in (*content["terms"], "left")}

    plain = terms()
    for flags, term, size in (
        (["--batch", 4], "kv_cache", 4 * plain["kv_cache"]),
        (["--kv", "fp8"], "kv_cache", plain["kv_cache"] // 2),
        (["--prefill", 1024], "activation", plain["activation"] // 2),
        (["--overhead", "3GiB"], "runtime", 3 * 2**30),
        (["--utilization", 0.5], "unused", 12 * 2**30),
        (["--reserve", "5GiB"], "unused", 5 * 2**30),
        (["--runtime", "transformers"], "workspace", 4096 * 14336 * 2),
    ):
        changed = terms(*flags)
        assert changed[term] == size, flags
        others = [key for key in plain if key not in (term, "left")]
        if "--runtime" not in flags and "--batch" not in flags:
            assert {key: changed[key] for key in others} == {key: plain[key] for key in others}


def test_without_a_device_it_names_the_smallest_cards(eight_b: Path, mpsearch: Cli) -> None:
    shown = mpsearch("fit", eight_b, "--context", 8192)
    assert shown.code == 0
    (row,) = [line for line in shown.out.splitlines() if line.split()[:1] == ["int4-g64"]]
    assert "GB" in row
    assert "next: mpsearch search" in shown.talk[-1] and "--memory SIZE" in shown.talk[-1]


def test_a_run_says_the_longest_context_of_its_pick(whole: Path, mpsearch: Cli) -> None:
    asked = ["fit", whole, "--memory", "1GiB", *BARE]
    content = json.loads(mpsearch(*asked, "--json").out)
    assert content["pick"]["weights_bytes"] == Run.open(whole).find("best").stored_bytes
    assert content["pick"]["context"] > 0
    assert f"up to {content['pick']['context']:,} tokens of context" in mpsearch(*asked).out
    cards = mpsearch("fit", whole)
    assert content["pick"]["devices"][0] in cards.out


def test_a_context_beyond_the_model_is_said_and_goes_on(eight_b: Path, mpsearch: Cli) -> None:
    outcome = mpsearch("fit", eight_b, "--memory", "80GiB", "--context", 200_000)
    assert outcome.code == 0
    assert outcome.talk[0] == (
        "context 200,000 is beyond what the model was made for, 131,072 tokens"
    )


def test_nothing_that_fits_is_exit_code_3_with_ways_out(eight_b: Path, mpsearch: Cli) -> None:
    asked = ["fit", eight_b, "--device", "rtx 2060 6gb", "--context", 32768]
    for flags in ([], ["--json"]):
        outcome = mpsearch(*asked, *flags)
        assert outcome.code == 3
        assert outcome.out  # the terms all the same
        assert len(outcome.said) == 1 and "Ways out: " in outcome.said[0]


def test_a_runtime_is_not_asked_about_a_card_that_it_does_not_run_on(
    eight_b: Path, mpsearch: Cli
) -> None:
    one_line(
        mpsearch("fit", eight_b, "--device", "m3 max 64gb"), 2, "vllm does not run on Apple M3 Max"
    )


def test_the_next_command_asks_the_same(eight_b: Path, mpsearch: Cli) -> None:
    flags = ["--memory", "24GiB", "--context", "9000", "--batch", "2", "--kv", "fp8"]
    said = mpsearch("fit", eight_b, *flags).talk[-1]
    assert said == f"next: mpsearch search MODEL {' '.join(flags)} -o runs/NAME"


def test_a_run_has_a_space_and_a_workload_of_its_own(
    whole: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    space = Path(__file__).parents[1] / "search_spaces" / "gptq.yaml"
    one_line(mpsearch("fit", whole, "--space", space), 2, "its own space")
    run = shutil.copytree(whole, tmp_path / "run")
    content = json.loads((run / "run.json").read_text(encoding="utf-8"))
    content["device_budget"] = {"context": 24, "batch": 3, "kv": "fp8", "runtime": "vllm"}
    (run / "run.json").write_text(json.dumps(content), encoding="utf-8")
    told = json.loads(mpsearch("fit", run, "--memory", "8GiB", "--json").out)
    assert (told["context"], told["batch"], told["kv"]) == (24, 3, "fp8")
    told = json.loads(mpsearch("fit", run, "--memory", "8GiB", "--batch", 1, "--json").out)
    assert (told["context"], told["batch"]) == (24, 1)
    assert mpsearch("fit", run, "--memory", "8GiB").talk[-1].startswith("next: mpsearch export ")


def test_it_answers_within_seconds_and_without_torch(eight_b: Path) -> None:
    code = (
        "import sys\nfrom mpsearch.cli import main\n"
        f"assert main(['fit', {str(eight_b)!r}, '--device', 'rtx 3090', '--json']) == 0\n"
        "assert not {'torch', 'transformers', 'optuna'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "rtx 3061"], ["rtx 3061", "RTX 3060"]),
        (["--device", "rtx 4060 ti"], ["8GB", "16GB"]),
        (["--device", "rtx 3090", "--memory", "12GiB"], ["not allowed with"]),
        (["--memory", "12"], ["'12'", "no unit"]),
        (["--memory", "0GiB"], ["'0GiB'", "positive"]),
        (["--memory", "-3GiB"], ["-3GiB"]),
        (["--memory", "1e30GiB"], ["1e30GiB", "reachable"]),
        (["--memory", "12GiB", "--context", "0"], ["context 0", "1,000,000,000"]),
        (["--memory", "12GiB", "--batch", "0"], ["batch 0"]),
        (["--memory", "12GiB", "--kv", "int3"], ["no KV dtype 'int3'"]),
        (["--memory", "12GiB", "--kv", "q4_0"], ["vllm keeps no KV cache in q4_0"]),
        (["--memory", "12GiB", "--runtime", "vlm"], ["no runtime 'vlm'", "vllm"]),
        (["--memory", "12GiB", "--runtime", "gptqmodel"], ["loads no compressed-tensors"]),
        (["--memory", "12GiB", "--utilization", "90"], ["90 is no share"]),
        (["--memory", ""], ["''", "96MiB"]),
        (["--device", ""], ["no device ''"]),
        (["--memory", "12GiB", "--prefill", "0"], ["--prefill 0"]),
        (["--memory", "12GiB", "--overhead", "much"], ["much", "unit"]),
    ],
)
def test_bad_flags_are_one_line(
    flags: list[str], words: list[str], eight_b: Path, mpsearch: Cli
) -> None:
    flags = [f"{flags[0]}={flags[1]}", *flags[2:]]  # a value may begin with a dash
    one_line(mpsearch("fit", eight_b, *flags), 2, *words)


def test_a_model_must_be_named_and_known(tmp_path: Path, mpsearch: Cli) -> None:
    one_line(mpsearch("fit", "--memory", "12GiB"), 2, "no model given")
    one_line(mpsearch("fit", tmp_path, "--memory", "12GiB"), 2, "config.json")
    strange = tmp_path / "config.json"
    strange.write_text('{"model_type": "mamba9"}', encoding="utf-8")
    one_line(mpsearch("fit", strange, "--memory", "12GiB"), 2, "mamba9", "llama")


# -------------------------------------------------------------------------- the GPU here


def test_the_measured_gpu_is_a_device_called_this(
    eight_b: Path, mpsearch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path))
    one_line(mpsearch("fit", eight_b, "--device", "this"), 2, "--calibrate")
    ThisDevice("A card", 10 * 2**30, 300 * 2**20, 400 * 2**20).save()
    content = json.loads(mpsearch("fit", eight_b, "--device", "this", "--json").out)
    assert content["device"] == "A card"
    assert content["memory_bytes"] == 10 * 2**30
    assert content["runtime_bytes"] == (400 + 256) * 2**20
    bare = mpsearch("fit", eight_b, "--device", "this", "--utilization", 1, "--json")
    assert json.loads(bare.out)["unused_bytes"] == 300 * 2**20


def test_calibrating_measures_and_keeps_it(
    eight_b: Path, mpsearch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPSEARCH_HOME", str(tmp_path))
    measured = ThisDevice("A card", 10 * 2**30, 0, 400 * 2**20)
    monkeypatch.setattr("mpsearch.device.measure_this_device", lambda: measured)
    outcome = mpsearch("fit", "--calibrate")
    assert outcome.code == 0
    assert outcome.out.startswith("A card: 10.00 GiB, of which others have taken 0 B")
    assert ThisDevice.load() == measured


def test_calibrating_without_a_gpu_is_one_line(
    mpsearch: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    one_line(mpsearch("fit", "--calibrate"), 2, "finds no NVIDIA GPU")


# ------------------------------------------------------------------------------ search


def test_a_search_for_a_device_keeps_and_shows_where_its_budget_comes_from(
    question: list[str], tiny_folder: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    memory = memory_for(mpsearch, tiny_folder, parse_size(BUDGET))
    given = [part for part in question if part not in ("--budget", BUDGET)]
    run = tmp_path / "run"
    searched = mpsearch(*given, "--trials", 3, "--memory", memory, *BARE, "-o", run)
    assert searched.code == 0, searched.err
    assert "budget 57.00 KiB (58,368 bytes)" in searched.talk
    kept = Run.open(run).content["device_budget"]
    assert kept["left_bytes"] == parse_size(BUDGET) == Run.open(run).budget_bytes
    line = Run.open(run).budget_line
    assert line.startswith(f"{memory}, ") and line.endswith("57.00 KiB left for weights")
    assert line in searched.talk
    assert f"Budget: {line}" in mpsearch("front", run).out
    assert f"budget: {line}" in mpsearch("show", run, "best").out
    for command in (["front", run], ["show", run, "best"]):
        assert json.loads(mpsearch(*command, "--json").out)["device_budget"] == kept
    assert mpsearch("export", run, "best", "-o", tmp_path / "export").code == 0
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert f"- Made for: {line}." in card
    # As it was asked for; with the usual overhead and reserve nothing would fit.
    assert mpsearch("fit", run, "--memory", memory).code == 0
    assert mpsearch("fit", run, "--memory", memory, "--overhead", "1GiB").code == 3
    figure = tmp_path / "figure.svg"
    assert mpsearch("plot", run, "-o", figure).code == 0
    assert "16 tokens x 1" in figure.read_text(encoding="utf-8")
    again = mpsearch(*given, "--trials", 4, "--memory", memory, *BARE, "--resume", "-o", run)
    assert again.code == 0, again.err


def test_a_device_that_cannot_hold_the_model_is_refused_before_it_is_loaded(
    question: list[str], tiny_folder: Path, mpsearch: Cli, tmp_path: Path
) -> None:
    memory = memory_for(mpsearch, tiny_folder, 20 * 1024)
    given = [part for part in question if part not in ("--budget", BUDGET)]
    outcome = mpsearch(*given, "--memory", memory, *BARE, "-o", tmp_path / "run")
    one_line(outcome, 3, "the smallest assignment needs", "weights", "kv cache", "Ways out")
    assert not any(line.startswith("loading") for line in outcome.talk)
    assert not (tmp_path / "run").exists()


def test_a_flag_of_a_device_wants_one(question: list[str], mpsearch: Cli, tmp_path: Path) -> None:
    outcome = mpsearch(*question, "--kv", "fp8", "-o", tmp_path / "run")
    one_line(outcome, 2, "--kv says what runs on a device", "--device or --memory")


@pytest.mark.parametrize("flags", [[], ["--budget", "1MiB", "--memory", "1GiB"]])
def test_a_search_is_given_one_kind_of_budget(
    flags: list[str], question: list[str], mpsearch: Cli, tmp_path: Path
) -> None:
    given = [part for part in question if part not in ("--budget", BUDGET)]
    outcome = mpsearch(*given, *flags, "-o", tmp_path / "run")
    assert outcome.code == 2
    assert "--budget" in outcome.err and "--memory" in outcome.err
