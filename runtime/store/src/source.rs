//! Where a model lies: a path, or a `file://` URI.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::StoreError;

/// The kinds of source that can be read, for messages and help texts.
pub const SUPPORTED: &str = "a path, file://";

/// A place on this machine where a model lies: a file, or a folder that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    path: PathBuf,
}

impl Source {
    /// A path, taken as it is.
    pub fn from_path(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl FromStr for Source {
    type Err = StoreError;

    /// Reads a path or a `file://` URI. A text with `://` in it is a URI; a path with those three letters in
    /// it can be written as one.
    fn from_str(text: &str) -> Result<Self, StoreError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            if text.is_empty() {
                return Err(StoreError::InvalidUri { text: String::new(), why: "it is empty" });
            }
            return Ok(Self::from_path(text));
        };
        if !scheme.eq_ignore_ascii_case("file") {
            return Err(StoreError::UnsupportedScheme { scheme: scheme.to_owned(), text: text.to_owned() });
        }
        let invalid = |why| StoreError::InvalidUri { text: text.to_owned(), why };
        let path = rest.strip_prefix("localhost").filter(|path| path.starts_with('/')).unwrap_or(rest);
        if !path.starts_with('/') {
            return Err(invalid("its path does not begin with a slash"));
        }
        let path =
            percent_decoded(path).ok_or_else(|| invalid("a % is not followed by two hex digits of UTF-8"))?;
        Ok(Self::from_path(path))
    }
}

/// The text that a percent-encoded path stands for; none where a `%` is not followed by two hex digits, or
/// the bytes are not UTF-8.
fn percent_decoded(text: &str) -> Option<String> {
    let decoded = percent_encoding::percent_decode_str(text);
    // The library leaves an incomplete escape as it is; a path with a bare `%` is more likely a mistake.
    let complete = text
        .split('%')
        .skip(1)
        .all(|rest| rest.len() >= 2 && rest.bytes().take(2).all(|digit| digit.is_ascii_hexdigit()));
    decoded.decode_utf8().ok().filter(|_| complete).map(Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_file_uris_name_a_place() {
        for (text, path) in [
            ("/models/a.gguf", "/models/a.gguf"),
            ("models/a b", "models/a b"),
            ("file:///models/a.gguf", "/models/a.gguf"),
            ("file://localhost/m", "/m"),
            ("FILE:///m/a%20b%C3%A9", "/m/a b\u{e9}"),
        ] {
            assert_eq!(text.parse::<Source>().unwrap().path(), Path::new(path), "{text}");
        }
    }

    #[test]
    fn other_schemes_are_refused_by_name_with_what_works() {
        for scheme in ["hf", "s3", "oci", "https"] {
            let error = format!("{scheme}://x/y").parse::<Source>().unwrap_err();
            assert!(matches!(&error, StoreError::UnsupportedScheme { scheme: found, .. } if found == scheme));
            let text = error.to_string();
            assert!(text.contains(&format!("{scheme}://")) && text.contains(SUPPORTED), "{text}");
        }
    }

    #[test]
    fn file_uris_that_name_no_absolute_path_are_refused() {
        for text in ["file://models/a", "file://", "file:///a%2", "file:///a%zz", "file:///a%ff", ""] {
            assert!(matches!(text.parse::<Source>(), Err(StoreError::InvalidUri { .. })), "{text}");
        }
    }
}
