# An image for CUDA machines, with the versions of constraints.txt. Not built yet (docs/docker.md says what was tried).
#
#   docker build --tag megatron-solopo .
#   docker build --tag megatron-solopo --build-arg BASE=nvcr.io/nvidia/pytorch:25.10-py3 .    # keeps NGC's torch
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Triton compiles its kernels with the C compiler of the base's CUDA image.
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then \
        apt-get update && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi

ENV VIRTUAL_ENV=/opt/solopo
ENV PATH=${VIRTUAL_ENV}/bin:${PATH}
WORKDIR /workspace/megatron_solopo

# The dependencies are a layer of their own, which a change of the code does not touch. A torch that the base brings
# stays, and with it the versions that the base asks pip for (PIP_CONSTRAINT in NGC's images).
ARG EXTRAS=report,server,sentencepiece,tiktoken,tensorboard,wandb
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY megatron_solopo/__init__.py megatron_solopo/
# hadolint ignore=DL3013
RUN python3 -m venv --system-site-packages "${VIRTUAL_ENV}" \
    && if ! python -c 'import torch' 2>/dev/null; then export PIP_CONSTRAINT=constraints.txt; fi \
    && pip install --no-cache-dir ".[${EXTRAS}]" \
    && pip uninstall --yes megatron-solopo

COPY . .
RUN pip install --no-cache-dir --no-deps --editable .

CMD ["solopo", "--help"]
