//! Files that often lie where a model's file should be: a pointer of Git LFS, a web page, a server's error.

use serde_json::Value;
use thiserror::Error;

/// How every pointer of Git LFS begins.
const LFS_START: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Bytes at the beginning of a file that decide what it is.
const START_BYTES: usize = 4096;

/// Longest message of a server in a refusal, in characters.
const MAX_MESSAGE_CHARS: usize = 200;

/// Something that was saved in place of a model's file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ForeignFile {
    /// Nothing.
    #[error("an empty file; download it again")]
    Empty,
    /// The text that Git keeps in place of a large file.
    #[error(
        "a Git LFS pointer, which stands for a file that was not fetched; run \"git lfs pull\", or download the file \
         itself"
    )]
    LfsPointer,
    /// HTML or XML.
    #[error(
        "a web page (HTML or XML); download the file itself, with an access token where the model is private or gated"
    )]
    WebPage,
    /// JSON that a server sends instead of a file.
    #[error(
        "a server's error in JSON ({message:?}); download the file again, with an access token where needed"
    )]
    ServerError {
        /// The server's message.
        message: String,
    },
    /// Other JSON.
    #[error("JSON text; give the file of the weights itself")]
    Json,
    /// A gzip, zip, tar, xz, bzip2 or zstd archive.
    #[error(
        "an archive ({kind}); unpack it first. A PyTorch checkpoint is a zip archive and must be converted"
    )]
    Archive {
        /// Its format.
        kind: &'static str,
    },
}

impl ForeignFile {
    /// What a file is that should be binary; `None` where it is none of these.
    pub(crate) fn of(file: &[u8]) -> Option<Self> {
        if file.is_empty() {
            return Some(Self::Empty);
        }
        if let Some((kind, _)) = ARCHIVES.iter().find(|(_, start)| file.starts_with(start)) {
            return Some(Self::Archive { kind });
        }
        Self::of_text(file).or_else(|| {
            let text = start(file);
            let is_json =
                text.starts_with(b"{") && text.get(1).is_some_and(|byte| b"\"\n\r\t }".contains(byte));
            is_json.then_some(Self::Json)
        })
    }

    /// What a file is that should be JSON.
    pub(crate) fn of_text(file: &[u8]) -> Option<Self> {
        let text = start(file);
        if text.starts_with(LFS_START) {
            return Some(Self::LfsPointer);
        }
        let lower: Vec<u8> = text.iter().take(16).map(u8::to_ascii_lowercase).collect();
        if ["<!doctype", "<html", "<?xml", "<head", "<body"]
            .iter()
            .any(|tag| lower.starts_with(tag.as_bytes()))
        {
            return Some(Self::WebPage);
        }
        let file =
            if file.len() <= START_BYTES { file } else { return file.is_empty().then_some(Self::Empty) };
        if file.iter().all(u8::is_ascii_whitespace) {
            return Some(Self::Empty);
        }
        server_error(&serde_json::from_slice(file).ok()?)
    }
}

const ARCHIVES: [(&str, &[u8]); 5] = [
    ("gzip", &[0x1f, 0x8b]),
    ("zip", b"PK\x03\x04"),
    ("xz", &[0xfd, b'7', b'z', b'X', b'Z']),
    ("bzip2", b"BZh"),
    ("zstd", &[0x28, 0xb5, 0x2f, 0xfd]),
];

/// The beginning of a text without a byte order mark and white space.
fn start(file: &[u8]) -> &[u8] {
    let text = &file[..file.len().min(START_BYTES)];
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text).trim_ascii_start()
}

/// A small object whose `error`, `detail` or `message` is a text, or holds one under `message`.
fn server_error(value: &Value) -> Option<ForeignFile> {
    let object = value.as_object()?;
    let found = ["error", "detail", "message"].iter().find_map(|key| object.get(*key))?;
    let message = found.as_str().or_else(|| found.get("message")?.as_str())?;
    Some(ForeignFile::ServerError { message: message.chars().take(MAX_MESSAGE_CHARS).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_files_are_named() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 98362432\n";
        assert_eq!(ForeignFile::of(pointer), Some(ForeignFile::LfsPointer));
        for page in ["<!DOCTYPE html><html>", "\u{feff} <HTML lang=x>", "<?xml version='1.0'?><Error>"] {
            assert_eq!(ForeignFile::of(page.as_bytes()), Some(ForeignFile::WebPage), "{page}");
        }
        let error = |message: &str| Some(ForeignFile::ServerError { message: message.to_owned() });
        assert_eq!(ForeignFile::of(br#"{"error": "Repository not found"}"#), error("Repository not found"));
        assert_eq!(ForeignFile::of(br#"{"error": {"message": "no", "code": 401}}"#), error("no"));
        assert_eq!(ForeignFile::of_text(br#" {"detail": "Unauthorized"}"#), error("Unauthorized"));
        assert_eq!(ForeignFile::of(b"{\"model_type\": \"bert\"}"), Some(ForeignFile::Json));
        assert_eq!(ForeignFile::of(b""), Some(ForeignFile::Empty));
        assert_eq!(ForeignFile::of_text(b" \n"), Some(ForeignFile::Empty));
        assert_eq!(ForeignFile::of(&[0x1f, 0x8b, 8]), Some(ForeignFile::Archive { kind: "gzip" }));
    }

    #[test]
    fn models_are_not_foreign() {
        assert_eq!(ForeignFile::of(b"GGUF\x03\0\0\0"), None);
        // The length of a safetensors header, then the header.
        assert_eq!(ForeignFile::of(b"\x02\0\0\0\0\0\0\0{}"), None);
        assert_eq!(ForeignFile::of_text(b"{\"model_type\": \"bert\"}"), None);
    }
}
