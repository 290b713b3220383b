"""The arithmetic of a plan: what must fit or divide, said in one line each, and refused with values that do."""


def context(plan, facts: dict) -> None:
    """Prompt + reply must fit the server's context: one longer prompt would be an HTTP error that ends the run.

    With tools a later turn asks for a whole max_completion_length on top of what the reply has so far, which may be nearly as much.
    """
    longest, limit = (facts["data"] or {}).get("longest_prompt"), (facts["model"] or {}).get("context")
    if (facts["model"] or {}).get("encoder_decoder"):
        return _places(plan, longest, limit)
    reply, context = plan.values["max_completion_length"], plan.values["vllm_max_model_length"]
    asked, field = f"reply {reply}", "max_completion_length"
    if (plan.values["tools"] or plan.values["environment_factory"]) and plan.values["use_vllm"]:
        asked, field, reply = f"2 × reply {reply} (turns with tools)", "2 × max_completion_length", 2 * reply
    if plan.values["method"] == "sft":
        context = longest
    elif not plan.values["use_vllm"]:
        context = longest and longest + reply
    elif plan.values["dataset_streaming"]:
        if context:
            plan.lines.append(f"context: prompts up to {context - reply} + {asked} = {context} tokens; longer prompts are left out as they come")
        else:
            plan.problems.append(
                f"vllm_max_model_length: the longest prompt of a stream is not known; give tokens for prompt and reply, {reply + 768} say. "
                "Longer prompts are left out as they come."
            )
    elif longest is not None:
        if "vllm_max_model_length" not in plan.given:
            context = longest + reply
            plan.fill("vllm_max_model_length", context, f"longest prompt + {field}")
        plan.lines.append(f"context: longest prompt {longest} + {asked} = {longest + reply} of {context} tokens")
        if longest + reply > context:
            plan.problems.append(
                f"vllm_max_model_length: the longest prompt has {longest} tokens, and with {field} {reply} it needs "
                f"{longest + reply}, not {context}. Raise it, or leave long prompts out: process_dataset.py … --max_prompt_length {context - reply}."
            )
    if limit and context and context > limit:
        plan.problems.append(
            f"max_completion_length: {context} tokens of prompt and reply, and the model's context is {limit}. "
            f"Lower max_completion_length, or prepare the data with --max_prompt_length {max(1, limit - reply)}."
        )


def _places(plan, longest: int | None, limit: int | None) -> None:
    """The prompt is the encoder's and the reply the decoder's: each has the model's places for itself, where they are counted at all."""
    reply, of = plan.values["max_completion_length"], f"{limit} places each" if limit else "relative places, no limit"
    drawn = f", reply {reply} in the decoder" if plan.values["method"] == "grpo" else ""
    if longest is not None:
        plan.lines.append(f"context: longest prompt {longest} in the encoder{drawn}; {of}")
    if limit and longest and longest > limit:
        plan.problems.append(
            f"dataset_name: the longest prompt has {longest} tokens, and the encoder takes {limit}. Prepare the data with --max_prompt_length {limit} "
            "(summarization: --too_long cut shortens the articles, drop leaves them out)."
        )
    if limit and drawn and reply > limit:
        plan.problems.append(f"max_completion_length: {reply} tokens, and the decoder takes {limit}; lower it.")


def supervised(plan, facts: dict) -> None:
    """The batch of a supervised run in one line."""
    each, accumulate, rows = plan.values["per_device_train_batch_size"], plan.values["gradient_accumulation_steps"], (facts["data"] or {}).get("rows")
    step = each * plan.ranks * accumulate
    line = f"batch: {each} rows × {plan.ranks} rank{'s' * (plan.ranks > 1)} × {accumulate} accumulated = {step} rows a step"
    plan.lines.append(line if rows is None else f"{line}; {rows} rows = {-(-rows // step)} steps an epoch")


def batch(plan, facts: dict) -> None:
    """The batch arithmetic in one line, and what does not divide with its nearest valid values."""
    values, group = plan.values, plan.values["num_generations"]
    each, accumulate = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    generated = values["generation_batch_size"] or each * plan.ranks * (values["steps_per_generation"] or accumulate)
    if values["generation_batch_size"] and generated % (each * plan.ranks):
        plan.problems.append(f"generation_batch_size: {generated} is no multiple of {each} completions × {plan.ranks} ranks = {each * plan.ranks}.")
        return
    if generated % group:
        rounds = max(1, generated // (each * plan.ranks))
        near = _nearest(each, plan.ranks * rounds, group)
        groups = sorted(sorted((n for n in range(2, generated + 1) if generated % n == 0), key=lambda n: abs(n - group))[:2])
        plan.problems.append(
            f"per_device_train_batch_size: {each} completions × {plan.ranks} ranks × {rounds} = {generated}, no multiple of num_generations {group}. "
            f"Nearest valid: per_device_train_batch_size {near}, or num_generations {' or '.join(map(str, groups))}."
        )
        return
    prompts = generated // group
    updates = max(1, generated // (each * plan.ranks * accumulate)) * values["num_iterations"]
    ranks = "1 rank" if plan.ranks == 1 else f"{plan.ranks} ranks"
    line = f"batch: {each} completions × {ranks} × {accumulate} accumulated = {each * plan.ranks * accumulate} completions a step"
    line += f"; {prompts} prompts × {group} replies generated at once"
    rows = (facts["data"] or {}).get("rows")
    if rows is not None:
        line += f"; {rows} prompts = {rows // prompts * updates} steps an epoch"
        if rows < prompts:
            plan.problems.append(
                f"dataset_name: {rows} prompts, and one generation takes {prompts} different ones: TRL would end after 0 steps. "
                f"Give more rows, lower per_device_train_batch_size, or raise num_generations."
            )
    plan.lines.append(line)


def evaluation(plan, facts: dict) -> None:
    """The same arithmetic for held-out prompts, where the recipe asks for evaluation."""
    values, rows = plan.values, (facts["data"] or {}).get("test_rows")
    if values["eval_strategy"] == "no" or values["method"] == "sft":
        return
    group, each = values["num_generations_eval"] or values["num_generations"], values["per_device_eval_batch_size"]
    batch = each * plan.ranks
    if batch % group:
        field = "num_generations_eval" if values["num_generations_eval"] else "num_generations"
        plan.problems.append(
            f"per_device_eval_batch_size: {each} completions × {plan.ranks} ranks = {batch}, no multiple of {field} {group}. "
            f"Nearest valid: {_nearest(each, plan.ranks, group)}."
        )
    elif rows is not None:
        prompts = batch // group
        line = f"evaluation: {rows} prompts × {group} replies, {prompts} prompts at once = {-(-rows // prompts)} rounds"
        plan.lines.append(line + (f"; the last is filled up with {-rows % prompts} of the first prompts again" if rows % prompts else ""))


def _nearest(each: int, times: int, group: int) -> str:
    """The two batch sizes nearest to `each` that, `times` over, are a multiple of `group`."""
    sizes = [size for size in range(1, each + group + 1) if size * times % group == 0]
    return " or ".join(map(str, sorted(sorted(sizes, key=lambda size: abs(size - each))[:2])))
