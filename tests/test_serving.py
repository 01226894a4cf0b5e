import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import serving, tracking
from tests import result
from tests.test_publish import View


@given(st.integers(1, 10_000), st.integers(-5, 10_000), st.integers(2, 2_000))
def test_prompt_and_answer_always_fit_into_the_positions(num_prompt_tokens, max_new_tokens, positions):
    kept, num_new = serving.fit(num_prompt_tokens, max_new_tokens, positions)
    assert 1 <= kept <= num_prompt_tokens
    assert 0 <= num_new <= max(0, max_new_tokens)
    assert kept + num_new <= positions
    assert num_new > 0 or max_new_tokens <= 0


@given(st.integers(1, 1_000), st.integers(0, 1_000))
def test_nothing_is_cut_that_fits(num_prompt_tokens, max_new_tokens):
    assert serving.fit(num_prompt_tokens, max_new_tokens, 2_000) == (num_prompt_tokens, max_new_tokens)


def test_a_long_answer_leaves_the_prompt_half_of_the_positions():
    assert serving.fit(900, 5_000, 1_000) == (500, 500)
    assert serving.fit(300, 5_000, 1_000) == (300, 700)


@pytest.fixture(scope="module")
def continuation(tmp_path_factory):
    folder = result.write(tmp_path_factory.mktemp("serving"))
    return serving._load_pyfunc(str(folder / "models" / "best"))


@pytest.mark.parametrize("prompt", ["", " ", "The old", "The old fox. " * 500, "<|endoftext|>", "\x00\ud7ff🦊"])
@pytest.mark.parametrize("max_new_tokens", [-1, 0, 1, 20, 10_000])
def test_every_prompt_is_answered(continuation, prompt, max_new_tokens):
    (answer,) = continuation.predict([prompt], {"max_new_tokens": max_new_tokens})
    assert answer.startswith(prompt)


def test_greedy_answers_repeat_and_do_not_depend_on_the_other_prompts(continuation):
    prompts = ["The old", "She opened the", ""]
    together = continuation.predict(prompts, {"do_sample": False})
    assert together == [continuation.predict(prompt, {"temperature": 0.0})[0] for prompt in prompts]
    assert any(answer != prompt for answer, prompt in zip(together, prompts, strict=True))


def test_a_long_prompt_is_continued_from_its_end(continuation):
    end = " fox sleeps. She opened the box. In the morning"
    num_tokens = len(continuation.tokenizer.encode(end))
    assert num_tokens > result.POSITIONS // 2, "the end alone must fill what is kept"
    answers = continuation.predict(
        [f"{start}{end}" for start in ("It rains. " * 50, "A hen. " * 50)], {"do_sample": False}
    )
    assert answers[0].rpartition(end)[2] == answers[1].rpartition(end)[2]


@pytest.fixture
def served(repository, tmp_path):
    """The address of a server that answers with the champion, started far from the repository."""
    result.publish_here()
    view = View()
    view.client.set_registered_model_alias(view.model, "champion", view.challenger)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # mlflow starts uvicorn by its name
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/gpt2-pipeline@champion"),
            *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
        ],
        env=os.environ | {"MLFLOW_TRACKING_URI": tracking.uri(), "PATH": path},
        cwd=elsewhere,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/ping") as answer:
                if answer.status == 200:
                    break
            time.sleep(0.2)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_mlflow_serves_prompts_of_any_length(served):
    def post(content):
        body = json.dumps(content).encode()
        request = urllib.request.Request(f"{served}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
            return json.load(answer)["predictions"]

    prompts = ["", " ", "The old", "She opened the box. " * 2_000, "<|endoftext|>", "🦊\u2028é"]
    options = [{}, {"max_new_tokens": 3}, {"max_new_tokens": 100_000, "top_k": 0, "top_p": 1.0}, {"do_sample": False}]
    for params in options:
        for prompt in prompts:
            (answer,) = post({"inputs": [prompt], "params": params})
            assert answer.startswith(prompt)
    assert len(post({"inputs": prompts})) == len(prompts)
    assert post({"dataframe_split": {"columns": ["prompt"], "data": [["The old"]]}})[0].startswith("The old")
    greedy = {"max_new_tokens": 5, "temperature": 0.0}
    assert post({"inputs": ["The old"], "params": greedy}) == post({"inputs": "The old", "params": greedy})
