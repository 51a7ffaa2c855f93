# docker build -t ssl-xcit .
# docker run --gpus all --shm-size=8g -v "$PWD":/work ssl-xcit pretrain data.root=DIR
# No container has been built with it yet. torch's wheels bring CUDA with them: of the base, only what
# lets the host's driver in is used, and any Debian or Ubuntu with Python 3.10 or later does on a CPU
# (--build-arg BASE=debian:13-slim).
ARG BASE=nvidia/cuda:13.0.0-base-ubuntu24.04
FROM ${BASE}
# g++ and Python's headers: compile=true
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
 && rm -rf /var/lib/apt/lists/*
COPY . /opt/ssl_xcit
RUN python3 -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --no-cache-dir "/opt/ssl_xcit[tensorboard,hub,timm]"
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["ssl-xcit"]
CMD ["--help"]
