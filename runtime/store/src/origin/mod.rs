//! Servers that models come from: each lists the files of a source, and gives ranges of one.

mod aws_credentials;
mod azure;
mod bucket;
mod google;
mod hugging_face;
mod registry;
mod registry_auth;
mod s3;
mod sigv4;
mod web;

use std::ops::Range;
use std::path::PathBuf;

use crate::digest::Digest;
use crate::error::StoreError;
use crate::http::{Answer, Http, Query};
use crate::select::ModelFile;
use crate::settings::Environment;
use crate::source::{RemoteSource, Scheme};

/// What proves that the bytes are those that the source lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Check {
    /// Their sha256.
    Sha256(Digest),
    /// The id of a git blob: sha1 of its header and its bytes.
    GitBlob(String),
}

/// How the bytes of an archive are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Tar,
    TarGzip,
    TarZstd,
}

/// One file as its source lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    /// Path below the source's root.
    pub(crate) name: String,
    /// Its length.
    pub(crate) bytes: u64,
    pub(crate) check: Option<Check>,
    /// What differs when the bytes differ; none where the server says nothing, so that nothing of an earlier
    /// transfer can be used.
    pub(crate) version: Option<String>,
    /// The `ETag` that answers must carry, where the server has them.
    pub(crate) etag: Option<String>,
    /// How the server calls it: a key, a path or an address.
    pub(crate) address: String,
}

/// What a source holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Listing {
    /// The commit or the digest that a branch or tag stands for now.
    pub(crate) version: Option<String>,
    pub(crate) files: Vec<RemoteFile>,
    /// Whether the source names one file and not a folder; then it is the model, whatever its name.
    pub(crate) is_one_file: bool,
    /// Layers of an artifact that hold files.
    pub(crate) archives: Vec<Archive>,
}

/// A layer that must be unpacked before its files are listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Archive {
    pub(crate) file: RemoteFile,
    pub(crate) packing: Packing,
}

/// A server that holds a model.
#[derive(Debug)]
pub(crate) enum Origin {
    HuggingFace(hugging_face::HuggingFace),
    S3(Box<s3::S3>),
    Google(Box<google::GoogleStorage>),
    Azure(Box<azure::AzureBlob>),
    Web(web::Web),
    Registry(registry::Registry),
}

impl Origin {
    pub(crate) fn new(
        source: &RemoteSource,
        http: &Http,
        environment: &Environment,
    ) -> Result<Self, StoreError> {
        let (http, environment) = (http.clone(), environment.clone());
        Ok(match source.scheme {
            Scheme::HuggingFace => {
                Self::HuggingFace(hugging_face::HuggingFace::new(source, http, &environment)?)
            }
            Scheme::S3 => Self::S3(Box::new(s3::S3::new(source, http, environment))),
            Scheme::GoogleStorage => {
                Self::Google(Box::new(google::GoogleStorage::new(source, http, environment)))
            }
            Scheme::AzureBlob => Self::Azure(Box::new(azure::AzureBlob::new(source, http, environment)?)),
            Scheme::Https | Scheme::Http => Self::Web(web::Web::new(source, http, environment)),
            Scheme::Registry => Self::Registry(registry::Registry::new(source, http, environment)?),
        })
    }

    /// The host that is asked, for messages.
    pub(crate) fn host(&self) -> String {
        let address = match self {
            Self::HuggingFace(origin) => origin.endpoint(),
            Self::S3(origin) => origin.base(),
            Self::Google(origin) => origin.endpoint(),
            Self::Azure(origin) => origin.endpoint(),
            Self::Web(origin) => origin.endpoint(),
            Self::Registry(origin) => origin.endpoint(),
        };
        let without_scheme = address.split_once("://").map_or(address.as_str(), |(_, rest)| rest);
        without_scheme.split('/').next().unwrap_or_default().to_owned()
    }

    /// The files that the source holds now.
    pub(crate) async fn list(&self) -> Result<Listing, StoreError> {
        match self {
            Self::HuggingFace(origin) => origin.list().await,
            Self::S3(origin) => origin.list().await,
            Self::Google(origin) => origin.list().await,
            Self::Azure(origin) => origin.list().await,
            Self::Web(origin) => origin.list().await,
            Self::Registry(origin) => origin.list().await,
        }
    }

    /// What only a request for one file tells: its checksum.
    pub(crate) async fn describe(&self, file: &mut RemoteFile) -> Result<(), StoreError> {
        match self {
            Self::S3(origin) => origin.describe(file).await,
            _ => Ok(()),
        }
    }

    /// Asks for a range of a file, or for all of it. The answer is a success, and 200 where the server has no
    /// ranges.
    pub(crate) async fn get(
        &self,
        file: &RemoteFile,
        range: Option<Range<u64>>,
    ) -> Result<Answer, StoreError> {
        match self {
            Self::HuggingFace(origin) => origin.get(file, range).await,
            Self::S3(origin) => origin.get(file, range).await,
            Self::Google(origin) => origin.get(file, range).await,
            Self::Azure(origin) => origin.get(file, range).await,
            Self::Web(origin) => origin.get(file, range).await,
            Self::Registry(origin) => origin.get(file, range).await,
        }
    }
}

impl RemoteFile {
    /// As a file to pick from.
    pub(crate) fn listed(&self) -> ModelFile {
        ModelFile { name: self.name.clone(), path: PathBuf::new(), bytes: self.bytes }
    }
}

/// With the header that asks for a range.
fn ranged(query: Query, range: Option<Range<u64>>) -> Result<Query, StoreError> {
    match range {
        Some(range) => query.header("range", &range_header(&range)),
        None => Ok(query),
    }
}

/// The last byte of HTTP's ranges is inside them.
fn range_header(range: &Range<u64>) -> String {
    format!("bytes={}-{}", range.start, range.end.saturating_sub(1))
}
