"""vLLM's OpenAI-compatible server: python -P -m grpo_launcher.vllm_server [option of vLLM's api_server ...]

launch/commands.py writes its command, and launch/supervise.py starts it. A second process follows, and both load this
module first. They import without collecting garbage, which would take a third of the time, and no later collection
looks at what they have imported.
"""

import gc
import importlib
import runpy
import sys

SERVER = "vllm.entrypoints.openai.api_server"

gc.disable()
if __name__ == "__main__":
    importlib.import_module(SERVER)
    del sys.modules[SERVER]  # run_module warns of a module that is there
else:
    import vllm.v1.engine.core  # noqa: F401
gc.freeze()
gc.enable()

if __name__ == "__main__":
    runpy.run_module(SERVER, run_name="__main__")
