//! One file of a web server.

use std::ops::Range;

use http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, LAST_MODIFIED};
use http::{HeaderMap, StatusCode};

use super::{Listing, RemoteFile, ranged};
use crate::error::StoreError;
use crate::http::{Answer, Http, Query, invalid_answer};
use crate::settings::Environment;
use crate::source::{RemoteSource, percent_decoded};

const FIX: &str = "set SOURCE_TOKEN, or SOURCE_USERNAME and SOURCE_PASSWORD";

#[derive(Debug)]
pub(crate) struct Web {
    http: Http,
    environment: Environment,
    address: String,
    /// For messages: without the query, in which signed addresses hold a secret.
    shown: String,
}

impl Web {
    pub(super) fn new(source: &RemoteSource, http: Http, environment: Environment) -> Self {
        let word = if source.scheme == crate::source::Scheme::Http { "http" } else { "https" };
        let address = format!("{word}://{}", source.address);
        Self { http, environment, shown: source.to_string(), address }
    }

    pub(super) fn endpoint(&self) -> String {
        self.shown.clone()
    }

    fn query(&self) -> Result<Query, StoreError> {
        let query = Query::get(&self.address, &self.shown, FIX)?;
        with_credentials(query, &self.environment)
    }

    /// Asks for the first byte: unlike HEAD, signed addresses allow that, and the answer says whether the
    /// server has ranges. Its body is not read.
    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        let query = ranged(self.query()?, Some(0..1))?;
        let (last, answer) = self.http.follow(query).await?;
        let bytes = match answer.status() {
            StatusCode::PARTIAL_CONTENT => total_of(answer.headers()),
            // The range of an empty file cannot be satisfied.
            StatusCode::RANGE_NOT_SATISFIABLE => total_of(answer.headers()).filter(|bytes| *bytes == 0),
            status if status.is_success() => {
                text(answer.headers(), CONTENT_LENGTH).and_then(|length| length.parse().ok())
            }
            _ => return Err(self.http.refused(&last, answer).await),
        };
        let Some(bytes) = bytes else {
            return Err(invalid_answer(&last, "it does not say how long the file is", "a file, not a page"));
        };
        let strong = text(answer.headers(), ETAG).filter(|etag| !etag.starts_with("W/"));
        let modified = text(answer.headers(), LAST_MODIFIED);
        let version = strong.clone().or(modified).map(|version| format!("{bytes} {version}"));
        let name = self.file_name().ok_or_else(|| invalid_answer(&last, "it names no file", "a file"))?;
        let address = self.address.clone();
        let file = RemoteFile { name, bytes, check: None, version, etag: strong, address };
        Ok(Listing { files: vec![file], is_one_file: true, ..Listing::default() })
    }

    fn file_name(&self) -> Option<String> {
        let path = self.address.split(['?', '#']).next()?;
        let name = percent_decoded(path.rsplit('/').next()?)?;
        (!name.is_empty() && !name.contains('/')).then_some(name)
    }

    pub(super) async fn get(
        &self,
        _file: &RemoteFile,
        range: Option<Range<u64>>,
    ) -> Result<Answer, StoreError> {
        self.http.fetch(&ranged(self.query()?, range)?).await
    }
}

/// With the credentials for servers that have no standard of their own.
pub(super) fn with_credentials(query: Query, environment: &Environment) -> Result<Query, StoreError> {
    if let Some(token) = environment.get("SOURCE_TOKEN") {
        return query.bearer(Some(&token));
    }
    match environment.get("SOURCE_USERNAME") {
        Some(user) => {
            let password = environment.get("SOURCE_PASSWORD").unwrap_or_default();
            query.header("authorization", &super::registry_auth::basic(&user, &password))
        }
        None => Ok(query),
    }
}

fn text(headers: &HeaderMap, name: http::HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// The length that `bytes 0-0/123` or `bytes */0` ends with.
fn total_of(headers: &HeaderMap) -> Option<u64> {
    text(headers, CONTENT_RANGE)?.rsplit('/').next()?.parse().ok()
}
