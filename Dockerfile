# syntax=docker/dockerfile:1
# The proxy on Python's own image: docker build -t sp-api-proxy .
# For several architectures, with a list of what is in it: docker buildx build --platform linux/amd64,linux/arm64 --sbom=true .
# docs/container.md says how to run it. .ci/check_image.py follows this file where there is no container engine.

# The digest is the index's, for all architectures. For a newer one: docker buildx imagetools inspect python:3.13-slim-trixie
FROM python:3.13.15-slim-trixie@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b AS base

# pip, the build backend, their caches and the sources stay in this stage.
FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /build
COPY requirements.lock requirements-build.lock ./
# The environment has no pip of its own. Wheels alone: a source archive would want a compiler, and runs code to be built.
RUN python -m venv --without-pip /opt/sp-api-proxy \
    && python -m pip --python /opt/sp-api-proxy/bin/python install \
        --require-hashes --only-binary=:all: --no-compile -r requirements.lock \
    && python -m pip install --require-hashes --only-binary=:all: --no-compile -r requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY proxy proxy
# Compiled here, since nothing can be written later; by hash, since the times of files differ from build to build.
RUN python -m pip wheel --no-deps --no-index --no-build-isolation --wheel-dir dist . \
    && python -m pip --python /opt/sp-api-proxy/bin/python install --no-deps --no-index --no-compile dist/*.whl \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/sp-api-proxy

FROM base
# The proxy installs nothing, so pip goes. The standard library comes without bytecode; each start and each look at the
# container's health would compile it anew.
RUN python -m pip uninstall --yes --quiet --root-user-action=ignore pip \
    && stdlib="$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && rm -r "$stdlib/ensurepip" \
    && python -m compileall -q --invalidation-mode unchecked-hash -x '/tests?/' "$stdlib"
COPY --from=build /opt/sp-api-proxy /opt/sp-api-proxy
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sp-api-proxy" \
      org.opencontainers.image.description="A local authenticating reverse proxy for Amazon's Selling Partner API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.13.15-slim-trixie" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
# No setting of the proxy's is here: the environment would override the file that somebody mounts.
ENV PATH=/opt/sp-api-proxy/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
EXPOSE 8080
# By number, so that runAsNonRoot can be checked. It is nobody's and has no home.
USER 65532:65532
STOPSIGNAL SIGTERM
# Asks the admin address within the container; without a shell, and without curl.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["sp-api-proxy", "healthcheck"]
ENTRYPOINT ["sp-api-proxy"]
CMD ["serve"]
