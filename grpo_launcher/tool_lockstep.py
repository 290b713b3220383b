"""Tools on several ranks: all of them generate every turn together, however many turns the prompts of each need."""

from accelerate.utils import gather_object


class ToolLockstep:
    """A mixin for GRPOTrainer, whose ranks each loop until their own prompts call no more tools, while a turn needs all of them.

    TRL 1.16 shares a turn's completions out as if every rank had sent equally many prompts, so a completion goes to another's prompt
    (trl#6673); under ZeRO-3 without vLLM the ranks wait for each other in different places. Here a turn is one list of all ranks' prompts, shared
    out evenly, and every rank takes its own part of what comes back; a rank that is done joins in until nobody has a prompt left.

    To be deleted when `test_the_stock_class_mixes_prompts_up` fails: it asserts that TRL's own class still does.
    """

    _turning = False

    def _tool_call_loop(self, *args):
        self._turning = True
        try:
            done = super()._tool_call_loop(*args)
            while self._turn_together([]) is not None:
                pass
        finally:
            self._turning = False
        return done

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """(completion ids, their log-probabilities or None), one a prompt of this rank."""
        if not self._turning:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
        return self._turn_together(prompt_ids)

    def _turn_together(self, prompt_ids: list[list[int]]) -> tuple[list, list | None] | None:
        """One turn of all ranks, in which this one asks any number of prompts; None where nobody asked one."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        asked = gather_object([prompt_ids])
        everything = [ids for one in asked for ids in one]
        if not everything:
            return None
        share = -(-len(everything) // ranks)
        filled = everything + everything[-1:] * (share * ranks - len(everything))  # the stock turn wants as many of each rank
        ids, logprobs = super()._generate_single_turn(filled[rank * share : (rank + 1) * share], None, {}, 1)
        start = sum(map(len, asked[:rank]))
        mine = slice(start, start + len(prompt_ids))
        return gather_object(ids)[mine], None if logprobs is None else gather_object(logprobs)[mine]
