# An image for GPU clusters: dbtrain with CUDA PyTorch, Ray and the libraries of object stores, without root.
#
#   docker build -t registry.example/dbtrain:1 .
#   docker run --gpus all registry.example/dbtrain:1 dbtrain doctor
#
# All versions are those of constraints.txt. This file is linted in the tests; it was not built there (docs/operations.md).
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 DS_IGNORE_CUDA_DETECTION=1
RUN python -m venv /opt/dbtrain
ENV PATH=/opt/dbtrain/bin:$PATH
WORKDIR /src
# Dependencies first: this layer stays as long as the constraints do. On Linux, PyPI's torch is a build for CUDA, and
# DeepSpeed's setup asks for it.
COPY constraints.txt ./
RUN pip install -c constraints.txt setuptools wheel && pip install -c constraints.txt torch
COPY setup.py pyproject.toml README.md LICENSE NOTICE ./
COPY configs configs
COPY kernels kernels
COPY launchers launchers
COPY dbtrain dbtrain
RUN pip install -c constraints.txt --no-build-isolation ".[cluster,gpu,photos,stores,trackers]"

FROM python:${PYTHON} AS run
# gcc: Triton compiles a kernel's launcher where it runs. wget: KubeRay's probes call it. openssh-client: DeepSpeed over
# several hosts. tini: ends the children of a killed command.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev openssh-client tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 dbtrain \
    && useradd --uid 1000 --gid 1000 --create-home --home-dir /var/lib/dbtrain dbtrain
COPY --from=build /opt/dbtrain /opt/dbtrain
ENV PATH=/opt/dbtrain/bin:$PATH PYTHONUNBUFFERED=1
# By number, so that Kubernetes can see that it is not root; the RayJob of `dbtrain launch kubernetes` asks for 1000.
USER 1000:1000
WORKDIR /var/lib/dbtrain
ENTRYPOINT ["tini", "--"]
CMD ["dbtrain", "doctor"]
