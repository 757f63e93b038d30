//! What the command line says.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use trustformers_api::MAX_BODY_BYTES;
use trustformers_telemetry::logs::LogFormat;

/// The front door of a trustformers platform: takes HTTP and gRPC requests for models and passes them to pods, as
/// the operator's routing table says.
#[derive(Debug, Clone, Parser)]
#[command(name = "trustformers-gateway", version)]
pub struct Settings {
    /// Where the operator publishes routing tables, as http://HOST:PORT.
    #[arg(long, value_name = "URL", value_parser = parse_feed)]
    pub feed: http::Uri,

    /// File with the token that the operator asks for; read anew at each connect. Without it none is sent.
    #[arg(long, value_name = "FILE")]
    pub feed_token_file: Option<PathBuf>,

    /// Folder for the last good routing table, from which a restarted gateway serves while the operator is away.
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,

    /// Where to take HTTP (HTTP/1.1, and HTTP/2 without TLS), health and metrics included.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:8080")]
    pub http_address: SocketAddr,

    /// Where to take gRPC.
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:9090")]
    pub grpc_address: SocketAddr,

    /// Name of this gateway in its reports to the operator: in a cluster the UID of its pod. A random one if left out.
    #[arg(long, value_name = "UID")]
    pub instance: Option<String>,

    /// After SIGTERM, requests that have not ended by then are cut; new ones are taken until none has come for five
    /// seconds, and for half of this time at most (500ms, 30s, 5m).
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_time)]
    pub drain_timeout: Duration,

    /// Longest body of a request, in bytes; a longer one is answered 413.
    #[arg(long, value_name = "BYTES", default_value_t = MAX_BODY_BYTES)]
    pub body_limit_bytes: usize,

    /// How log lines are written: text or json.
    #[arg(long, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What is logged: a level (error, warn, info, debug, trace) or directives such as info,trustformers_gateway=debug.
    /// At debug there is a line for every request.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_filter: String,
}

fn parse_feed(text: &str) -> Result<http::Uri, String> {
    let uri: http::Uri = text.parse().map_err(|error| format!("{error}; expected http://HOST:PORT"))?;
    match (uri.scheme_str(), uri.authority(), uri.path()) {
        (Some("http"), Some(_), "" | "/") => Ok(uri),
        _ => Err("expected http://HOST:PORT".to_owned()),
    }
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
    fn the_defaults_are_the_ports_of_the_platform() {
        Settings::command().debug_assert();
        let settings = parse(&["--feed", "http://operator:9091"]).unwrap();
        assert_eq!(settings.http_address, "[::]:8080".parse().unwrap());
        assert_eq!(settings.grpc_address, "[::]:9090".parse().unwrap());
        assert_eq!(settings.drain_timeout, Duration::from_secs(60));
        assert_eq!(settings.body_limit_bytes, 4 << 20);
        assert_eq!(settings.instance, None);
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
    fn a_feed_is_an_http_address() {
        for text in ["operator:9091", "https://operator:9091", "http://", "http://operator/x", ""] {
            let error = parse(&["--feed", text]).unwrap_err().to_string();
            assert!(error.contains("--feed") && error.contains("http://HOST:PORT"), "{error}");
        }
    }
}
