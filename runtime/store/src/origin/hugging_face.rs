//! Repositories of Hugging Face, or of a mirror with the same API (`HF_ENDPOINT`).
//!
//! A branch or tag is resolved to a commit once, and everything is read at that commit. Large files have
//! their sha256 in the list, small ones the id of their git blob, so every byte is checked.

use std::ops::Range;

use serde::Deserialize;

use super::{Check, Listing, RemoteFile, ranged};
use crate::digest::Digest;
use crate::error::StoreError;
use crate::http::{Answer, Http, Query, encode_component, encode_path, invalid_answer};
use crate::settings::Environment;
use crate::source::RemoteSource;

const ENDPOINT: &str = "https://huggingface.co";
const EXPECTED: &str = "Hugging Face or a mirror of it (HF_ENDPOINT)";
const FIX: &str = "set HF_TOKEN to a token that may read the repository, and accept the model's terms on its page if it is gated";

#[derive(Debug)]
pub(crate) struct HuggingFace {
    http: Http,
    endpoint: String,
    token: Option<String>,
    repository: String,
    /// A file or folder of the repository; empty is all of it.
    within: String,
    revision: String,
}

#[derive(Deserialize)]
struct RepositoryInfo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    #[serde(alias = "oid")]
    sha256: String,
    size: Option<u64>,
}

impl HuggingFace {
    pub(super) fn new(
        source: &RemoteSource,
        http: Http,
        environment: &Environment,
    ) -> Result<Self, StoreError> {
        let (owner, rest) = source.first_and_rest();
        let (name, within) = rest.split_once('/').unwrap_or((rest, ""));
        Ok(Self {
            http,
            endpoint: environment.endpoint(&["HF_ENDPOINT"]).unwrap_or_else(|| ENDPOINT.to_owned()),
            token: environment.first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]),
            repository: format!("{owner}/{name}"),
            within: within.to_owned(),
            revision: source.revision.clone().unwrap_or_else(|| "main".to_owned()),
        })
    }

    pub(super) fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        let (repository, revision) = (encode_path(&self.repository), encode_component(&self.revision));
        let address = format!("{}/api/models/{repository}/revision/{revision}?blobs=true", self.endpoint);
        let what = format!("repository {} at revision {}", self.repository, self.revision);
        let query = Query::get(&address, what, FIX)?.bearer(self.token.as_deref())?;
        let body =
            self.http.read(&query, self.fetch(&query).await?, crate::http::MAX_DESCRIPTION_BYTES).await?;
        let info: RepositoryInfo = serde_json::from_slice(&body)
            .map_err(|error| invalid_answer(&query, &error.to_string(), EXPECTED))?;
        let mut files = Vec::with_capacity(info.siblings.len());
        for sibling in info.siblings {
            let Some(name) = self.name_within(&sibling.rfilename) else { continue };
            let size = sibling.lfs.as_ref().and_then(|lfs| lfs.size).or(sibling.size);
            let Some(bytes) = size else {
                let why = format!("{} has no size", sibling.rfilename);
                return Err(invalid_answer(&query, &why, EXPECTED));
            };
            let sha256 = sibling.lfs.and_then(|lfs| Digest::from_hex(&lfs.sha256)).map(Check::Sha256);
            files.push(RemoteFile {
                name,
                bytes,
                check: sha256.or(sibling.blob_id.map(Check::GitBlob)),
                version: Some(info.sha.clone()),
                etag: None,
                address: sibling.rfilename,
            });
        }
        if files.is_empty() && !self.within.is_empty() {
            let what = format!("{} in repository {}", self.within, self.repository);
            return Err(StoreError::NotAtSource { host: query.host(), what });
        }
        let is_one_file = matches!(files.as_slice(), [only] if only.address == self.within);
        Ok(Listing { version: Some(info.sha), files, is_one_file, ..Listing::default() })
    }

    /// The name of a file below what the source names; a source that is one file has its own name.
    fn name_within(&self, path: &str) -> Option<String> {
        if self.within.is_empty() {
            return Some(path.to_owned());
        }
        let rest = path.strip_prefix(&self.within)?;
        if rest.is_empty() {
            return path.rsplit('/').next().map(str::to_owned);
        }
        rest.strip_prefix('/').map(str::to_owned)
    }

    pub(super) async fn get(
        &self,
        file: &RemoteFile,
        range: Option<Range<u64>>,
    ) -> Result<Answer, StoreError> {
        let commit = file.version.as_deref().unwrap_or(&self.revision);
        let (repository, path) = (encode_path(&self.repository), encode_path(&file.address));
        let address = format!("{}/{repository}/resolve/{}/{path}", self.endpoint, encode_component(commit));
        let query = Query::get(&address, &file.name, FIX)?.bearer(self.token.as_deref())?;
        self.fetch(&ranged(query, range)?).await
    }

    /// The hub answers 401 for what does not exist, too, so that nobody learns which private repositories
    /// there are; with a token, or in a header, it says more.
    async fn fetch(&self, query: &Query) -> Result<Answer, StoreError> {
        let (last, answer) = self.http.follow(query.clone()).await?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let code =
            answer.headers().get("x-error-code").and_then(|code| code.to_str().ok()).map(str::to_owned);
        match code.as_deref() {
            Some("RepoNotFound") if self.token.is_none() => {
                Err(StoreError::Unauthorized { host: last.host(), what: last.what, fix: FIX })
            }
            Some("RepoNotFound" | "RevisionNotFound" | "EntryNotFound") => {
                Err(StoreError::NotAtSource { host: last.host(), what: last.what })
            }
            Some("GatedRepo") => Err(StoreError::AccessDenied {
                host: last.host(),
                what: last.what,
                why: "the repository is gated".to_owned(),
                fix: FIX,
            }),
            _ => Err(self.http.refused(&last, answer).await),
        }
    }
}
