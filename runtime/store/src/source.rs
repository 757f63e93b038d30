//! Where a model lies: a path of this machine, or an address in one of the schemes that can be fetched.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::StoreError;

/// The kinds of source that can be read, for messages and help texts.
pub const SUPPORTED: &str = "a path, file://, hf://, s3://, gs://, az://, https://, oci://";

/// Where a model lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    location: Location,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Location {
    Path(PathBuf),
    Remote(RemoteSource),
}

/// A model that must be fetched before it can be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteSource {
    pub(crate) scheme: Scheme,
    /// What follows `scheme://`, as written; for a web address without the revision that others have.
    pub(crate) address: String,
    pub(crate) revision: Option<String>,
}

/// How a remote source is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// `hf://org/name[/path]`: a repository of Hugging Face or of a server with the same API.
    HuggingFace,
    /// `s3://bucket/key`: Amazon S3 or a server with the same API.
    S3,
    /// `gs://bucket/key`: Google Cloud Storage.
    GoogleStorage,
    /// `az://container/key`: Azure Blob Storage.
    AzureBlob,
    /// `https://host/path`: one file.
    Https,
    /// `http://host/path`: one file, unprotected on its way, so that it needs a pin.
    Http,
    /// `oci://registry/repository:tag`: an artifact of a registry.
    Registry,
}

/// Each scheme with its word and the form of its sources.
const SCHEMES: &[SchemeForm] = &[
    SchemeForm { scheme: Scheme::HuggingFace, word: "hf", form: "hf://org/name" },
    SchemeForm { scheme: Scheme::S3, word: "s3", form: "s3://bucket/key" },
    SchemeForm { scheme: Scheme::GoogleStorage, word: "gs", form: "gs://bucket/key" },
    SchemeForm { scheme: Scheme::AzureBlob, word: "az", form: "az://container/key" },
    SchemeForm { scheme: Scheme::Https, word: "https", form: "https://host/path/model.gguf" },
    SchemeForm { scheme: Scheme::Http, word: "http", form: "http://host/path/model.gguf" },
    SchemeForm { scheme: Scheme::Registry, word: "oci", form: "oci://registry/repository:tag" },
];

struct SchemeForm {
    scheme: Scheme,
    word: &'static str,
    form: &'static str,
}

impl Source {
    /// A path, taken as it is.
    pub fn from_path(path: impl Into<PathBuf>) -> Self {
        Self { location: Location::Path(path.into()) }
    }

    /// The path, unless the model must be fetched.
    pub fn path(&self) -> Option<&Path> {
        match &self.location {
            Location::Path(path) => Some(path),
            Location::Remote(_) => None,
        }
    }

    /// What must be fetched, unless the model lies on this machine.
    pub fn remote(&self) -> Option<&RemoteSource> {
        match &self.location {
            Location::Path(_) => None,
            Location::Remote(remote) => Some(remote),
        }
    }

    /// A name for the model, by the last word of where it lies: `name` of `hf://org/name` and of
    /// `/a/name.gguf`.
    pub fn suggested_name(&self) -> Option<String> {
        let last = match &self.location {
            Location::Path(path) => return path.file_stem().map(|stem| stem.to_string_lossy().into_owned()),
            Location::Remote(remote) => {
                let address = remote.address.split(['?', '@']).next()?;
                let last = address.trim_end_matches('/').rsplit('/').next()?;
                if remote.scheme == Scheme::Registry { last.split(':').next()? } else { last }
            }
        };
        let stem = [".gguf", ".safetensors"].iter().find_map(|end| last.strip_suffix(end));
        Some(stem.unwrap_or(last).to_owned())
    }

    /// The same source at a branch, tag or commit.
    ///
    /// # Errors
    /// [`StoreError::RevisionNotSupported`] for a source that has none, [`StoreError::InvalidUri`] for one
    /// that names another revision already.
    pub fn with_revision(mut self, revision: Option<&str>) -> Result<Self, StoreError> {
        let Some(revision) = revision.filter(|revision| !revision.is_empty()) else { return Ok(self) };
        let text = self.to_string();
        match &mut self.location {
            Location::Remote(remote) if remote.scheme == Scheme::HuggingFace => {
                if remote.revision.as_deref().is_some_and(|stated| stated != revision) {
                    let why = "it names a revision, and \"revision\" names another";
                    return Err(StoreError::InvalidUri { text, why, form: "one of them" });
                }
                remote.revision = Some(revision.to_owned());
                Ok(self)
            }
            Location::Path(_) | Location::Remote(_) => Err(StoreError::RevisionNotSupported { text }),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Location::Path(path) => path.display().fmt(f),
            Location::Remote(remote) => remote.fmt(f),
        }
    }
}

impl fmt::Display for RemoteSource {
    /// Without the query of a web address: signed addresses hold a secret there.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = self.address.split_once('?').map_or(self.address.as_str(), |(address, _)| address);
        write!(f, "{}://{address}", self.scheme.form().word)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

impl Scheme {
    fn form(self) -> &'static SchemeForm {
        // Every scheme stands in the table, which a test checks; the first is never taken by accident.
        SCHEMES.iter().find(|form| form.scheme == self).unwrap_or(&SCHEMES[0])
    }

    /// How a source of this scheme is written.
    pub fn example(self) -> &'static str {
        self.form().form
    }
}

impl FromStr for Source {
    type Err = StoreError;

    /// Reads a path or a URI. A text with `://` in it is a URI; a path with those three letters in it can be
    /// written as `file://`.
    fn from_str(text: &str) -> Result<Self, StoreError> {
        let form = "file:///absolute/path";
        let Some((word, rest)) = text.split_once("://") else {
            if text.is_empty() {
                return Err(StoreError::InvalidUri { text: String::new(), why: "it is empty", form });
            }
            return Ok(Self::from_path(text));
        };
        if let Some(form) = SCHEMES.iter().find(|form| word.eq_ignore_ascii_case(form.word)) {
            return Ok(Self { location: Location::Remote(remote(form, rest)?) });
        }
        if !word.eq_ignore_ascii_case("file") {
            return Err(StoreError::UnsupportedScheme { scheme: word.to_owned(), text: text.to_owned() });
        }
        let invalid = |why| StoreError::InvalidUri { text: text.to_owned(), why, form };
        let path = rest.strip_prefix("localhost").filter(|path| path.starts_with('/')).unwrap_or(rest);
        if !path.starts_with('/') {
            return Err(invalid("its path does not begin with a slash"));
        }
        let path =
            percent_decoded(path).ok_or_else(|| invalid("a % is not followed by two hex digits of UTF-8"))?;
        Ok(Self::from_path(path))
    }
}

fn remote(form: &'static SchemeForm, rest: &str) -> Result<RemoteSource, StoreError> {
    let invalid =
        |why| StoreError::InvalidUri { text: format!("{}://{rest}", form.word), why, form: form.form };
    if rest.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(invalid("it holds white space"));
    }
    let (address, revision) = match form.scheme {
        Scheme::HuggingFace => match rest.split_once('@') {
            Some((_, "")) => return Err(invalid("nothing follows the @")),
            Some((address, revision)) => (address, Some(revision.to_owned())),
            None => (rest, None),
        },
        _ => (rest, None),
    };
    let segments: Vec<&str> = address.split('/').collect();
    let is_web = matches!(form.scheme, Scheme::Https | Scheme::Http);
    if !is_web && segments.iter().any(|segment| matches!(*segment, "." | "..")) {
        return Err(invalid("it holds . or .. as a folder"));
    }
    let needed = if matches!(form.scheme, Scheme::HuggingFace | Scheme::Registry) || is_web { 2 } else { 1 };
    let is_complete =
        segments.len() >= needed && segments[..needed].iter().all(|segment| !segment.is_empty());
    if !is_complete {
        return Err(invalid("it is incomplete"));
    }
    if is_web && segments[0].contains('@') {
        return Err(StoreError::InvalidUri {
            text: format!("{}://...", form.word),
            why: "it holds a user and a password, which would be shown in states and logs",
            form: "the address without them, and SOURCE_USERNAME and SOURCE_PASSWORD in the environment or Secret",
        });
    }
    Ok(RemoteSource { scheme: form.scheme, address: address.to_owned(), revision })
}

impl RemoteSource {
    /// How it is fetched.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The first segment of the address, and what follows without slashes around it: `bucket` and `a/b`.
    pub(crate) fn first_and_rest(&self) -> (&str, &str) {
        let (first, rest) = self.address.split_once('/').unwrap_or((&self.address, ""));
        (first, rest.trim_matches('/'))
    }
}

/// The text that a percent-encoded path stands for; none where a `%` is not followed by two hex digits, or
/// the bytes are not UTF-8.
pub(crate) fn percent_decoded(text: &str) -> Option<String> {
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
            assert_eq!(text.parse::<Source>().unwrap().path(), Some(Path::new(path)), "{text}");
        }
    }

    #[test]
    fn every_scheme_is_read_and_written_back() {
        for form in SCHEMES {
            let source: Source = form.form.parse().unwrap();
            assert_eq!(source.remote().map(RemoteSource::scheme), Some(form.scheme));
            assert_eq!(source.to_string(), form.scheme.example());
            assert_eq!(source.path(), None);
        }
        let source: Source = "hf://org/name/sub/m.gguf@refs/pr/1".parse().unwrap();
        assert_eq!(source.to_string(), "hf://org/name/sub/m.gguf@refs/pr/1");
        let signed: Source = "https://h/m.gguf?X-Amz-Signature=secret".parse().unwrap();
        assert_eq!(signed.to_string(), "https://h/m.gguf");
    }

    #[test]
    fn a_source_suggests_the_name_of_its_model() {
        for (text, name) in [
            ("/models/a.b.gguf", "a.b"),
            ("hf://org/name@main", "name"),
            ("hf://org/name/q4.gguf", "q4"),
            ("oci://r.io:5000/org/model:v1", "model"),
            ("https://h/a/m.gguf?sig=x", "m"),
            ("s3://bucket/folder/", "folder"),
        ] {
            assert_eq!(text.parse::<Source>().unwrap().suggested_name().as_deref(), Some(name), "{text}");
        }
    }

    #[test]
    fn a_revision_is_for_sources_that_have_some() {
        let of = |text: &str, revision| text.parse::<Source>().unwrap().with_revision(revision);
        assert_eq!(of("hf://o/n", Some("v1")).unwrap().to_string(), "hf://o/n@v1");
        assert_eq!(of("hf://o/n@v1", Some("v1")).unwrap().to_string(), "hf://o/n@v1");
        assert!(matches!(of("hf://o/n@v1", Some("v2")), Err(StoreError::InvalidUri { .. })));
        assert!(matches!(of("s3://b/k", Some("v1")), Err(StoreError::RevisionNotSupported { .. })));
        assert_eq!(of("s3://b/k", None).unwrap().to_string(), "s3://b/k");
    }

    #[test]
    fn other_schemes_are_refused_by_name_with_what_works() {
        for scheme in ["ftp", "pvc"] {
            let error = format!("{scheme}://x/y").parse::<Source>().unwrap_err();
            assert!(matches!(&error, StoreError::UnsupportedScheme { scheme: found, .. } if found == scheme));
            let text = error.to_string();
            assert!(text.contains(&format!("{scheme}://")) && text.contains(SUPPORTED), "{text}");
        }
    }

    #[test]
    fn uris_that_name_nothing_are_refused() {
        for text in [
            "file://models/a",
            "file://",
            "file:///a%2",
            "file:///a%zz",
            "file:///a%ff",
            "",
            "hf://org",
            "hf://org/",
            "hf://org/name@",
            "hf://org/../name",
            "s3://",
            "s3:///key",
            "oci://registry",
            "https://host",
            "https://user:pass@host/m",
            "gs://b/a b",
        ] {
            let error = text.parse::<Source>().unwrap_err();
            assert!(matches!(error, StoreError::InvalidUri { .. }), "{text}: {error}");
            assert!(!error.to_string().contains("pass@"), "{error}");
        }
    }
}
