# No syntax line: the cache mounts are in every BuildKit's own front end, so nothing is fetched to read this file.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY .cargo/config.toml .cargo/config.toml
COPY benches/instructions benches/instructions
COPY migrations migrations
COPY src src
# The target dir outlives the sources, and cargo compares times: a file restored with an old one would count as built.
# The binary is copied out because a cache mount is not part of the layer.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    find src migrations -type f -exec touch {} + \
    && cargo build --release --locked --bin forebay \
    && cp target/release/forebay /usr/local/bin/forebay

FROM debian:bookworm-slim
# From the build stage rather than from apt, so that only the crates come over the network.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /usr/local/bin/forebay /usr/local/bin/forebay
# A named volume takes its owner from this directory when it is first mounted; without it, the spool would be root's.
RUN install -d -o 10001 -g 10001 -m 0750 /data
USER 10001:10001
VOLUME /data
# Inside a container, loopback reaches nobody; what is published, and where, is for whoever starts it to say.
ENV FOREBAY_DATA_DIR=/data \
    FOREBAY_LISTEN=0.0.0.0:8080 \
    FOREBAY_CONSOLE_LISTEN=0.0.0.0:8081
EXPOSE 8080 8081
HEALTHCHECK --interval=5s --timeout=4s --start-period=30s --retries=3 CMD ["forebay", "status", "--check"]
ENTRYPOINT ["forebay"]
CMD ["serve"]
