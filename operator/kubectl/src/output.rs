//! Standard output: whole texts, and a screen that is drawn again.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::args::Format;
use crate::cluster::CommandError;

/// Moves the cursor to the upper left corner and clears what is below.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

/// Writes a text. A closed pipe is success: its reader has what it wants.
///
/// # Errors
/// When standard output cannot be written.
pub fn write(text: &str) -> Result<(), CommandError> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(CommandError::Output),
    }
}

/// Writes a value in the format that was asked for.
///
/// # Errors
/// When standard output cannot be written.
pub fn print<T: Serialize>(
    format: Format,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<(), CommandError> {
    match format {
        Format::Text => write(&text(value)),
        Format::Json => write(&format!("{}\n", serde_json::to_string_pretty(value)?)),
    }
}

/// A state that is shown again whenever it changes: on a terminal at the same place, else below.
#[derive(Debug, Default)]
pub struct Screen {
    shown: String,
}

impl Screen {
    /// Shows a text if it differs from the last one.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn show(&mut self, text: &str) -> Result<(), CommandError> {
        if self.shown == text {
            return Ok(());
        }
        text.clone_into(&mut self.shown);
        let before = if io::stdout().is_terminal() { CLEAR } else { "" };
        write(&format!("{before}{text}"))
    }
}
