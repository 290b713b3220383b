"""Reward functions in TRL's form: called by keyword with a batch, they return one score a completion.

`completions` are B texts, or B lists of chat messages of which the last assistant message counts. A parameter before
`*` is a column of the dataset, one after it an option (`reward_kwargs`). `**columns` takes all else that TRL passes.
None is a completion that could not be judged. A measure is a reward to use with weight 0: reported, never trained on.
"""
