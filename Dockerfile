# syntax=docker/dockerfile:1
# The image of every node of a cluster, head and workers alike: one Python, one Ray, one torch. It runs on machines with
# and without GPUs: torch's wheels bring CUDA, and the host its driver.
#   docker build --tag REGISTRY/prima_ray:TAG . && docker push REGISTRY/prima_ray:TAG
FROM python:3.11-slim-bookworm

# g++: DeepSpeed compiles its op for CPUs. The others are for what starts nodes: the cluster launcher copies files and
# looks at processes, KubeRay's probes fetch a page.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client procps rsync wget \
    && rm -rf /var/lib/apt/lists/*

COPY --from=ghcr.io/astral-sh/uv:0.13 /uv /usr/local/bin/uv
# Not root: what a job can do on a node ends with this user. 1000 is the user of Ray's own images. The cluster launcher
# uses login shells, which set the path anew.
# hadolint ignore=SC2016
RUN useradd --uid 1000 --create-home --shell /bin/bash ray \
    && install --directory --owner=ray /opt/prima_ray /opt/venv \
    && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/prima_ray.sh
USER 1000
WORKDIR /opt/prima_ray
ENV UV_PROJECT_ENVIRONMENT=/opt/venv UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 PATH=/opt/venv/bin:$PATH \
    RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

# The dependencies first, in a layer that a change of the code leaves as it is. `exclude-newer` in pyproject.toml makes
# the resolution repeatable without a lock file.
COPY --chown=1000 pyproject.toml README.md LICENSE ./
RUN uv sync --all-extras --no-default-groups --no-install-project
COPY --chown=1000 prima_ray prima_ray
COPY --chown=1000 jobs jobs
RUN uv sync --all-extras --no-default-groups && python -m prima_ray.training.engine_build

# No start command: the cluster launcher and KubeRay bring theirs, with the token. Alone the image says how it is.
CMD ["prima", "doctor"]
