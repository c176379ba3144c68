# The aggregation server. Context: a folder with wheels/, by `pip wheel -w wheels '.[simulation]'` in the source tree;
# that extra holds the settings' reader and the data of the tasks that come along.
#   docker build -f server.Dockerfile -t fedveil-server .
#   docker run --restart=on-failure --read-only --tmpfs /tmp --cap-drop=ALL --security-opt=no-new-privileges \
#     --publish 8443:8443 --user "$(id -u):$(id -g)" --volume BUNDLE:/bundle fedveil-server
ARG PYTHON=3.11-slim-trixie

FROM python:${PYTHON} AS build
COPY wheels /wheels
RUN python -m venv /opt/fedveil \
 && /opt/fedveil/bin/pip install --no-cache-dir --no-index --find-links /wheels 'fedveil[simulation]'

FROM python:${PYTHON}
COPY --from=build /opt/fedveil /opt/fedveil
# Nobody's; run it as whoever owns the bundle. Plots want a home that can be written to.
USER 65532:65532
ENV HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# The bundle, and its state: the one place that is written to.
VOLUME ["/bundle"]
ENTRYPOINT ["/opt/fedveil/bin/fedveil", "server", "/bundle"]
