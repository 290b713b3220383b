# Not built yet: this file follows grpo_launcher/launch/environment.sh, and nobody has run it.
# Without a GPU: packages of requirements/cpu.lock, installed by the project's own script.
#   docker build --file docker/cpu.Dockerfile --tag grpo-launcher:cpu .
#   docker run --rm --shm-size 2g --cap-add SYS_PTRACE --volume grpo-data:/home/grpo/launcher/data \
#       --volume grpo-runs:/home/grpo/launcher/trainOutput grpo-launcher:cpu configs/quickstart.yaml
# Keys are given to `docker run --env HF_TOKEN`, and are never in the image.
FROM python:3.11-slim-bookworm

# g++ for torch's and DeepSpeed's operators where one is compiled; libnuma for vLLM on a CPU
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 grpo \
    && install --directory --owner grpo --group grpo \
        /home/grpo/launcher /home/grpo/launcher/data /home/grpo/launcher/trainOutput
USER grpo
WORKDIR /home/grpo/launcher

COPY --chown=grpo:grpo requirements requirements
COPY --chown=grpo:grpo grpo_launcher grpo_launcher
COPY --chown=grpo:grpo rewards rewards
COPY --chown=grpo:grpo configs configs
COPY --chown=grpo:grpo pyproject.toml README.md LICENSE *.py *.sh zero3.yaml ddp.yaml ./
# The same installation as that of `bash launch_train.sh`, with its checks
RUN ["bash", "-c", "set -euo pipefail; here=$PWD; source grpo_launcher/launch/environment.sh"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["bash", "launch_train.sh"]
