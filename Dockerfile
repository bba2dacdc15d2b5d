# querit serve over one model. Without a GPU, PyTorch's index of CPU wheels saves gigabytes:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t querit .
FROM python:3.11-slim
ARG PIP_EXTRA_INDEX_URL
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[serve]" \
    && rm -rf /src && useradd --create-home querit && mkdir /models && chown querit /models
USER querit
# Models come from the Hub the first time, and stay in this volume.
ENV HF_HOME=/models
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD \
    python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["querit", "serve", "--host", "0.0.0.0"]
