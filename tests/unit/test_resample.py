"""Groups without spread are asked again, with other prompts."""

import torch

from grpo_launcher import resample

ROWS = [{"prompt": f"Prompt {number}", "answer": number} for number in range(20)]
KEYS = [resample.prompt_key(row["prompt"]) for row in ROWS]


def test_other_rows_are_drawn_alike_and_not_those_that_are_known_to_be_flat():
    draw = [resample.other_rows(ROWS, 6, [1, 2, 3], set(KEYS[:5]), set(KEYS[5:10])) for _ in range(2)]
    assert draw[0] == draw[1] and len({row["answer"] for row in draw[0]}) == 6
    assert all(row["answer"] >= 10 for row in draw[0])
    assert resample.other_rows(ROWS, 6, [1, 2, 4], set(KEYS[:5]), set(KEYS[5:10])) != draw[0]


def test_where_too_few_are_left_flat_ones_come_before_those_of_this_step():
    rows = resample.other_rows(ROWS, 12, [0], set(KEYS[:5]), set(KEYS[5:18]))
    assert {18, 19} <= {row["answer"] for row in rows} and all(row["answer"] >= 5 for row in rows)
    assert len(resample.other_rows(ROWS[:3], 7, [0], set(), set())) == 7


def test_rows_of_two_generations_are_padded_to_one_width():
    short = {"prompt_ids": torch.tensor([[0, 5], [4, 5]]), "completion_ids": torch.tensor([[6, 2], [6, 2]])}
    long = {"prompt_ids": torch.tensor([[3, 4, 5]]), "completion_ids": torch.tensor([[6, 7, 2]])}
    for output in (short, long):
        output["completion_mask"] = torch.ones_like(output["completion_ids"])
        output["advantages"] = torch.arange(len(output["prompt_ids"]), dtype=torch.float)
    output = resample.joined([*resample.rows_of(short), *resample.rows_of(long)], pad_id=9, device="cpu")
    assert output["prompt_ids"].tolist() == [[9, 0, 5], [9, 4, 5], [3, 4, 5]]
    assert output["completion_ids"].tolist() == [[6, 2, 9], [6, 2, 9], [6, 7, 2]]
    assert output["completion_mask"].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert output["advantages"].tolist() == [0, 1, 0]


def test_the_summary_counts_tokens_for_each_useful_group():
    lines = [{"reward": 1.0}]
    assert resample.summary(lines) is None
    for tokens, useful in ((100, 1), (200, 5)):
        lines.append({resample.TOKENS: tokens, resample.GROUPS: useful, resample.STOCK_TOKENS: 80.0})
        lines[-1][resample.STOCK_GROUPS] = 0
    assert "50 tokens" in resample.summary(lines) and "without it no" in resample.summary(lines)
