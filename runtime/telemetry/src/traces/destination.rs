//! Where spans are sent: an OTLP collector, or Zipkin; and what the endpoints of older Jaegers mean.

use std::fmt;
use std::str::FromStr;

use http::Uri;

use super::TraceError;

/// The port of OTLP over gRPC.
const OTLP_GRPC_PORT: u16 = 4317;
/// The port of OTLP over HTTP.
const OTLP_HTTP_PORT: u16 = 4318;
/// The path of OTLP over HTTP.
const OTLP_PATH: &str = "/v1/traces";
/// The ports of Jaeger's own protocols, which it no longer needs: over HTTP, gRPC and UDP.
const JAEGER_PORTS: [u16; 4] = [14268, 14250, 6831, 6832];
/// The path of Zipkin's second version.
const ZIPKIN_PATH: &str = "/api/v2/spans";

/// A collector of spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// OTLP over gRPC, at this address.
    OtlpGrpc(String),
    /// OTLP over HTTP, to this URL.
    OtlpHttp(String),
    /// Zipkin's JSON, to this URL.
    Zipkin(String),
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtlpGrpc(url) => write!(f, "{url} (OTLP over gRPC)"),
            Self::OtlpHttp(url) => write!(f, "{url} (OTLP over HTTP)"),
            Self::Zipkin(url) => write!(f, "{url} (Zipkin)"),
        }
    }
}

impl FromStr for Destination {
    type Err = TraceError;

    /// As [`Destination::otlp`].
    fn from_str(endpoint: &str) -> Result<Self, TraceError> {
        Self::otlp(endpoint)
    }
}

impl Destination {
    /// An OTLP endpoint. Port 4318 or a path means HTTP, anything else gRPC; 4317 is the port where there is
    /// none.
    ///
    /// # Errors
    /// [`TraceError::Endpoint`].
    pub fn otlp(endpoint: &str) -> Result<Self, TraceError> {
        let Parts { host, port, path } = parts(endpoint)?;
        let port = port.unwrap_or(OTLP_GRPC_PORT);
        Ok(match (port, path.as_str()) {
            (OTLP_HTTP_PORT, "") => Self::OtlpHttp(format!("http://{host}:{port}{OTLP_PATH}")),
            (_, "") => Self::OtlpGrpc(format!("http://{host}:{port}")),
            (_, path) => Self::OtlpHttp(format!("http://{host}:{port}{path}")),
        })
    }

    /// An endpoint of Jaeger. Jaeger takes OTLP, so the ports of its older protocols become that of OTLP on
    /// the same host.
    ///
    /// # Errors
    /// [`TraceError::Endpoint`].
    pub fn jaeger(endpoint: &str) -> Result<Self, TraceError> {
        let Parts { host, port, .. } = parts(endpoint)?;
        match port {
            Some(port) if JAEGER_PORTS.contains(&port) => {
                Ok(Self::OtlpGrpc(format!("http://{host}:{OTLP_GRPC_PORT}")))
            }
            _ => Self::otlp(endpoint),
        }
    }

    /// An endpoint of Zipkin; without a path, that of its API.
    ///
    /// # Errors
    /// [`TraceError::Endpoint`].
    pub fn zipkin(endpoint: &str) -> Result<Self, TraceError> {
        let Parts { host, port, path } = parts(endpoint)?;
        let path = if path.is_empty() { ZIPKIN_PATH } else { &path };
        Ok(Self::Zipkin(format!("http://{host}:{}{path}", port.unwrap_or(9411))))
    }
}

/// What an endpoint consists of.
struct Parts {
    host: String,
    port: Option<u16>,
    /// Without a slash at its end.
    path: String,
}

fn parts(endpoint: &str) -> Result<Parts, TraceError> {
    let wrong = |why: &'static str| TraceError::Endpoint { found: endpoint.to_owned(), why };
    let with_scheme =
        if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
    let uri: Uri = with_scheme.parse().map_err(|_| wrong("is no URL; give http://host:port"))?;
    if uri.scheme_str() != Some("http") {
        return Err(wrong("needs http://: spans are sent in plain text, to a collector in the same network"));
    }
    let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| wrong("names no host"))?;
    let path = uri.path().trim_end_matches('/').to_owned();
    Ok(Parts { host: host.to_owned(), port: uri.port_u16(), path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_of_every_kind_lead_to_their_protocol() {
        type Parse = fn(&str) -> Result<Destination, TraceError>;
        let (otlp, jaeger, zipkin): (Parse, Parse, Parse) =
            (Destination::otlp, Destination::jaeger, Destination::zipkin);
        let cases = [
            (otlp, "http://collector:4317", "http://collector:4317 (OTLP over gRPC)"),
            (otlp, "collector", "http://collector:4317 (OTLP over gRPC)"),
            (otlp, "http://[::1]:4318/", "http://[::1]:4318/v1/traces (OTLP over HTTP)"),
            (otlp, "http://c:80/otlp/v1/traces", "http://c:80/otlp/v1/traces (OTLP over HTTP)"),
            (jaeger, "http://localhost:14268/api/traces", "http://localhost:4317 (OTLP over gRPC)"),
            (jaeger, "localhost:6831", "http://localhost:4317 (OTLP over gRPC)"),
            (jaeger, "http://jaeger:4318", "http://jaeger:4318/v1/traces (OTLP over HTTP)"),
            (zipkin, "http://zipkin:9411", "http://zipkin:9411/api/v2/spans (Zipkin)"),
            (zipkin, "zipkin/custom", "http://zipkin:9411/custom (Zipkin)"),
        ];
        for (parse, endpoint, wanted) in cases {
            assert_eq!(parse(endpoint).unwrap().to_string(), wanted, "{endpoint}");
        }
        for endpoint in ["https://collector:4317", "http://", "a b", "unix:///socket"] {
            let error = Destination::otlp(endpoint).unwrap_err().to_string();
            assert!(error.contains(endpoint), "{error}");
        }
    }
}
