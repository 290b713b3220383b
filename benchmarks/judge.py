"""Time 64 ratings, 16 at once, by a judge that takes 200 ms for each: `python benchmarks/judge.py`."""

import asyncio
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.pop(0)  # else `rewards` would be the file beside this one
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from judge_server import JudgeServer

from rewards.judge import judge_ready, judge_reward

RATINGS, CONCURRENCY, DELAY = 64, 16, 0.2


def serve(pipe) -> None:
    """A judge in a process of its own, as a judge is, until the pipe says enough."""
    with JudgeServer(lambda reply, request: "8", delay=DELAY) as judge:
        pipe.send(judge.url)
        pipe.recv()


def main() -> None:
    """Three times, each with replies that no cache holds."""
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(other,), daemon=True)
    process.start()
    url, ideal = pipe.recv(), RATINGS / CONCURRENCY * DELAY
    judge_ready(base_url=url)  # imports the client, so that only the ratings are timed
    for step in range(3):
        replies = [f"reply {step} {n}" for n in range(RATINGS)]
        start = time.perf_counter()
        scores = asyncio.run(judge_reward(["Praise me"] * RATINGS, replies, base_url=url, concurrency=CONCURRENCY))
        took = time.perf_counter() - start
        assert scores == [8.0] * RATINGS
        print(
            f"{RATINGS} ratings of {DELAY} s, {CONCURRENCY} at once: {took:.2f} s, {took / ideal:.2f} times the ideal"
        )
    pipe.send("enough")
    process.join()


if __name__ == "__main__":
    main()
