# Two images: `search` searches and serves an index that exists, without torch; `full` also extracts, trains and indexes.
#
#   docker build --target search -t svb:search .
#   docker build --target full -t svb:full .

FROM python:3.12-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/svb/bin:$PATH SVB_INDEX=/index
RUN useradd --uid 1000 --create-home svb && mkdir /videos /store /index && chown svb:svb /videos /store /index
WORKDIR /index

FROM base AS build-search
# For `strip`.
RUN apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN sh /src/lean.sh /opt/svb

FROM base AS build-full
COPY . /src
RUN python -m venv /opt/svb && /opt/svb/bin/pip install '/src[mcp,editor]' && /opt/svb/bin/pip uninstall -y pip

FROM base AS full
COPY --from=build-full /opt/svb /opt/svb
USER svb
VOLUME ["/videos", "/store", "/index"]
ENTRYPOINT ["svb"]
CMD ["--help"]

FROM base AS search
COPY --from=build-search /opt/svb /opt/svb
USER svb
# The index names videos by their paths: mount them where they were when they were extracted.
VOLUME ["/videos", "/index"]
EXPOSE 8765
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8765/healthz', timeout=4)"]
ENTRYPOINT ["svb"]
# Other machines need the token: SVB_TOKEN, or a new one that the log shows.
CMD ["serve", "--host", "0.0.0.0"]
