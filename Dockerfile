# One image for the code server, the webserver and the daemon; the command decides (deploy/compose/compose.yaml).
# Pin the base by digest: docker build --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:... (docker buildx imagetools
# inspect python:3.11-slim prints it).
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DAGSTER_HOME=/opt/dagster/home

RUN groupadd --gid 10001 dagster \
    && useradd --uid 10001 --gid dagster --no-log-init --home-dir /opt/dagster --create-home dagster \
    && mkdir -p /opt/dagster/home /opt/dagster/app \
    && chown dagster /opt/dagster/home

WORKDIR /opt/dagster/app

# Packages first, since they change rarely: each is one of the files whose hash is written down (`make lock`), and they are
# compiled (without compiled files each run costs 2.5 times the CPU). The first file holds what builds the others and our
# own package, so that no build fetches anything. Neither the sandbox nor any development tool is installed.
COPY deploy/requirements.build.txt deploy/requirements.txt /tmp/
RUN pip install --require-hashes --no-deps -r /tmp/requirements.build.txt \
    && pip install --require-hashes --no-deps --no-build-isolation -r /tmp/requirements.txt \
    && pip check

COPY pyproject.toml README.md ./
COPY billing_orchestration ./billing_orchestration
RUN pip install --no-index --no-deps --no-build-isolation . \
    && rm -rf billing_orchestration build ./*.egg-info pyproject.toml README.md

COPY workspace.yaml workspace.grpc.yaml ./
COPY run_configs ./run_configs
COPY deploy/celery ./deploy/celery
COPY deploy/kubernetes ./deploy/kubernetes
COPY docs ./docs
COPY deploy/dagster.yaml /opt/dagster/home/dagster.yaml

# By number: Kubernetes' runAsNonRoot accepts no name.
USER 10001
EXPOSE 3000 4000

# In a container, a server listens on all of the container's addresses.
#   code server  dagster api grpc -m billing_orchestration.definitions -h 0.0.0.0 -p 4000 --location-name billing
#                Whoever reaches its port can launch runs: it asks for no login. Give it a network of its own.
#   webserver    billing-orchestration webserver -h 0.0.0.0 -w workspace.grpc.yaml
#                It starts only with a login (UI_AUTH). It needs no key of the shop and no billing database.
#   daemon       dagster-daemon run -w workspace.grpc.yaml
#                (both with DAGSTER_POSTGRES_URL, DAGSTER_CODE_SERVER_HOST and DAGSTER_CODE_SERVER_PORT)
#   once         billing-orchestration migrate
# No HEALTHCHECK here: the three need different ones, see deploy/compose/compose.yaml.
CMD ["dagster", "api", "grpc", "-m", "billing_orchestration.definitions", "-h", "0.0.0.0", "-p", "4000", "--location-name", "billing"]
