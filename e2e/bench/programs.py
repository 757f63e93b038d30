"""The programs that are measured: our runtime, llama.cpp, and the servers of both under one client."""

import contextlib
import json
import pathlib
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

THREADS = 2
# A server loads a model of this size in some seconds; a busy machine gets time.
START_SECONDS = 120


class NotBuilt(Exception):
    """This version of our runtime does not support what a row needs."""


class Failed(Exception):
    """A program did not run."""


# The error of our runtime for an unsupported model. Every other error is a failure: a row that is missing
# because of a mistyped flag must not look like an unsupported one.
UNSUPPORTED = "UnsupportedModel"


def run(*command):
    """A program's stdout."""
    command = [str(part) for part in command]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as why:
        raise Failed(f"{command[0]} cannot be started: {why}") from why
    if done.returncode:
        says = done.stderr.strip()[-2000:]
        if UNSUPPORTED in says:
            raise NotBuilt(says)
        raise Failed(f"{' '.join(command)}\nended with {done.returncode}: {says or 'it said nothing'}")
    return done.stdout


def ours_engine(program, model, **flags):
    """One turn of `bench engine`: {(what, prompt tokens, sequences): tokens a second}."""
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    answer = json.loads(
        run(
            program,
            "bench",
            "engine",
            "--model",
            model,
            "--threads",
            THREADS,
            "--repeat",
            1,
            "--json",
            *arguments,
        )
    )
    return {(one["what"], one["prompt_tokens"], one["sequences"]): one["median"] for one in answer["results"]}


def ours_embed(program, model, batches, tokens):
    """One turn of `bench engine` on a model that embeds: {texts at once: texts a second}."""
    command = [program, "bench", "engine", "--model", model, "--threads", THREADS, "--repeat", 1, "--json"]
    answer = json.loads(run(*command, "--texts", ",".join(map(str, batches)), "--text-tokens", tokens))
    return {one["texts"]: one["median"] for one in answer["results"]}


def ours_generate(program, model, prompts, tokens, *flags):
    """Greedy answers to prompts, one after the other: tokens a second after each one's first, and the
    answers' ids.
    """
    command = [
        program,
        "generate",
        "--model",
        model,
        "--threads",
        THREADS,
        "--temperature",
        0,
        "--max-tokens",
        tokens,
        "--json",
    ]
    answers = [json.loads(run(*command, *flags, "--prompt", prompt)) for prompt in prompts]
    seconds = sum(answer["timings_ms"]["decode"] for answer in answers) / 1e3
    return sum(len(answer["tokens"]) - 1 for answer in answers) / seconds, [
        answer["tokens"] for answer in answers
    ]


def python_embed(python, model, onnx):
    """One turn of the Python engines: {engine: {batch: texts a second}}."""
    return json.loads(run(python, pathlib.Path(__file__).with_name("embeddings.py"), model, onnx))


def llama_bench(program, model, prompt=0, tokens=0, depth=0):
    """One turn of llama-bench: tokens a second, the better of its two settings of flash attention."""
    answer = json.loads(
        run(
            program,
            "-m",
            model,
            "-t",
            THREADS,
            "-p",
            prompt,
            "-n",
            tokens,
            "-d",
            depth,
            "-fa",
            "0,1",
            "-r",
            1,
            "-o",
            "json",
        )
    )
    return max(one["avg_ts"] for one in answer)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def server(command, url, ready, cwd=None):
    """A server while the block runs, from the moment at which `ready` answers 200."""
    command = [str(part) for part in command]
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=cwd)
        except OSError as why:
            raise Failed(f"{command[0]} cannot be started: {why}") from why
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                with (
                    contextlib.suppress(OSError, urllib.error.URLError),
                    urllib.request.urlopen(url + ready, timeout=2) as answer,
                ):
                    if answer.status == 200:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    says = log.read().decode(errors="replace")[-2000:]
                    raise (
                        NotBuilt(says)
                        if UNSUPPORTED in says
                        else Failed(f"{command[0]} does not serve: {says}")
                    )
                time.sleep(0.05)
            yield url
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def our_server(program, model, batching=None):
    """Ours with its default settings, or those of `batching`, on a free port."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        config = {
            "server": {"host": "127.0.0.1", "port": port, "grpc_port": 0},
            "models": [{"name": "m", "path": str(model)}],
            "batching": batching or {},
        }
        # JSON is YAML.
        pathlib.Path(folder, "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        url = f"http://127.0.0.1:{port}"
        with server([program, "--threads", THREADS], url, "/health/ready", cwd=folder):
            yield url


@contextlib.contextmanager
def llama_server(program, model, clients, context):
    """llama-server with a slot for each client, on a free port."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [program, "-m", model, "-t", THREADS, "-tb", THREADS, "-c", clients * context, "-np", clients]
    with server([*command, "--host", "127.0.0.1", "--port", port, "--cache-ram", 0], url, "/health"):
        yield url


def load(program, url, **flags):
    """`bench load`: its JSON."""
    flags = {"duration_s": 900, **flags}
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    answer = json.loads(
        run(program, "bench", "load", "--url", url, "--fresh-connections", "--json", *arguments)
    )
    if answer["errors"]:
        raise Failed(f"requests to {url} failed: {answer['errors']}")
    return answer
