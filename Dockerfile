# local/torch: base → deps (the virtual environment), native (compiled kernels) → runtime → dev. Only dependencies
# and kernels are in the image; the checkout is mounted at /usr/src/app/tml, so editing Python never rebuilds.
#
#   python -m tml.docker build          what `run` uses: labelled with the hash of what went in
#   docker compose build, docker build . --target runtime      the same, by BuildKit
#
# No RUN --mount: docker-py speaks to the engine's classic builder only, which has none.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS base
# The whole PATH is written out: a base image need not state one, and then $PATH would be empty here.
ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1

FROM base AS deps
ARG VARIANT=cpu
# `build` finds this stage by the label and removes it: it may hold wheels and an index address with a password.
LABEL tml.stage=deps
# .build/ is what the host's pip knows: wheels of the pinned set, pip.conf, cert.pem. It may be absent (the
# pattern then matches nothing). It is copied into this stage alone, of which only /opt/venv goes further:
# neither a wheel nor an address reaches a layer, the history or a label of the image that is kept.
# The files are named one by one: dev.txt is not among them, so that the tests' tools rebuild nothing here.
COPY requirements/install.sh requirements/launcher.txt requirements/train.txt \
     requirements/${VARIANT}.txt .build* /build/
RUN python3 -m venv /opt/venv \
 && if [ -f /build/pip.conf ]; then export PIP_CONFIG_FILE=/build/pip.conf; \
    elif [ -d /build/wheels ]; then export PIP_FIND_LINKS=/build/wheels; fi \
 && if [ -f /build/cert.pem ]; then export PIP_CERT=/build/cert.pem; fi \
 && PIP_NO_CACHE_DIR=1 bash /build/install.sh /opt/venv/bin/python "${VARIANT}" \
 && echo /usr/src/app/tml > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tml.pth"

# Kernels in C (tml/native/), without which torch does the same more slowly. The compiler stays in this stage; where
# no package archive can be reached, there is an image without kernels.
FROM base AS native
LABEL tml.stage=deps
COPY tml/native/ /build/native/
RUN mkdir -p /opt/venv/lib/tml \
 && compile() { python3 /build/native/build.py /opt/venv/lib/tml; } \
 && { compile 2>/dev/null \
      || { apt-get update -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=10 \
           && apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null && compile; } \
      || echo "no C compiler could be installed: this image has no kernels, and torch does their work"; }

FROM base AS runtime
COPY --from=deps /opt/venv /opt/venv
COPY --from=native /opt/venv/lib/tml /opt/venv/lib/tml
# The container runs as whoever started it: any user id must be able to reach the mounts below /root and to
# write caches there. The mount points exist so that the engine need not make them.
RUN mkdir -p /usr/src/app/tml /root/.config /root/tmp /data && chmod 1777 /root /root/tmp
WORKDIR /usr/src/app
CMD ["bash"]

# What dev adds is copied alone, so that dev shares the large layer with runtime.
FROM deps AS dev-deps
ARG VARIANT=cpu
COPY requirements/export.txt requirements/dev.txt /build/
RUN touch /before \
 && if [ -f /build/pip.conf ]; then export PIP_CONFIG_FILE=/build/pip.conf; \
    elif [ -d /build/wheels ]; then export PIP_FIND_LINKS=/build/wheels; fi \
 && if [ -f /build/cert.pem ]; then export PIP_CERT=/build/cert.pem; fi \
 && PIP_NO_CACHE_DIR=1 bash /build/install.sh /opt/venv/bin/python "${VARIANT}" dev \
 && mkdir /added && find /opt/venv -cnewer /before ! -type d -print0 | tar --null -T - -cf - -P | tar -xf - -C /added

FROM runtime AS dev
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends git procps >/dev/null \
 && rm -rf /var/lib/apt/lists/*
# The user of the dev container (.devcontainer/), whose ids become the caller's there. HOME is as in a run. git may
# read a checkout of somebody else's, and a login shell, which editors start, sets a PATH of its own.
RUN useradd --uid 1000 --home-dir /root --no-create-home --shell /bin/bash dev \
 && git config --system --add safe.directory /usr/src/app/tml \
 && echo 'case ":$PATH:" in *:/opt/venv/bin:*) ;; *) PATH=/opt/venv/bin:$PATH ;; esac' >/etc/profile.d/venv.sh
COPY --from=dev-deps /added/opt/venv /opt/venv
