//! Sets up the log of a program: text for people, JSON for collectors, always on stderr.
//!
//! stderr, because stdout belongs to what a program was asked to print (`generate --json` prints one JSON
//! object there and nothing else).

use std::fmt;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// One line per event for people, coloured where stderr is a terminal.
    #[default]
    Text,
    /// One JSON object per event.
    Json,
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl FromStr for LogFormat {
    type Err = LogError;

    fn from_str(text: &str) -> Result<Self, LogError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(LogError::Format { found: other.to_owned() }),
        }
    }
}

/// What the log shows and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOptions {
    /// Text or JSON lines.
    pub format: LogFormat,
    /// A level (`info`) or `tracing` directives (`info,trustformers_engine=debug`).
    pub filter: String,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned() }
    }
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The format has no such name.
    #[error("log format {found:?} is not known: use text or json")]
    Format {
        /// What was given.
        found: String,
    },
    /// The filter could not be read.
    #[error(
        "log filter {found:?} cannot be read ({cause}): use a level (error, warn, info, debug, trace) or \
         directives such as info,trustformers_engine=debug"
    )]
    Filter {
        /// What was given.
        found: String,
        /// What the parser said.
        cause: String,
    },
    /// A log was set up before in this process.
    #[error("the log of this process is set up already: call logs::init once, at the start of main")]
    AlreadySet,
}

/// Sends the events of this process to stderr from now on.
///
/// # Errors
/// [`LogError::Filter`] for a filter that cannot be read, [`LogError::AlreadySet`] when called twice.
pub fn init(options: &LogOptions) -> Result<(), LogError> {
    let filter = parse_filter(&options.filter)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let outcome = match options.format {
        LogFormat::Text => {
            let coloured = std::io::IsTerminal::is_terminal(&std::io::stderr());
            builder.with_ansi(coloured).with_target(false).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
    };
    outcome.map_err(|_| LogError::AlreadySet)?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(())
}

/// A panic as an event, so that every line of a log has the log's format. The message of a panic may quote a
/// text that is being handled, such as a prompt, so it is cut at its first quote; the location says the rest.
fn log_panic(panic: &std::panic::PanicHookInfo<'_>) {
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let message = panic.payload_as_str().unwrap_or("a panic without a text");
    tracing::error!(location, cause = unquoted(message), "panicked");
}

fn unquoted(message: &str) -> &str {
    message.split(['`', '"']).next().unwrap_or_default()
}

fn parse_filter(text: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder()
        .parse(text)
        .map_err(|error| LogError::Filter { found: text.to_owned(), cause: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_read_by_name_and_written_back() {
        for format in [LogFormat::Text, LogFormat::Json] {
            assert_eq!(format.to_string().parse::<LogFormat>().unwrap(), format);
        }
        let error = "yaml".parse::<LogFormat>().unwrap_err();
        assert!(error.to_string().contains("yaml") && error.to_string().contains("json"), "{error}");
    }

    #[test]
    fn a_filter_is_a_level_or_directives() {
        assert!(parse_filter("debug").is_ok());
        assert!(parse_filter("info,trustformers_engine=debug").is_ok());
        let error = parse_filter("info,x=loudest").unwrap_err();
        assert!(error.to_string().contains("loudest"), "{error}");
    }

    #[test]
    fn a_panics_message_is_cut_at_its_first_quote() {
        let text = "byte index 1 is not a char boundary; it is inside 'é' (bytes 0..2) of `été, a prompt`";
        assert_eq!(unquoted(text), "byte index 1 is not a char boundary; it is inside 'é' (bytes 0..2) of ");
        assert_eq!(unquoted("index out of bounds: the len is 3"), "index out of bounds: the len is 3");
    }

    #[test]
    fn the_second_set_up_is_refused() {
        let options = LogOptions { format: LogFormat::Json, filter: "error".to_owned() };
        let _first = init(&options);
        assert!(matches!(init(&options), Err(LogError::AlreadySet)));
    }
}
