FROM python:3.11-slim

RUN useradd --create-home --uid 1000 guard \
    && mkdir /cache \
    && chown guard:guard /cache
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
# A CPU build of torch is smaller: --build-arg PIP_EXTRA_INDEX_URL=<CPU index of PyTorch>
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir -c constraints.txt "torch==2.13.0" ".[serve]"

# A number, so that Kubernetes can check that it is not root.
USER 1000:1000
ENV VLM_SAFEGUARD_CACHE=/cache
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready')"]
# The server refuses to listen on all addresses unless VLM_SAFEGUARD_API_KEYS is set.
ENTRYPOINT ["vlm-safeguard", "serve", "--host", "0.0.0.0"]
