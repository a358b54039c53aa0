# The inference service, without torch.
FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements.lock deploy/service/requirements.txt ./
RUN python -m venv /venv && /venv/bin/pip install -c requirements.lock -r requirements.txt

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home ddpm
COPY --from=build /venv /venv
WORKDIR /app
COPY diffusion diffusion
COPY deploy/service deploy/service
COPY deploy/web deploy/web
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
CMD ["python", "-m", "deploy.service", "--model", "models:/ddpm@champion", "--host", "0.0.0.0", "--keys", "/etc/ddpm/keys"]
