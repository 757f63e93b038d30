//! Amazon S3, and servers with its API (`AWS_ENDPOINT_URL`).

use std::ops::Range;
use std::sync::{PoisonError, RwLock};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;
use serde::Deserialize;

use super::aws_credentials::{AwsCredentials, FIX};
use super::bucket::{self, StoredObject};
use super::sigv4::{self, SigningScope};
use super::{Check, Listing, RemoteFile, ranged};
use crate::digest::Digest;
use crate::error::StoreError;
use crate::http::{Answer, Http, Query, encode_component, encode_path, invalid_answer};
use crate::settings::Environment;
use crate::source::RemoteSource;

const EXPECTED: &str = "S3 or a server with its API (AWS_ENDPOINT_URL)";
const DEFAULT_REGION: &str = "us-east-1";

#[derive(Debug)]
pub(crate) struct S3 {
    http: Http,
    credentials: AwsCredentials,
    /// A server other than AWS's own; buckets are the first segment of its paths.
    endpoint: Option<String>,
    /// AWS answers with the right one where this is not the bucket's.
    region: RwLock<String>,
    bucket: String,
    key: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct BucketList {
    #[serde(default)]
    contents: Vec<ListedObject>,
    next_continuation_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListedObject {
    key: String,
    size: u64,
    #[serde(rename = "ETag")]
    etag: Option<String>,
}

impl S3 {
    pub(super) fn new(source: &RemoteSource, http: Http, environment: Environment) -> Self {
        let (bucket, key) = source.first_and_rest();
        let endpoint = environment.endpoint(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]);
        let region = environment.first(&["AWS_REGION", "AWS_DEFAULT_REGION"]);
        let region = region.unwrap_or_else(|| DEFAULT_REGION.to_owned());
        let is_aws = endpoint.is_none();
        Self {
            credentials: AwsCredentials::new(http.clone(), environment, region.clone(), is_aws),
            http,
            endpoint,
            region: RwLock::new(region),
            bucket: bucket.to_owned(),
            key: key.to_owned(),
        }
    }

    /// The address of the bucket, without a slash at its end.
    pub(super) fn base(&self) -> String {
        let bucket = &self.bucket;
        match &self.endpoint {
            Some(endpoint) => format!("{endpoint}/{}", encode_path(bucket)),
            None => {
                let region = self.region();
                // A dot in the bucket's name does not fit the certificate's wildcard.
                if bucket.contains('.') {
                    format!("https://s3.{region}.amazonaws.com/{bucket}")
                } else {
                    format!("https://{bucket}.s3.{region}.amazonaws.com")
                }
            }
        }
    }

    fn region(&self) -> String {
        self.region.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sends a signed request. `address` makes the address from the bucket's, which depends on its region.
    async fn send(
        &self,
        what: &str,
        address: &(dyn Fn(&str) -> String + Sync),
        adjust: &(dyn Fn(Query) -> Result<Query, StoreError> + Sync),
    ) -> Result<Signed, StoreError> {
        for is_last in [false, true] {
            let query = adjust(Query::get(&address(&self.base()), what, FIX)?)?;
            let query = match self.credentials.keys().await? {
                Some(keys) => {
                    let region = self.region();
                    let scope = SigningScope { region: &region, service: "s3", now: Timestamp::now() };
                    sigv4::sign(query, &keys, &scope)
                }
                None => query,
            };
            let answer = self.http.send(&query).await?;
            if answer.status().is_success() {
                return Ok(Signed { query, answer });
            }
            let region = answer.headers().get("x-amz-bucket-region").and_then(|region| region.to_str().ok());
            let other = region.filter(|region| *region != self.region()).map(str::to_owned);
            match other {
                Some(region) if !is_last && self.endpoint.is_none() => {
                    *self.region.write().unwrap_or_else(PoisonError::into_inner) = region;
                }
                _ => return Err(self.http.refused(&query, answer).await),
            }
        }
        unreachable!("the last request returns")
    }

    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        let mut objects: Vec<StoredObject> = Vec::new();
        let mut next: Option<String> = None;
        let shown = format!("s3://{}/{}", self.bucket, self.key);
        loop {
            let token = next.map(|token| format!("continuation-token={}&", encode_component(&token)));
            let token = token.unwrap_or_default();
            let prefix = encode_component(&self.key);
            let address = |base: &str| format!("{base}/?{token}list-type=2&prefix={prefix}");
            let signed = match self.send(&shown, &address, &Ok).await {
                Ok(signed) => signed,
                // Some may read objects and not list them.
                Err(denied @ StoreError::AccessDenied { .. })
                    if !self.key.is_empty() && objects.is_empty() =>
                {
                    return match self.only_object().await {
                        // The answer to a HEAD has no body; that to the list says why.
                        Err(StoreError::AccessDenied { .. }) => Err(denied),
                        other => other,
                    };
                }
                Err(error) => return Err(error),
            };
            let Signed { query, answer } = signed;
            let body = self.http.read(&query, answer, crate::http::MAX_DESCRIPTION_BYTES).await?;
            let list: BucketList = quick_xml::de::from_reader(&*body)
                .map_err(|error| invalid_answer(&query, &error.to_string(), EXPECTED))?;
            objects.extend(list.contents.into_iter().map(|object| StoredObject {
                key: object.key,
                bytes: object.size,
                version: object.etag.clone(),
                etag: object.etag,
            }));
            bucket::check_count(objects.len(), &shown)?;
            next = list.next_continuation_token;
            if next.is_none() {
                break;
            }
        }
        let missing = StoreError::NotAtSource { host: self.base(), what: shown };
        bucket::listed(&self.key, objects, missing)
    }

    async fn only_object(&self) -> Result<Listing, StoreError> {
        let signed = self.head(&self.key).await?;
        let header = |name: &str| signed.header(name);
        let bytes = header("content-length").and_then(|length| length.parse().ok());
        let bytes = bytes.ok_or_else(|| invalid_answer(&signed.query, "it has no length", EXPECTED))?;
        let etag = header("etag");
        let object = StoredObject { key: self.key.clone(), bytes, version: etag.clone(), etag };
        Ok(bucket::listing(&self.key, vec![object]))
    }

    async fn head(&self, key: &str) -> Result<Signed, StoreError> {
        let path = encode_path(key);
        let as_head = |query: Query| {
            let mut query = query.header("x-amz-checksum-mode", "ENABLED")?;
            *query.request.method_mut() = http::Method::HEAD;
            Ok(query)
        };
        self.send(key, &|base| format!("{base}/{path}"), &as_head).await
    }

    /// Adds the sha256 of the whole object, where the uploader had one stored. A checksum of an upload in
    /// several pieces ends in `-` and their count, and is not that of the bytes.
    pub(super) async fn describe(&self, file: &mut RemoteFile) -> Result<(), StoreError> {
        let signed = self.head(&file.address).await?;
        let checksum = signed.header("x-amz-checksum-sha256");
        let bytes = checksum.and_then(|text| BASE64_STANDARD.decode(text).ok());
        file.check = bytes.and_then(|bytes| Digest::from_bytes(&bytes)).map(Check::Sha256);
        Ok(())
    }

    pub(super) async fn get(
        &self,
        file: &RemoteFile,
        range: Option<Range<u64>>,
    ) -> Result<Answer, StoreError> {
        let path = encode_path(&file.address);
        let with_range = |query: Query| ranged(query, range.clone());
        Ok(self.send(&file.name, &|base| format!("{base}/{path}"), &with_range).await?.answer)
    }
}

/// A request as it was signed, and its answer.
struct Signed {
    query: Query,
    answer: Answer,
}

impl Signed {
    fn header(&self, name: &str) -> Option<String> {
        self.answer.headers().get(name)?.to_str().ok().map(str::to_owned)
    }
}
