# The aggregation server. Context: a folder with wheels/ and requirements.txt, which names each wheel by its hash:
#   pip wheel --no-build-isolation --require-hashes -r containers/server.lock -w wheels   # and fedveil's own wheel
#   sha256sum wheels/*.whl | sed -E 's|^([0-9a-f]{64}) +(.*)|./\2 --hash=sha256:\1|' > requirements.txt
#   docker build -f server.Dockerfile --build-arg PYTHON_DIGEST=sha256:... -t fedveil-server .
#   docker run --restart=on-failure --read-only --tmpfs /tmp --cap-drop=ALL --security-opt=no-new-privileges \
#     --publish 8443:8443 --user "$(id -u):$(id -g)" --volume BUNDLE:/bundle fedveil-server
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
# Nobody's; run it as whoever owns the bundle. Plots want a home that can be written to.
USER 65532:65532
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# The bundle, and its state: the one place that is written to.
VOLUME ["/bundle"]
ENTRYPOINT ["/opt/fedveil/bin/fedveil", "server", "/bundle"]
