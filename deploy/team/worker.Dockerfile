# Workers, and the servers of Prefect and MLflow. Without a GPU, PyTorch's index of builds for CPUs as
# --build-arg PIP_EXTRA_INDEX_URL=... saves 5 GB.
FROM python:3.11-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements.lock requirements-dev.lock ./
COPY deploy/team/kubernetes/requirements.txt kubernetes.txt
RUN python -m venv /venv && /venv/bin/pip install -r requirements.lock
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY diffusion diffusion
COPY flows flows
RUN /venv/bin/pip install -c requirements.lock -c requirements-dev.lock -r kubernetes.txt '.[team,cluster]'

FROM python:3.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes git openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /work --no-create-home ddpm \
    && install --directory --owner ddpm /work
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/work
USER 10001
WORKDIR /work
CMD ["prefect", "worker", "start", "--pool", "ddpm", "--type", "process"]
