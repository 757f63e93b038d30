//! Azure Blob Storage (`AZURE_STORAGE_ENDPOINT` for another server).

use std::ops::Range;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use jiff::Timestamp;
use ring::hmac;
use serde::Deserialize;
use tokio::sync::Mutex;

use super::aws_credentials::read_token;
use super::bucket::{self, StoredObject};
use super::google::{CachedToken, TokenAnswer};
use super::{Listing, RemoteFile, range_header};
use crate::error::StoreError;
use crate::http::{Answer, Http, Query, encode_component, encode_path, invalid_answer};
use crate::settings::Environment;
use crate::source::{RemoteSource, percent_decoded};

const EXPECTED: &str = "Azure Blob Storage or a server with its API (AZURE_STORAGE_ENDPOINT)";
const FIX: &str = "set AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, or use workload identity";
const API_VERSION: &str = "2021-12-02";
const AUTHORITY: &str = "https://login.microsoftonline.com";

#[derive(Debug)]
pub(crate) struct AzureBlob {
    http: Http,
    environment: Environment,
    account: String,
    endpoint: String,
    container: String,
    key: String,
    token: Mutex<Option<CachedToken>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ContainerList {
    blobs: BlobList,
    next_marker: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct BlobList {
    #[serde(default)]
    blob: Vec<ListedBlob>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListedBlob {
    name: String,
    properties: BlobProperties,
}

#[derive(Deserialize)]
struct BlobProperties {
    #[serde(rename = "Content-Length")]
    bytes: u64,
    #[serde(rename = "Etag")]
    etag: String,
}

impl AzureBlob {
    pub(super) fn new(
        source: &RemoteSource,
        http: Http,
        environment: Environment,
    ) -> Result<Self, StoreError> {
        let account = environment.first(&["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"]);
        let Some(account) = account else {
            return Err(StoreError::Credentials {
                name: "AZURE_STORAGE_ACCOUNT".to_owned(),
                why: format!("it is not set; set it to the storage account of {source}"),
            });
        };
        let endpoint = environment.endpoint(&["AZURE_STORAGE_ENDPOINT"]);
        let endpoint = endpoint.unwrap_or_else(|| format!("https://{account}.blob.core.windows.net"));
        let (container, key) = source.first_and_rest();
        let (container, key) = (container.to_owned(), key.to_owned());
        Ok(Self { http, environment, account, endpoint, container, key, token: Mutex::default() })
    }

    pub(super) fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        let shown = format!("az://{}/{}", self.container, self.key);
        let mut objects = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let marker = next.map(|marker| format!("&marker={}", encode_component(&marker)));
            let arguments = format!(
                "comp=list&prefix={}&restype=container{}",
                encode_component(&self.key),
                marker.unwrap_or_default()
            );
            let query = self.query("", &arguments, &shown, None).await?;
            let body = self.http.describe(&query).await?;
            // Some versions begin with a byte order mark.
            let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&body);
            let list: ContainerList = quick_xml::de::from_reader(body)
                .map_err(|error| invalid_answer(&query, &error.to_string(), EXPECTED))?;
            objects.extend(list.blobs.blob.into_iter().map(|blob| StoredObject {
                key: blob.name,
                bytes: blob.properties.bytes,
                // The list writes it without the quotes of answers.
                version: Some(blob.properties.etag),
                etag: None,
            }));
            bucket::check_count(objects.len(), &shown)?;
            next = list.next_marker.filter(|marker| !marker.is_empty());
            if next.is_none() {
                break;
            }
        }
        let missing = StoreError::NotAtSource { host: self.endpoint.clone(), what: shown };
        bucket::listed(&self.key, objects, missing)
    }

    /// Reads on condition that the blob is the one that was listed.
    pub(super) async fn get(
        &self,
        file: &RemoteFile,
        range: Option<Range<u64>>,
    ) -> Result<Answer, StoreError> {
        let etag = file.version.as_deref().map(|etag| format!("\"{}\"", etag.trim_matches('"')));
        let conditions = BlobConditions { range: range.as_ref().map(range_header), etag };
        let query = self.query(&file.address, "", &file.name, Some(conditions)).await?;
        match self.http.fetch(&query).await {
            Err(StoreError::ServerFailed { status: 412, what, .. }) => {
                Err(StoreError::SourceChanged { what })
            }
            other => other,
        }
    }

    async fn query(
        &self,
        key: &str,
        arguments: &str,
        what: &str,
        conditions: Option<BlobConditions>,
    ) -> Result<Query, StoreError> {
        let slash = if key.is_empty() { "" } else { "/" };
        let path = format!("{}{slash}{}", encode_path(&self.container), encode_path(key));
        let sas = self.environment.get("AZURE_STORAGE_SAS_TOKEN");
        let sas = sas.as_deref().map(|sas| sas.trim_start_matches('?')).unwrap_or_default();
        let both: Vec<&str> = [arguments, sas].into_iter().filter(|text| !text.is_empty()).collect();
        let question = if both.is_empty() { "" } else { "?" };
        let address = format!("{}/{path}{question}{}", self.endpoint, both.join("&"));
        let date = Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let conditions = conditions.unwrap_or_default();
        let mut query = Query::get(&address, what, FIX)?
            .header("x-ms-date", &date)?
            .header("x-ms-version", API_VERSION)?;
        if let Some(range) = &conditions.range {
            query = query.header("x-ms-range", range)?;
        }
        if let Some(etag) = &conditions.etag {
            query = query.header("if-match", etag)?;
        }
        if !sas.is_empty() {
            return Ok(query);
        }
        if let Some(key) = self.environment.first(&["AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY"]) {
            let value = self.shared_key(&query, &key, arguments)?;
            return query.header("authorization", &value);
        }
        query.bearer(self.token().await?.as_deref())
    }

    /// The signature with the account's own key.
    fn shared_key(&self, query: &Query, key: &str, arguments: &str) -> Result<String, StoreError> {
        let key = BASE64_STANDARD.decode(key).map_err(|error| StoreError::Credentials {
            name: "AZURE_STORAGE_KEY".to_owned(),
            why: format!("it is no base64: {error}"),
        })?;
        let text = string_to_sign(query, &self.account, arguments);
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), text.as_bytes());
        Ok(format!("SharedKey {}:{}", self.account, BASE64_STANDARD.encode(signature.as_ref())))
    }

    /// A token for the pod's ServiceAccount, where it has a federated identity.
    async fn token(&self) -> Result<Option<String>, StoreError> {
        let get = |name| self.environment.get(name);
        let (Some(file), Some(client), Some(tenant)) =
            (get("AZURE_FEDERATED_TOKEN_FILE"), get("AZURE_CLIENT_ID"), get("AZURE_TENANT_ID"))
        else {
            return Ok(None);
        };
        let mut cached = self.token.lock().await;
        if let Some(found) = cached.as_ref().filter(|found| found.is_fresh()) {
            return Ok(found.token.clone());
        }
        let authority = self.environment.endpoint(&["AZURE_AUTHORITY_HOST"]);
        let authority = authority.unwrap_or_else(|| AUTHORITY.to_owned());
        let form = format!(
            "client_id={}&scope={}&client_assertion_type={}&client_assertion={}&grant_type=client_credentials",
            encode_component(&client),
            encode_component("https://storage.azure.com/.default"),
            encode_component("urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
            encode_component(&read_token("AZURE_FEDERATED_TOKEN_FILE", &file)?)
        );
        let address = format!("{authority}/{}/oauth2/v2.0/token", encode_component(&tenant));
        let query = Query::get(&address, "a token of the pod's identity", FIX)?;
        let query = query.post("application/x-www-form-urlencoded", form)?;
        let body = self.http.describe(&query).await?;
        let answer: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|error| invalid_answer(&query, &error.to_string(), "Microsoft Entra"))?;
        Ok(cached.insert(answer.into()).token.clone())
    }
}

/// What a read depends on.
#[derive(Debug, Default)]
struct BlobConditions {
    range: Option<String>,
    etag: Option<String>,
}

/// The text that a shared key signs. The thirteen lines are the method and twelve headers, of which requests
/// here have `If-Match` alone.
fn string_to_sign(query: &Query, account: &str, arguments: &str) -> String {
    let headers = query.request.headers();
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut own: Vec<String> = headers
        .keys()
        .filter(|name| name.as_str().starts_with("x-ms-"))
        .map(|name| format!("{name}:{}\n", text(name.as_str())))
        .collect();
    own.sort_unstable();
    let mut pairs: Vec<String> = arguments
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| format!("\n{name}:{}", percent_decoded(value).unwrap_or_default()))
        .collect();
    pairs.sort_unstable();
    format!(
        "{}\n\n\n\n\n\n\n\n{}\n\n\n\n{}/{account}{}{}",
        query.request.method(),
        text("if-match"),
        own.concat(),
        query.request.uri().path(),
        pairs.concat()
    )
}
