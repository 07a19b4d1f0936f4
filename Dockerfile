# syntax=docker/dockerfile:1

# Install into a virtual environment. The second stage copies nothing else.
FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/catbus
COPY . /src
RUN /opt/catbus/bin/pip install /src \
    && /opt/catbus/bin/python -m compileall -q /opt/catbus \
    && /opt/catbus/bin/pip uninstall --yes pip

FROM python:3.13-slim
LABEL org.opencontainers.image.title="Catbus" \
      org.opencontainers.image.description="A real-time message broker with a durable log in PostgreSQL" \
      org.opencontainers.image.licenses="MIT"
RUN groupadd --gid 10001 catbus \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin catbus \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/catbus
COPY --from=build /opt/catbus /opt/catbus
# The broker writes to the state directory only, and in production not even there, so the file system may be read-only.
ENV PATH=/opt/catbus/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    CATBUS_STATE=/var/lib/catbus
USER 10001:10001
# WebTransport, over QUIC; WebSocket and HTTP.
EXPOSE 4433/udp 8080/tcp
# Kubernetes has its own probes and ignores this.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=2)"]
# Arguments are options of `catbus run`: `docker run IMAGE --workers auto` uses all cores.
# On SIGTERM the broker drains, which takes up to 15 s with many clients: allow that time (docker stop --time 30).
STOPSIGNAL SIGTERM
ENTRYPOINT ["catbus", "run"]
