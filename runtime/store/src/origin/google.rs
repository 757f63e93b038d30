//! Google Cloud Storage, by its JSON API (`STORAGE_EMULATOR_HOST` for another server).

use std::ops::Range;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use ring::rand::SystemRandom;
use ring::rsa::KeyPair;
use ring::signature::RSA_PKCS1_SHA256;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::bucket::{self, StoredObject};
use super::{Listing, RemoteFile, ranged};
use crate::error::StoreError;
use crate::http::{Answer, Http, Query, encode_component, invalid_answer};
use crate::settings::Environment;
use crate::source::RemoteSource;

const ENDPOINT: &str = "https://storage.googleapis.com";
const EXPECTED: &str = "Google Cloud Storage or a server with its API (STORAGE_EMULATOR_HOST)";
const FIX: &str =
    "set GOOGLE_APPLICATION_CREDENTIALS to the key of a service account, or use workload identity";
const SCOPE: &str = "https://www.googleapis.com/auth/devstorage.read_only";
/// The metadata server answers at once, or there is none.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);
/// Tokens are fetched anew this long before they end.
const RENEW_BEFORE_S: i64 = 120;

#[derive(Debug)]
pub(crate) struct GoogleStorage {
    http: Http,
    environment: Environment,
    endpoint: String,
    is_google: bool,
    bucket: String,
    key: String,
    token: Mutex<Option<CachedToken>>,
}

/// A token, or that there is none, until it ends.
#[derive(Clone)]
pub(super) struct CachedToken {
    pub(super) token: Option<String>,
    pub(super) expires_s: i64,
}

impl std::fmt::Debug for CachedToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CachedToken").field("expires_s", &self.expires_s).finish_non_exhaustive()
    }
}

impl CachedToken {
    /// Whether it counts for a while yet.
    pub(super) fn is_fresh(&self) -> bool {
        self.expires_s > Timestamp::now().as_second() + RENEW_BEFORE_S
    }
}

/// What token services answer.
#[derive(Deserialize)]
pub(super) struct TokenAnswer {
    access_token: String,
    expires_in: i64,
}

impl From<TokenAnswer> for CachedToken {
    fn from(answer: TokenAnswer) -> Self {
        Self {
            token: Some(answer.access_token),
            expires_s: Timestamp::now().as_second().saturating_add(answer.expires_in),
        }
    }
}

#[derive(Deserialize)]
struct ServiceAccountKey {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    client_email: String,
    #[serde(default)]
    private_key: String,
    #[serde(default)]
    token_uri: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ObjectList {
    #[serde(default)]
    items: Vec<ListedEntry>,
    next_page_token: Option<String>,
}

#[derive(Deserialize)]
struct ListedEntry {
    name: String,
    size: String,
    generation: String,
}

impl GoogleStorage {
    pub(super) fn new(source: &RemoteSource, http: Http, environment: Environment) -> Self {
        let (bucket, key) = source.first_and_rest();
        let stated = environment.endpoint(&["STORAGE_EMULATOR_HOST"]);
        let is_google = stated.is_none();
        let with_scheme = |host: String| if host.contains("://") { host } else { format!("http://{host}") };
        Self {
            http,
            environment,
            endpoint: stated.map_or_else(|| ENDPOINT.to_owned(), with_scheme),
            is_google,
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            token: Mutex::default(),
        }
    }

    pub(super) fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        let shown = format!("gs://{}/{}", self.bucket, self.key);
        let mut objects = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let token = next.map(|token| format!("&pageToken={}", encode_component(&token)));
            let address = format!(
                "{}/storage/v1/b/{}/o?prefix={}&fields=items(name,size,generation),nextPageToken{}",
                self.endpoint,
                encode_component(&self.bucket),
                encode_component(&self.key),
                token.unwrap_or_default()
            );
            let query = Query::get(&address, &shown, FIX)?.bearer(self.token().await?.as_deref())?;
            let body = self.http.describe(&query).await?;
            let list: ObjectList = serde_json::from_slice(&body)
                .map_err(|error| invalid_answer(&query, &error.to_string(), EXPECTED))?;
            for entry in list.items {
                let bytes = entry.size.parse();
                let bytes = bytes.map_err(|_| invalid_answer(&query, "a size is no number", EXPECTED))?;
                let version = Some(entry.generation);
                objects.push(StoredObject { key: entry.name, bytes, etag: None, version });
            }
            bucket::check_count(objects.len(), &shown)?;
            next = list.next_page_token;
            if next.is_none() {
                break;
            }
        }
        let missing = StoreError::NotAtSource { host: self.endpoint.clone(), what: shown };
        bucket::listed(&self.key, objects, missing)
    }

    /// Reads at the generation that was listed, so that no other bytes come.
    pub(super) async fn get(
        &self,
        file: &RemoteFile,
        range: Option<Range<u64>>,
    ) -> Result<Answer, StoreError> {
        let generation = file.version.as_deref().map(|generation| format!("&generation={generation}"));
        let address = format!(
            "{}/storage/v1/b/{}/o/{}?alt=media{}",
            self.endpoint,
            encode_component(&self.bucket),
            encode_component(&file.address),
            generation.unwrap_or_default()
        );
        let query = Query::get(&address, &file.name, FIX)?.bearer(self.token().await?.as_deref())?;
        self.http.fetch(&ranged(query, range)?).await
    }

    async fn token(&self) -> Result<Option<String>, StoreError> {
        let mut cached = self.token.lock().await;
        if let Some(found) = cached.as_ref().filter(|found| found.is_fresh()) {
            return Ok(found.token.clone());
        }
        let found = self.find_token().await?;
        Ok(cached.insert(found).token.clone())
    }

    async fn find_token(&self) -> Result<CachedToken, StoreError> {
        let of_secret = self.environment.secret_file("key.json").map(|path| path.display().to_string());
        if let Some(file) = self.environment.get("GOOGLE_APPLICATION_CREDENTIALS").or(of_secret) {
            return self.of_service_account(&file).await;
        }
        let host = self.environment.get("GCE_METADATA_HOST");
        if self.is_google || host.is_some() {
            let host = host.unwrap_or_else(|| "metadata.google.internal".to_owned());
            let address = format!("http://{host}/computeMetadata/v1/instance/service-accounts/default/token");
            let query = Query::get(&address, "a token of the pod's service account", FIX)?;
            let query = query.header("metadata-flavor", "Google")?;
            if let Ok(Ok(body)) = timeout(METADATA_TIMEOUT, self.http.describe(&query)).await {
                return read_token(&query, &body);
            }
        }
        // No credentials: buckets that everybody may read.
        Ok(CachedToken { token: None, expires_s: i64::MAX })
    }

    async fn of_service_account(&self, file: &str) -> Result<CachedToken, StoreError> {
        let wrong = |why: String| StoreError::Credentials { name: file.to_owned(), why };
        let content = std::fs::read(file).map_err(|error| wrong(error.to_string()))?;
        let key: ServiceAccountKey =
            serde_json::from_slice(&content).map_err(|error| wrong(error.to_string()))?;
        if key.kind != "service_account" {
            return Err(wrong(format!(
                "its type is {:?}; give the key of a service account, or use workload identity",
                key.kind
            )));
        }
        let assertion = assertion(&key, Timestamp::now().as_second()).map_err(wrong)?;
        let form =
            format!("grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion={assertion}");
        let query = Query::get(&key.token_uri, format!("a token of {}", key.client_email), FIX)?;
        let query = query.post("application/x-www-form-urlencoded", form)?;
        let body = self.http.describe(&query).await?;
        read_token(&query, &body)
    }
}

fn read_token(query: &Query, body: &[u8]) -> Result<CachedToken, StoreError> {
    let answer: TokenAnswer = serde_json::from_slice(body)
        .map_err(|error| invalid_answer(query, &error.to_string(), "a token service"))?;
    Ok(answer.into())
}

/// The signed claim that is exchanged for a token (RFC 7523).
fn assertion(key: &ServiceAccountKey, now_s: i64) -> Result<String, String> {
    let claims = serde_json::json!({
        "iss": key.client_email,
        "scope": SCOPE,
        "aud": key.token_uri,
        "iat": now_s,
        "exp": now_s + 3600,
    });
    let encode = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
    let signed =
        format!("{}.{}", encode(br#"{"alg":"RS256","typ":"JWT"}"#), encode(claims.to_string().as_bytes()));
    let der = PrivatePkcs8KeyDer::from_pem_slice(key.private_key.as_bytes())
        .map_err(|error| format!("private_key is no PEM of PKCS #8: {error}"))?;
    let pair = KeyPair::from_pkcs8(der.secret_pkcs8_der())
        .map_err(|error| format!("private_key is no RSA key: {error}"))?;
    let mut signature = vec![0; pair.public().modulus_len()];
    pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature)
        .map_err(|_| "private_key cannot sign".to_owned())?;
    Ok(format!("{signed}.{}", encode(&signature)))
}
