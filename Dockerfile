# docker build -t ehr-msn .                                                          a CPU image
# docker build -t ehr-msn --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .  for GPUs
# docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD:/work" ehr-msn demo
# pip takes torch's CUDA build on Linux; for a small CPU image pass the index of torch's CPU wheels in PIP_ARGS.
ARG BASE=python:3.11-slim
FROM ${BASE}
LABEL org.opencontainers.image.title="EHR-MSN" org.opencontainers.image.licenses="MIT"

ARG DEBIAN_FRONTEND=noninteractive
RUN command -v python3 >/dev/null || \
    { apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; }

ARG PIP_ARGS=""
COPY pyproject.toml README.md LICENSE /src/
COPY configs /src/configs
COPY ehr_features /src/ehr_features
COPY pretrain /src/pretrain
COPY finetune /src/finetune
RUN python3 -m venv /opt/ehr-msn && /opt/ehr-msn/bin/pip install --no-cache-dir ${PIP_ARGS} "/src[dicom]" && rm -rf /src

RUN useradd --create-home ehr && mkdir /work && chown ehr /work
USER ehr
ENV PATH=/opt/ehr-msn/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /work
ENTRYPOINT ["ehr-msn"]
CMD ["help"]
