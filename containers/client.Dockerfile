# A device's client. Context: a folder with wheels/ and the requirements.txt of a bundle, which name each wheel by its hash.
#   docker build -f client.Dockerfile --build-arg PYTHON_DIGEST=sha256:... -t fedveil-client .
#   docker run --restart=always --read-only --tmpfs /tmp --cap-drop=ALL --security-opt=no-new-privileges \
#     --memory=1g --user "$(id -u):$(id -g)" --volume BUNDLE:/bundle fedveil-client
# Of python:3.11-slim-trixie, as `docker buildx imagetools inspect` prints it; a tag may be moved, so there is no default.
ARG PYTHON_DIGEST

FROM python:3.11-slim-trixie@${PYTHON_DIGEST} AS build
COPY wheels /wheels
COPY requirements.txt /requirements.txt
WORKDIR /
RUN python -m venv /opt/fedveil \
 && /opt/fedveil/bin/pip install --no-cache-dir --no-index --find-links /wheels --only-binary=:all: --require-hashes \
      -r /requirements.txt

FROM python:3.11-slim-trixie@${PYTHON_DIGEST}
COPY --from=build /opt/fedveil /opt/fedveil
# Nobody's; run it as whoever owns the bundle.
USER 65532:65532
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# The bundle, and its state: the one place that is written to.
VOLUME ["/bundle"]
ENTRYPOINT ["/opt/fedveil/bin/fedveil", "client", "start", "/bundle"]
