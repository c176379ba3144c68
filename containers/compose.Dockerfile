# One image for desk, server and clients of compose.yaml. Context: the repository.
# A tag may be moved: name the base by its digest, as `docker buildx imagetools inspect` prints it, with
#   --build-arg PYTHON=docker.io/library/python:3.11-slim-trixie@sha256:...
ARG PYTHON=docker.io/library/python:3.11-slim-trixie

FROM ${PYTHON} AS build
# Where pip finds torch without CUDA, beside the index.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_FIND_LINKS=
COPY .ci/dev.lock .ci/torch.lock containers/server.lock /locks/
WORKDIR /locks
RUN python -m venv /opt/fedveil \
 && awk '/^[a-z]/ { own = /^setuptools=/ } own' dev.lock > build.lock \
 && awk '/^[a-z]/ { own = /^(torch=|triton=|cuda-|nvidia-)/ } own' server.lock > cuda.lock \
 && awk '/^[a-z]/ { own = !/^(torch=|triton=|cuda-|nvidia-)/ } own' server.lock > others.lock
# Every file is one of a lock, by its hash. Where no build without CUDA is found, the lock's own torch, which may bring CUDA.
RUN /opt/fedveil/bin/pip install --no-cache-dir --no-deps --require-hashes -r torch.lock \
 || /opt/fedveil/bin/pip install --no-cache-dir --no-deps --require-hashes -r cuda.lock
RUN /opt/fedveil/bin/pip install --no-cache-dir --no-deps --require-hashes -r build.lock -r others.lock
COPY . /fedveil
RUN /opt/fedveil/bin/pip install --no-cache-dir --no-deps --no-build-isolation --no-index /fedveil

FROM ${PYTHON}
COPY --from=build /opt/fedveil /opt/fedveil
COPY examples/hospitals/make_hospitals.py examples/hospitals/schema.yaml containers/hospitals.yaml \
     containers/desk.sh containers/with_bundle.sh /hospitals/
# New volumes take their owner and mode from these folders.
RUN install -d -m 0700 -o 65532 -g 65532 /bundle /desk /bundles/server /bundles/cleveland /bundles/hungary \
      /bundles/va-long-beach
USER 65532:65532
# One thread for each of several clients on a machine.
ENV PATH=/opt/fedveil/bin:$PATH HOME=/tmp OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["/bin/sh", "/hospitals/with_bundle.sh"]
