# Images of the programs, for users of a container engine (`make images` packs the same content without one):
#   docker build -t trustformers-serve:latest .                 one process, which serves the models of a folder:
#                                                               docker run -p 8080:8080 -v $PWD/models:/models:ro trustformers-serve:latest
#   docker build --target operator -t trustformers-operator .   and gateway, runtime
# The final images hold the files of e2e/images/root.py (glibc, certificates) and one program; there is no shell in them.

FROM rust:1.95-bookworm AS build
WORKDIR /source
COPY . .
RUN cargo build --locked --profile ci \
      -p trustformers-operator --bin trustformers-operator -p trustformers-gateway --bin trustformers-gateway \
      -p trustformers-runtime --bin trustformers-runtime -p trustformers-serve --bin trustformers-serve \
 && mkdir /programs \
 && for name in operator gateway runtime serve; do \
      strip -s -o /programs/trustformers-$name target/ci/trustformers-$name; done
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 ca-certificates \
 && python3 e2e/images/root.py /root-of-images

FROM scratch AS base
COPY --from=build /root-of-images/ /
ENV PATH=/usr/local/bin:/usr/bin:/bin
USER 65532:65532

FROM base AS operator
COPY --from=build /programs/trustformers-operator /usr/bin/
EXPOSE 8080 9091
ENTRYPOINT ["/usr/bin/trustformers-operator"]

FROM base AS gateway
COPY --from=build /programs/trustformers-gateway /usr/bin/
EXPOSE 8080 9090
ENTRYPOINT ["/usr/bin/trustformers-gateway"]

FROM base AS runtime
COPY --from=build /programs/trustformers-runtime /usr/bin/
EXPOSE 8080 9090
ENTRYPOINT ["/usr/bin/trustformers-runtime"]

# The last stage is what `docker build .` gives. With /models/config.yaml it serves what that file says, where paths
# count from /models; without one, every model in /models. An empty /models ends with an error that says so. Files of
# the volume must be readable by the user 65532. Another configuration, and no folder:
#   docker run -p 8080:8080 -v $PWD/models:/models:ro -v $PWD/config.yaml:/etc/trustformers/config.yaml:ro \
#     trustformers-serve --config /etc/trustformers/config.yaml
FROM base AS serve
COPY --from=build /programs/trustformers-serve /usr/bin/
EXPOSE 8080 9090
WORKDIR /models
ENTRYPOINT ["/usr/bin/trustformers-serve"]
CMD ["--models", "/models"]
