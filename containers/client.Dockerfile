# A device's client. Context: a folder with wheels/ and the requirements.txt that was made with --wheels.
#   docker build -f client.Dockerfile -t fedveil-client .
#   docker run --restart=always --read-only --tmpfs /tmp --cap-drop=ALL --security-opt=no-new-privileges \
#     --memory=1g --user "$(id -u):$(id -g)" --volume BUNDLE:/bundle fedveil-client
ARG PYTHON=3.11-slim-trixie

FROM python:${PYTHON} AS build
COPY wheels /wheels
COPY requirements.txt /requirements.txt
RUN python -m venv /opt/fedveil \
 && /opt/fedveil/bin/pip install --no-cache-dir --no-index --find-links /wheels --require-hashes -r /requirements.txt

FROM python:${PYTHON}
COPY --from=build /opt/fedveil /opt/fedveil
# Nobody's; run it as whoever owns the bundle.
USER 65532:65532
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# The bundle, and its state: the one place that is written to.
VOLUME ["/bundle"]
ENTRYPOINT ["/opt/fedveil/bin/fedveil", "client", "start", "/bundle"]
