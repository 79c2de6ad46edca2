# One image for the API, the migration and the workers. CUDA comes with torch's wheel; the host brings the driver.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Where pip looks besides its usual index: a CPU build of torch makes the image a quarter of the size.
ARG PIP_FIND_LINKS
ARG PIP_EXTRA_INDEX_URL
ENV PATH=/opt/distillery/bin:$PATH
WORKDIR /src
# For the engine's kernels. The compiler stays in this stage; the distribution of the base image fixes its version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/distillery
# A memory allocator that is faster at the sizes of activations. The worker looks for it in Python's own folder, too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libjemalloc2=5.3.0-* \
    && rm -rf /var/lib/apt/lists/* \
    && cp /usr/lib/*-linux-gnu/libjemalloc.so.2 /opt/distillery/lib/
# The dependencies are a layer of their own: a change of the code does not fetch gigabytes again.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    extras = project["optional-dependencies"]; \
    print(*project["dependencies"], *extras["timm"], *extras["parquet"], *extras["onnx"], sep="\n")' > requirements.txt \
    && PIP_FIND_LINKS="${PIP_FIND_LINKS}" PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL}" \
    pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -r requirements.txt setuptools
COPY README.md serve.py ./
COPY base base
COPY kdcore kdcore
COPY store store
COPY api api
COPY worker worker
COPY client client
COPY migrations migrations
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation . \
    && pip check
# -P: the installed package, not the folder here.
RUN python -P -m kdcore.kernels

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="distillery" \
    org.opencontainers.image.description="Distils a large image classifier into a small one, and proves that it helped"
RUN groupadd --gid 10001 distillery \
    && useradd --uid 10001 --gid distillery --home-dir /var/lib/distillery --no-create-home distillery \
    && install --directory --mode 0700 --owner distillery --group distillery /var/lib/distillery
COPY --from=build /opt/distillery /opt/distillery
ENV PATH=/opt/distillery/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DISTILLERY_HOME=/var/lib/distillery
USER 10001:10001
WORKDIR /var/lib/distillery
VOLUME /var/lib/distillery
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["python", "-m", "api"]
