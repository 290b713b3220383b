# Not built yet: this file follows grpo_launcher/launch/environment.sh, and nobody has run it.
# With NVIDIA GPUs: packages of requirements/gpu.lock. torch's wheels bring CUDA; the driver comes from the host.
#   docker build --file docker/gpu.Dockerfile --tag grpo-launcher:gpu .
#   docker run --rm --gpus all --shm-size 16g --cap-add SYS_PTRACE --env HF_TOKEN \
#       --volume grpo-cache:/home/grpo/.cache --volume grpo-data:/home/grpo/launcher/data \
#       --volume grpo-runs:/home/grpo/launcher/trainOutput grpo-launcher:gpu configs/tldr_length.yaml
# Keys are given to `docker run --env HF_TOKEN`, and are never in the image.
FROM python:3.11-slim-bookworm

# DeepSpeed and vLLM compile operators at their first launch. Python's headers are in this image.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 grpo \
    && install --directory --owner grpo --group grpo \
        /home/grpo/.cache /home/grpo/launcher /home/grpo/launcher/data /home/grpo/launcher/trainOutput
USER grpo
WORKDIR /home/grpo/launcher

# environment.sh takes gpu.lock only where nvidia-smi lists a GPU, and a build has none. So its steps stand here.
COPY --chown=grpo:grpo requirements requirements
RUN python3.11 -m venv .venv \
    && .venv/bin/python -m pip install --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --requirement requirements/gpu.lock
COPY --chown=grpo:grpo grpo_launcher grpo_launcher
COPY --chown=grpo:grpo rewards rewards
COPY --chown=grpo:grpo configs configs
COPY --chown=grpo:grpo pyproject.toml README.md LICENSE *.py *.sh zero3.yaml ddp.yaml ./
# The last line tells environment.sh that nothing is left to install.
RUN .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check --editable . \
    && .venv/bin/python -c 'import torch, grpo_launcher' \
    && cat requirements/gpu.lock pyproject.toml | sha256sum | cut -d' ' -f1 >.venv/installed

# The toolkit of NVIDIA on the host gives the container these parts of the driver.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
STOPSIGNAL SIGTERM
ENTRYPOINT ["bash", "launch_train.sh"]
