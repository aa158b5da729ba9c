# One image for the code server, the webserver and the daemon; the command decides (docker-compose.example.yaml).
# Pin the base by digest in your own registry: docker buildx imagetools inspect python:3.11-slim
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DAGSTER_HOME=/opt/dagster/home

RUN useradd --system --uid 10001 --home-dir /opt/dagster --create-home dagster \
    && mkdir -p /opt/dagster/home /opt/dagster/app \
    && chown dagster /opt/dagster/home

WORKDIR /opt/dagster/app

# Packages first, since they change rarely: pinned and compiled (without compiled files each run costs 2.5 times the
# CPU). Neither the sandbox nor any development tool is installed.
COPY pyproject.toml constraints.txt README.md ./
RUN mkdir billing_orchestration && touch billing_orchestration/__init__.py \
    && pip install -c constraints.txt . \
    && pip uninstall -y billing-orchestration && rm -rf billing_orchestration build ./*.egg-info

COPY billing_orchestration ./billing_orchestration
RUN pip install --no-deps . && rm -rf billing_orchestration build ./*.egg-info

COPY workspace.yaml workspace.grpc.yaml ./
COPY run_configs ./run_configs
COPY deploy/dagster.yaml /opt/dagster/home/dagster.yaml

USER dagster
EXPOSE 3000 4000

# In a container, a server listens on all of the container's addresses. Publish a port only where it is needed: the
# webserver has no login, so keep it behind a proxy that asks for one.
#   code server  dagster api grpc -m billing_orchestration.definitions -h 0.0.0.0 -p 4000 --location-name billing
#   webserver    dagster-webserver -h 0.0.0.0 -p 3000 -w workspace.grpc.yaml
#   daemon       dagster-daemon run -w workspace.grpc.yaml
#                (both with DAGSTER_CODE_SERVER_HOST and DAGSTER_CODE_SERVER_PORT)
#   once         billing-orchestration migrate
# No HEALTHCHECK here: the three need different ones, see docker-compose.example.yaml.
CMD ["dagster", "api", "grpc", "-m", "billing_orchestration.definitions", "-h", "0.0.0.0", "-p", "4000", "--location-name", "billing"]
