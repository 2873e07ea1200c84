"""64 clients of `segattn serve` at once. Each answer must have the tokens of `segattn generate` and its
log-probabilities to the bit, and every token that the server counts must reach somebody:

    many_clients.py SEGATTN MODEL SECONDS [options of both commands, such as --device cuda]

Needs nothing but Python. Prints tokens a second; any difference is an exception.
"""

import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random

CLIENTS, PROMPTS, NEW = 64, 24, 64
program, model, seconds, *options = sys.argv[1:]
program, model = Path(program).resolve(), Path(model).resolve()
vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
random = Random(7)
prompts = [[random.randrange(1, vocabulary) for _ in range(1 + 37 * i)] for i in range(PROMPTS)]


def generated():
    """What `generate` gives after each prompt."""
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "generate", "-m", model, "-q", "-n", str(NEW), "--logprobs", "out.json", *options]
        command += ["--temperature", "0.8", "--top-k", "40", "--seed", "7"]
        for i, prompt in enumerate(prompts):
            (Path(folder) / f"{i}.json").write_text(json.dumps(prompt))
            command += ["--tokens", f"{i}.json"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "out.json").read_text())


class Serving:
    """A server on a port of its own."""

    def __init__(self):
        sizes = ["--running", "32", "--waiting", str(CLIENTS), "--max-len", "2048"]
        command = [program, "serve", "-m", model, "--port", "0", "--name", "tested", *sizes, *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        begin = "tested at http://"
        line = next((line for line in self.process.stderr if line.startswith(begin)), None)
        assert line, "the server ended"
        self.address = line.removeprefix(begin).strip()
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def connect(self):
        return http.client.HTTPConnection(self.address, timeout=120)

    def metrics(self):
        connection = self.connect()
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def ask(connection, prompt, stream):
    """The tokens of an answer, their log-probabilities and the time to the first of them."""
    fixed = {"max_tokens": NEW, "temperature": 0.8, "top_k": 40, "seed": 7, "logprobs": 0, "return_token_ids": True}
    started = time.perf_counter()
    body = json.dumps({"model": "tested", "prompt": prompt, "stream": stream, **fixed})
    connection.request("POST", "/v1/completions", body)
    answer = connection.getresponse()
    if not stream:
        whole = answer.read()
        assert answer.status == 200, whole
        choices = [json.loads(whole)["choices"][0]]
        first = None
    else:
        parts = []
        while (line := answer.readline()) != b"data: [DONE]\n":
            assert answer.status == 200 and line, line
            if line.startswith(b"data: "):
                first = time.perf_counter() - started if not parts else first
                parts.append(json.loads(line[6:]))
        answer.read()
        choices = [part["choices"][0] for part in parts if part["choices"]]
    tokens = [token for choice in choices for token in choice["token_ids"]]
    logprobs = [choice.get("logprobs") or {} for choice in choices]
    return tokens, [value for each in logprobs for value in each.get("token_logprobs", [])], first


def client(number, serving, expected, until, done, errors):
    try:
        connection, at = serving.connect(), number
        while time.monotonic() < until and not errors:
            at = (5 * at + 1) % PROMPTS
            tokens, logprobs, first = ask(connection, prompts[at], stream=number % 2 == 1)
            assert tokens == expected[at]["tokens"], (at, tokens, expected[at]["tokens"])
            assert logprobs == expected[at]["logprobs"], (at, logprobs, expected[at]["logprobs"])
            done.append((len(tokens), first))
    except BaseException as error:
        errors.append(error)
        raise


expected = generated()
serving = Serving()
try:
    done, errors, started = [], [], time.monotonic()
    until = started + float(seconds)
    arguments = [(number, serving, expected, until, done, errors) for number in range(CLIENTS)]
    clients = [threading.Thread(target=client, args=each) for each in arguments]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    took = time.monotonic() - started
    assert not errors, errors[0]
    metrics = serving.metrics()
    count = sum(tokens for tokens, _ in done)
    assert int(metrics["segattn_new_tokens_total"]) == count
    assert int(metrics['segattn_sequences_total{how="ended"}']) == len(done)
    assert int(metrics['segattn_sequences_total{how="failed"}']) == 0
    first = statistics.median(first for _, first in done if first is not None)
    print(f"{len(done)} answers with the bits of generate, {count} tokens, {count / took:.0f} tokens/s,", end=" ")
    print(f"half of the time to the first token is below {1e3 * first:.0f} ms")
finally:
    serving.process.terminate()
    assert serving.process.wait(60) == 0
