# The image of the payment service. Digests belong to a release, so a release names its base by one:
#   docker build --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:... \
#     --build-arg VERSION=0.2.0 --build-arg REVISION="$(git rev-parse HEAD)" --build-arg CREATED="$(date -u +%FT%TZ)" \
#     -t payment-service:0.2.0 .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
# Without pip, for nothing is installed into it later. Dependencies first: they change less often than the code.
RUN python -m venv --without-pip /opt/eci-pay
COPY requirements.txt ./
RUN pip --python /opt/eci-pay/bin/python install --no-cache-dir --only-binary :all: --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY cli cli
COPY eci_pay eci_pay
COPY server server
COPY sql sql
# setuptools builds the package, and nothing of it is needed to run it.
RUN pip --python /opt/eci-pay/bin/python install --no-cache-dir --no-deps --no-build-isolation . \
    && pip --python /opt/eci-pay/bin/python uninstall --yes setuptools

FROM ${PYTHON_IMAGE}
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="payment-service" \
      org.opencontainers.image.description="Charges, refunds and queries payments" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
COPY --from=build /opt/eci-pay /opt/eci-pay
# Nothing is written but under /tmp, and there only by a server with several workers: the root file system may be
# read-only.
ENV PATH=/opt/eci-pay/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1
# By number, so that an orchestrator can tell that it is not root.
USER 10001:10001
EXPOSE 8006
# Alive, not ready: a database that is away is no reason to replace the container. Engines give containers the proxy of
# their user, which is not asked for this one.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8006/health/live', timeout=2)"]
ENTRYPOINT ["eci-pay"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8006"]
