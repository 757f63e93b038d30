//! The flags of the gateway's program.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use trustformers_api::MAX_BODY_BYTES;
use trustformers_telemetry::logs::LogFormat;
use trustformers_telemetry::traces::TraceFlags;

use crate::ab_test::SplitSkew;
use crate::headers::TrustedHeaders;
use crate::limits::MAX_BODY_LIMIT_BYTES;

/// The gateway of a trustformers platform: it receives HTTP and gRPC requests for models and forwards them to
/// pods by the operator's routing table.
#[derive(Debug, Clone, Parser)]
#[command(name = "trustformers-gateway", version)]
pub struct Settings {
    /// Where the operator publishes routing tables, as http://HOST:PORT.
    #[arg(long, value_name = "URL", value_parser = parse_feed)]
    pub feed: http::Uri,

    /// File with the token that the operator requires. It is read at each connect. Without this flag no token
    /// is sent.
    #[arg(long, value_name = "FILE")]
    pub feed_token_file: Option<PathBuf>,

    /// Folder for the last valid routing table, from which a restarted gateway serves while the operator is
    /// away.
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,

    /// Address for HTTP (HTTP/1.1, and HTTP/2 without TLS), including health and metrics.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:8080")]
    pub http_address: SocketAddr,

    /// Address for gRPC.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:9090")]
    pub grpc_address: SocketAddr,

    /// Name of this gateway in its reports to the operator: in a cluster the UID of its pod. The default is
    /// random.
    #[arg(long, value_name = "UID")]
    pub instance: Option<String>,

    /// Longest drain after SIGTERM (500ms, 30s, 5m). Requests that have not ended by then are cut. New ones
    /// are accepted until none has come for five seconds, and for half of this time at most.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    pub drain_timeout: Duration,

    /// Longest body of a request in bytes, at most 67108864; a longer body is answered with 413.
    #[arg(long, value_name = "BYTES", default_value_t = MAX_BODY_BYTES, value_parser = parse_body_limit)]
    pub body_limit_bytes: usize,

    /// Header in which a proxy in front of this gateway names a request's tenant. The proxy must remove it
    /// from what its callers send. Without this flag no header is trusted.
    #[arg(long, value_name = "NAME")]
    pub tenant_header: Option<http::HeaderName>,

    /// The same for the priority class: high, normal or low.
    #[arg(long, value_name = "NAME")]
    pub priority_header: Option<http::HeaderName>,

    /// A fault for tests of the platform, such as split-skew=0.1: a tenth of the users of a test's first
    /// variant get the second one.
    #[arg(long, value_name = "FAULT", value_parser = SplitSkew::parse, hide = true)]
    pub fault: Option<SplitSkew>,

    /// What is traced.
    #[command(flatten)]
    pub traces: TraceFlags,

    /// Format of log lines: text or json.
    #[arg(long, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// Log level (error, warn, info, debug, trace) or directives such as info,trustformers_gateway=debug. At
    /// debug there is a line for every request.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_filter: String,
}

impl Settings {
    /// The headers in which a proxy says who a caller is.
    pub(crate) fn trusted_headers(&self) -> TrustedHeaders {
        TrustedHeaders { tenant: self.tenant_header.clone(), priority: self.priority_header.clone() }
    }
}

fn parse_feed(text: &str) -> Result<http::Uri, String> {
    let uri: http::Uri = text.parse().map_err(|error| format!("{error}; expected http://HOST:PORT"))?;
    match (uri.scheme_str(), uri.authority(), uri.path()) {
        (Some("http"), Some(_), "" | "/") => Ok(uri),
        _ => Err("expected http://HOST:PORT".to_owned()),
    }
}

fn parse_body_limit(text: &str) -> Result<usize, String> {
    // More would never fit into the bytes that one caller can have.
    let limit: Option<usize> = text.parse().ok().filter(|limit| (1..=MAX_BODY_LIMIT_BYTES).contains(limit));
    limit.ok_or_else(|| format!("expected a number of bytes from 1 to {MAX_BODY_LIMIT_BYTES}"))
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let split = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| expected_time())?;
    let milliseconds = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1_000),
        "m" => number.checked_mul(60_000),
        _ => None,
    };
    milliseconds.map(Duration::from_millis).ok_or_else(expected_time)
}

fn expected_time() -> String {
    "expected a whole number and a unit: 500ms, 30s or 5m".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(arguments: &[&str]) -> Result<Settings, clap::Error> {
        let always = ["trustformers-gateway", "--state-dir", "/state"];
        Settings::try_parse_from(always.iter().chain(arguments))
    }

    #[test]
    fn the_defaults_are_as_documented() {
        Settings::command().debug_assert();
        let settings = parse(&["--feed", "http://operator:9091"]).unwrap();
        assert_eq!(settings.http_address, "[::]:8080".parse().unwrap());
        assert_eq!(settings.grpc_address, "[::]:9090".parse().unwrap());
        assert_eq!(settings.drain_timeout, Duration::from_secs(60));
        assert_eq!(settings.body_limit_bytes, 4 << 20);
        assert_eq!((settings.instance, settings.fault), (None, None));
    }

    #[test]
    fn a_body_limit_fits_into_the_share_of_one_caller() {
        assert_eq!(MAX_BODY_LIMIT_BYTES, 67_108_864);
        assert_eq!(parse_body_limit("67108864"), Ok(MAX_BODY_LIMIT_BYTES));
        for text in ["0", "67108865", "-1", "4MiB"] {
            assert!(parse_body_limit(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_have_units() {
        for (text, milliseconds) in [("500ms", 500), ("30s", 30_000), ("5m", 300_000)] {
            assert_eq!(parse_time(text), Ok(Duration::from_millis(milliseconds)));
        }
        for text in ["", "5", "s", "1h", "-1s", "1.5s", "18446744073709551615m"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_feed_is_an_http_address() {
        for text in ["operator:9091", "https://operator:9091", "http://", "http://operator/x", ""] {
            let error = parse(&["--feed", text]).unwrap_err().to_string();
            assert!(error.contains("--feed") && error.contains("http://HOST:PORT"), "{error}");
        }
    }
}
