"""vLLM serves an export, and gives the answers that transformers gives.

Run by `make test-vllm` on what `prepare.py` wrote. The packed 4-bit kernel of vLLM's CPU build
computes in bf16 and in fp16. In bf16, close calls flip between any two engines, as they do between
transformers in bf16 and in float32. fp16 rounds eight times finer, and there vLLM must agree with
transformers in float32.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PREPARED = Path(__file__).parents[1] / "build" / "vllm"
START_SECONDS, LIFE_SECONDS = 900, 3600  # a busy machine needed 300 to start
DTYPE = "float16"
BATCH = 16

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # its processes talk to each other there, too
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # Threads that wait for each other on a busy machine make it several times slower.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # By default it rounds what enters a 4-bit layer to 8 bits on CPUs with AMX, and then computes
    # something else than weight-only quantization.
    "VLLM_CPU_INT4_W4A8": "0",
}


@cache
def questions() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads((PREPARED / "questions.json").read_text()))


def options() -> list[dict[str, Any]]:
    return [option for question in questions() for option in question["options"]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server() -> Iterator[str]:
    """Its address once it is healthy. It is gone afterwards, and its log shown if anything failed.

    `timeout` ends it even where this process is killed. The module is what `vllm serve` runs; that
    command looks for a package named vllm (0.32), and the CPU build's is named vllm-cpu.
    """
    port, log = free_port(), PREPARED / "server.log"
    address = f"http://127.0.0.1:{port}"
    command = [
        *("timeout", "--kill-after=30", str(LIFE_SECONDS)),
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(PREPARED / "export"), "--served-model-name", "export"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", DTYPE),
        "--enforce-eager",  # compiling takes longer than answering
    ]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
    try:
        wait_until_healthy(process, address)
        yield address
    except BaseException:
        print(log.read_text(errors="replace")[-12_000:], file=sys.stderr)
        raise
    finally:
        stop(process)


def wait_until_healthy(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=10):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"the server was not healthy within {START_SECONDS} seconds")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started; they have a session of their own."""
    for number, seconds in ((signal.SIGTERM, 60), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def ask(address: str, asked: list[dict[str, Any]]) -> Iterator[float]:
    """Log-probabilities of some options in nats.

    Texts are sent, as users do; vLLM must make the tokens of them that transformers made.
    """
    body = {
        "model": "export",
        "prompt": [option["text"] for option in asked],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,  # of the tokens themselves, and no others
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        choices = json.load(response)["choices"]
    for option, choice in zip(asked, choices, strict=True):
        tokens, start = option["tokens"], option["start"]
        assert choice["prompt_token_ids"] == tokens
        said = zip(choice["prompt_logprobs"][start:], tokens[start:], strict=True)
        yield sum(of[str(token)]["logprob"] for of, token in said)


def chosen(log_probs: list[float]) -> list[int]:
    """Of each question the option with the highest log-probability per token."""
    left = iter(log_probs)
    found = []
    for question in questions():
        lengths = [len(option["tokens"]) - option["start"] for option in question["options"]]
        scores = [next(left) / length for length in lengths]
        found.append(scores.index(max(scores)))
    return found


def agreeing(a: list[float], b: list[float]) -> int:
    """The number of questions to which both choose the same option."""
    return sum(x == y for x, y in zip(chosen(a), chosen(b), strict=True))


def apart(a: list[float], b: list[float]) -> tuple[float, float]:
    """By how much log-probabilities differ, in nats: on average and at most."""
    found = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return sum(found) / len(found), max(found)


def test_it_answers_as_transformers_does(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    found: list[float] = []
    with server() as address:
        healthy = time.monotonic()
        for start in range(0, len(options()), BATCH):
            found += ask(address, options()[start : start + BATCH])
        done = time.monotonic()
    exact = [option["exact"] for option in options()]
    scored = [option["scored"] for option in options()]
    with capsys.disabled():
        print(f"\nserved in {healthy - began:.0f} s, answered in {done - healthy:.0f} s")
        for who, answers in (("vLLM", found), ("transformers as in a search", scored)):
            mean, most = apart(answers, exact)
            print(
                f"{who}: {agreeing(answers, exact)} of {len(questions())} answers are those of "
                f"transformers in float32; {len(exact)} log-probabilities {mean:.4f} nats apart on "
                f"average, {most:.4f} at most"
            )
    assert len(questions()) >= 200
    assert agreeing(found, exact) >= 0.99 * len(questions())
    assert apart(found, exact)[0] < 0.1
