import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it tells at every import that faster 4-bit kernels are not installed
