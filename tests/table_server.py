"""A vLLM server of the tests' own: it answers TRL's requests from a table, and knows which weights it was given."""

import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas
from datasets import Dataset
from trl import GRPOTrainer
from trl.generation import vllm_generation

from grpo_launcher.callbacks import RunLog
from grpo_launcher.config import build_dataclasses, load_config
from grpo_launcher.launch.processes import exit_at_once
from grpo_launcher.runs import last_checkpoint, read_metrics
from grpo_launcher.trainer import build_trainer
from grpo_launcher.weight_sync import DiskSyncClient

ROWS = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"What of number {n}?"}] for n in range(8)]})


def completion(prompt: list[int], index: int, length: int, weights: int = 0) -> list[int]:
    """Return the table's tokens for a completion of a prompt."""
    seed = zlib.crc32(str((prompt, index, weights)).encode())
    return [10 + (seed >> place) % 80 for place in range(length)]


class TableServer:
    """`with TableServer() as server:` listens at server.url until the block ends.

    Args:
        delay: seconds that a generation takes.
        before: called with the number of a generation, from 0, before it is answered. A text that it returns is sent
            as the error of status 400.
        by_weights: other weights give other completions.
        deaths: numbers of the POST requests, from 0, at which the server dies. It comes back without any weights.
        errors: numbers of those that it answers with status 500.
        changes: numbers of those after which another server takes its place, without any weights.

    Attributes:
        version: how many times weights were pushed.
        weights: a checksum of those that the server has, where completions depend on them, else 0.
        generations: for each request its prompts, the version of the weights, and when it came and was answered.
    """

    def __init__(
        self,
        delay: float = 0.0,
        before: Callable[[int], str | None] = lambda number: None,
        by_weights: bool = False,
        deaths: Iterable[int] = (),
        errors: Iterable[int] = (),
        changes: Iterable[int] = (),
    ):
        self.delay, self.before, self.by_weights = delay, before, by_weights
        self.deaths, self.errors, self.changes = set(deaths), set(errors), set(changes)
        self.version, self.weights, self.generations = 0, 0, []
        self.models, self.pushed, self.requests = {"table"}, "", 0

    def __enter__(self):
        table = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self):
                config = {"logprobs_mode": "processed_logprobs"}
                models = [{"id": name} for name in sorted(table.models, key=lambda name: name != "table")]
                self.send(200, {"data": models, "vllm_config": {"model_config": config}})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
                number, table.requests = table.requests, table.requests + 1
                answer = None
                if number in table.errors:
                    answer = 500, {"error": "the engine is dead"}
                elif number not in table.deaths:
                    answer = table.respond(self.path, request)
                if number in table.deaths | table.changes:
                    table.models, table.weights, table.pushed = {"table"}, 0, ""
                if answer:
                    self.send(*answer)
                else:
                    self.close_connection = True

            def send(self, status, body):
                body = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @classmethod
    def at(cls, url: str) -> "TableServer":
        """Return the name of a server that another process has opened."""
        server = cls()
        server.url = url
        return server

    def respond(self, path: str, request: dict) -> tuple[int, dict]:
        """Return status and body of a POST."""
        if request.get("method") == "last_push":
            return 200, {"results": [self.pushed]}
        self.version += path in ("/collective_rpc", "/v1/load_lora_adapter")
        if path == "/collective_rpc":
            self.pushed = request["kwargs"]["path"]
            if self.by_weights:
                files = sorted(Path(self.pushed).iterdir())
                self.weights = zlib.crc32(b"".join(file.read_bytes() for file in files))
        if "lora_name" in request:
            if ("unload" in path) != (request["lora_name"] in self.models):
                return 404, {"error": "no such adapter, or twice the same"}
            self.models ^= {request["lora_name"]}
        if path != "/v1/completions":
            return 200, {"success": True}
        if request["model"] not in self.models:
            return 404, {"error": f"no model {request['model']}"}
        if "seed" in request:  # the comparison after a push
            return 200, {"choices": self._choices(request)}
        number = len(self.generations)
        kept = {"prompts": request["prompt"], "version": self.version, "start": time.monotonic()}
        kept["has_weights"] = bool(self.pushed) or len(self.models) > 1
        self.generations.append(kept)
        error = self.before(number)
        time.sleep(self.delay)
        kept["end"] = time.monotonic()
        if error:
            return 400, {"error": error}
        return 200, {"choices": self._choices(request)}

    def _choices(self, request: dict) -> list[dict]:
        choices = []
        for prompt in request["prompt"]:
            for index in range(request["n"]):
                ids = completion(prompt, index, request["max_tokens"], self.weights)
                names = [f"token_id:{token}" for token in ids]
                logprobs = {"tokens": names, "token_logprobs": [-4.0] * len(ids), "top_logprobs": [None] * len(ids)}
                choices.append({"prompt_token_ids": prompt, "token_ids": ids, "logprobs": logprobs})
        return choices


def rate(completion_ids, **columns) -> list[float]:
    """Return a reward that differs within a group."""
    return [float(sum(ids)) for ids in completion_ids]


CLOCK = {"time", "step_time", "overlap/trainer_waited_seconds", "overlap/server_idle_seconds"}
CLOCK |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def curve(folder: Path) -> list[dict]:
    """Return the lines of a run without the seconds."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in read_metrics(folder)]


def completions(folder: Path) -> list[tuple]:
    """Return (step, prompt, completion, reward, advantage) of all that a run logged."""
    tables = map(pandas.read_parquet, sorted((folder / "completions").glob("*.parquet")))
    columns = ["step", "prompt", "completion", "rate", "advantage"]
    return [tuple(map(str, row)) for table in tables for row in table[columns].itertuples(index=False)]


def train_at(url: str, model: Path, folder: Path, flags: list[str]) -> None:
    """Train beside a server that another process has opened, from the last checkpoint on where there is one.

    This process may be one of several ranks.
    """
    checkpoint = last_checkpoint(folder, int(os.environ.get("WORLD_SIZE", "1")))
    train_beside(TableServer.at(url), model, folder, *flags, resume=checkpoint and str(checkpoint))


def train_beside(server: TableServer, model: Path, folder: Path, *flags: str, stock=False, callbacks=(), resume=None):
    """Train 6 steps of 2 prompts × 4 completions beside the server, into a folder.

    Args:
        server: it is open.
        model: a causal model.
        folder: for the run.
        flags: further fields of the recipe.
        stock: TRL's own class.
        callbacks: beside the one that writes metrics.jsonl.
        resume: a checkpoint.
    """
    argv = ["--model_name_or_path", str(model), "--dataset_name", "rows", "--use_cpu", "true", "--bf16", "false"]
    argv += ["--report_to", "none", "--num_generations", "4", "--per_device_train_batch_size", "8"]
    argv += ["--per_device_eval_batch_size", "8", "--max_completion_length", "6", "--learning_rate", "1e-3"]
    argv += ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", server.url]
    argv += ["--weight_sync", "disk"]
    argv += ["--sample_every", "0", "--max_steps", "6", "--vllm_importance_sampling_mode", "token_truncate"]
    recipe, args, model_args = build_dataclasses(load_config([*argv, *flags]).values)
    folder.mkdir(exist_ok=True)
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS.select(range(2))}
    client = vllm_generation.VLLMClient
    try:
        if stock:
            args.output_dir, vllm_generation.VLLMClient = str(folder), DiskSyncClient
            trainer = GRPOTrainer(str(model), [rate], args=args, **rows)
        else:
            options = {"reward_funcs": [rate], "callbacks": [RunLog(folder), *callbacks]}
            trainer = build_trainer(recipe, args, model_args, run=folder, **options, **rows)
        trainer.train(resume_from_checkpoint=resume)
    finally:
        vllm_generation.VLLMClient = client  # build_trainer replaces it


if __name__ == "__main__":
    train_at(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    exit_at_once(0)  # as train.py does: gloo's threads may abort behind it
