//! Requests over HTTP(S): bounded waits, redirects that lose credentials when they leave the host, and errors
//! that say what went wrong.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, AUTHORIZATION, LOCATION, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::time::timeout;

use crate::error::StoreError;
use crate::settings::FetchLimits;

/// Redirects that are followed; the hub's are one or two.
const MAX_REDIRECTS: usize = 5;
/// Largest description that is read: lists of 10,000 files are about 3 MiB.
pub(crate) const MAX_DESCRIPTION_BYTES: usize = 16 << 20;
/// Bytes that a connection reads at once. Large enough that the system calls cost little beside the copy, and
/// small enough to be still in the second-level cache of the core when they are copied to their block.
pub(crate) const READ_BUFFER_BYTES: usize = 256 << 10;
/// What is read of an error's body.
const MAX_ERROR_BYTES: usize = 4096;
/// What a message shows of it.
const SHOWN_CHARS: usize = 200;
/// All but the unreserved characters of RFC 3986, as signatures want it.
const COMPONENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// As [`COMPONENT`], with the slashes of a path.
const PATH: &AsciiSet = &COMPONENT.remove(b'/');

/// An answer whose body has not been read.
pub(crate) type Answer = Response<Incoming>;

/// A request to a source, with what messages need.
#[derive(Debug, Clone)]
pub(crate) struct Query {
    pub(crate) request: Request<Full<Bytes>>,
    /// What is asked for, in messages.
    pub(crate) what: String,
    /// Which credentials this kind of source takes, in messages.
    pub(crate) fix: &'static str,
}

/// The one client of a store.
#[derive(Debug, Clone)]
pub(crate) struct Http {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    stall_timeout: Duration,
}

impl Http {
    pub(crate) fn new(limits: &FetchLimits) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(limits.connect_timeout));
        let provider = rustls::crypto::ring::default_provider();
        let builder = HttpsConnectorBuilder::new().with_provider_and_native_roots(provider.clone());
        let builder = builder.unwrap_or_else(|error| {
            tracing::warn!(%error, "no certificate authorities were found; https sources will be refused");
            HttpsConnectorBuilder::new().with_tls_config(without_roots(provider))
        });
        let connector = builder.https_or_http().enable_http1().wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(20))
            .http1_read_buf_exact_size(READ_BUFFER_BYTES)
            .build(connector);
        Self { client, stall_timeout: limits.stall_timeout }
    }

    /// Sends a request and returns its answer, whatever its status.
    pub(crate) async fn send(&self, query: &Query) -> Result<Answer, StoreError> {
        let mut request = query.request.clone();
        request.headers_mut().entry(USER_AGENT).or_insert(HeaderValue::from_static("trustformers-store"));
        // Compressed bytes have no ranges and are not what digests are of.
        request.headers_mut().insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let host = host_of(request.uri());
        match timeout(self.stall_timeout, self.client.request(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(not_answered(host, &query.what, &error)),
            Err(_) => Err(self.stalled(host, &query.what)),
        }
    }

    pub(crate) fn stalled(&self, host: String, what: &str) -> StoreError {
        StoreError::Stalled { host, what: what.to_owned(), seconds: self.stall_timeout.as_secs().max(1) }
    }

    /// Sends a request, follows redirects, and makes an error of every status that is not a success.
    pub(crate) async fn fetch(&self, query: &Query) -> Result<Answer, StoreError> {
        let (query, answer) = self.follow(query.clone()).await?;
        if answer.status().is_success() { Ok(answer) } else { Err(self.refused(&query, answer).await) }
    }

    /// Sends a request and follows redirects. Returns the last request with its answer.
    pub(crate) async fn follow(&self, mut query: Query) -> Result<Followed, StoreError> {
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.send(&query).await?;
            let target = answer.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            let (true, Some(target)) = (answer.status().is_redirection(), target) else {
                return Ok((query, answer));
            };
            query = redirected(query, target)?;
        }
        Err(invalid_answer(&query, "it redirects again and again", "the file itself"))
    }

    /// The body of an answer, of at most `limit` bytes.
    pub(crate) async fn read(
        &self,
        query: &Query,
        answer: Answer,
        limit: usize,
    ) -> Result<Bytes, StoreError> {
        let host = host_of(query.request.uri());
        match timeout(self.stall_timeout, Limited::new(answer.into_body(), limit).collect()).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
                Err(invalid_answer(query, &format!("it is longer than {limit} bytes"), "the source"))
            }
            Ok(Err(_)) => Err(StoreError::Interrupted { host, what: query.what.clone() }),
            Err(_) => Err(self.stalled(host, &query.what)),
        }
    }

    /// The description that a server gives: [`Self::fetch`] and [`Self::read`].
    pub(crate) async fn describe(&self, query: &Query) -> Result<Bytes, StoreError> {
        let answer = self.fetch(query).await?;
        self.read(query, answer, MAX_DESCRIPTION_BYTES).await
    }

    /// The error that an answer without success stands for.
    pub(crate) async fn refused(&self, query: &Query, answer: Answer) -> StoreError {
        let (status, headers) = (answer.status(), answer.headers().clone());
        // What the server says is for people; without it the status must do.
        let body = self.read(query, answer, MAX_ERROR_BYTES).await.unwrap_or_default();
        refusal(query, status, &headers, &body)
    }
}

/// The last request of a chain of redirects, and its answer.
pub(crate) type Followed = (Query, Answer);

impl Query {
    pub(crate) fn get(address: &str, what: impl Into<String>, fix: &'static str) -> Result<Self, StoreError> {
        let what = what.into();
        let wrong = |why: String| StoreError::InvalidAnswer {
            host: address.split('?').next().unwrap_or_default().to_owned(),
            what: what.clone(),
            why,
            expected: "the source",
        };
        let request =
            Request::get(address).body(Full::default()).map_err(|error| wrong(error.to_string()))?;
        if request.uri().host().is_none() {
            return Err(wrong("the address names no host".to_owned()));
        }
        Ok(Self { request, what, fix })
    }

    /// With a header; one whose value cannot be sent names its credentials.
    pub(crate) fn header(mut self, name: &'static str, value: &str) -> Result<Self, StoreError> {
        let mut value = HeaderValue::from_str(value).map_err(|_| StoreError::Credentials {
            name: name.to_owned(),
            why: "its value holds characters that a header cannot; remove line breaks".to_owned(),
        })?;
        value.set_sensitive(name == "authorization");
        self.request.headers_mut().insert(name, value);
        Ok(self)
    }

    /// With `Authorization: Bearer`, where there is a token.
    pub(crate) fn bearer(self, token: Option<&str>) -> Result<Self, StoreError> {
        match token {
            Some(token) => self.header("authorization", &format!("Bearer {token}")),
            None => Ok(self),
        }
    }

    /// As POST with this body.
    pub(crate) fn post(mut self, content_type: &str, body: impl Into<Bytes>) -> Result<Self, StoreError> {
        *self.request.method_mut() = Method::POST;
        *self.request.body_mut() = Full::new(body.into());
        self.header("content-type", content_type)
    }

    /// The host that is asked.
    pub(crate) fn host(&self) -> String {
        host_of(self.request.uri())
    }
}

/// A path in an address.
pub(crate) fn encode_path(text: &str) -> String {
    utf8_percent_encode(text, PATH).to_string()
}

/// A name or value in an address.
pub(crate) fn encode_component(text: &str) -> String {
    utf8_percent_encode(text, COMPONENT).to_string()
}

pub(crate) fn invalid_answer(query: &Query, why: &str, expected: &'static str) -> StoreError {
    StoreError::InvalidAnswer { host: query.host(), what: query.what.clone(), why: why.to_owned(), expected }
}

fn without_roots(provider: rustls::crypto::CryptoProvider) -> rustls::ClientConfig {
    let builder = rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(provider));
    // The provider has the versions that rustls takes by default, so there is nothing to fail.
    match builder.with_safe_default_protocol_versions() {
        Ok(builder) => builder.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth(),
        Err(error) => unreachable!("the versions of the provider: {error}"),
    }
}

fn host_of(uri: &Uri) -> String {
    uri.authority().map_or_else(|| uri.path().to_owned(), ToString::to_string)
}

/// The request that a redirect asks for. Credentials stay only on the host that they were meant for, and
/// never leave TLS.
fn redirected(mut query: Query, target: &str) -> Result<Query, StoreError> {
    let from = query.request.uri().clone();
    let target = if target.starts_with('/') {
        let scheme = from.scheme_str().unwrap_or("https");
        format!("{scheme}://{}{target}", host_of(&from))
    } else {
        target.to_owned()
    };
    let to: Uri = target
        .parse()
        .map_err(|_| invalid_answer(&query, "it redirects to no address", "the file itself"))?;
    if from.scheme_str() == Some("https") && to.scheme_str() != Some("https") {
        return Err(invalid_answer(&query, "it redirects from https to http", "a server with https"));
    }
    if from.authority() != to.authority() {
        query.request.headers_mut().remove(AUTHORIZATION);
    }
    *query.request.uri_mut() = to;
    Ok(query)
}

fn refusal(query: &Query, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> StoreError {
    let (host, what, fix) = (query.host(), query.what.clone(), query.fix);
    match status.as_u16() {
        401 => StoreError::Unauthorized { host, what, fix },
        403 => StoreError::AccessDenied { host, what, why: readable(body), fix },
        404 | 410 => StoreError::NotAtSource { host, what },
        status @ (429 | 503) => {
            let seconds = headers.get(RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
            StoreError::Busy { host, status, retry_after: seconds.map(Duration::from_secs) }
        }
        status => StoreError::ServerFailed { host, what, status, why: readable(body) },
    }
}

/// The start of a body, for a message.
fn readable(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let words: Vec<&str> = text.split_whitespace().collect();
    let short: String = words.join(" ").chars().take(SHOWN_CHARS).collect();
    if short.is_empty() { "it gives no reason".to_owned() } else { short }
}

/// What stood in the way of an answer, by the innermost cause that says something.
fn not_answered(host: String, what: &str, error: &hyper_util::client::legacy::Error) -> StoreError {
    let mut cause = error.source();
    let mut innermost = error.to_string();
    while let Some(error) = cause {
        if let Some(tls) = tls_error(error) {
            return StoreError::Tls { host, why: tls };
        }
        innermost = error.to_string();
        if innermost == "dns error" {
            return StoreError::UnknownHost { host };
        }
        cause = error.source();
    }
    if error.is_connect() {
        StoreError::Unreachable { host, why: innermost }
    } else {
        StoreError::Interrupted { host, what: what.to_owned() }
    }
}

/// What TLS said, within any number of I/O errors: their `source` leaves out the error that they wrap.
fn tls_error(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return Some(tls.to_string());
    }
    tls_error(error.downcast_ref::<io::Error>()?.get_ref()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(address: &str) -> Query {
        Query::get(address, "m.gguf", "set A").unwrap().bearer(Some("secret")).unwrap()
    }

    #[test]
    fn credentials_stay_on_their_host_and_within_tls() {
        let keeps = |from: &str, to: &str| {
            let query = redirected(query(from), to)?;
            Ok::<_, StoreError>((
                query.request.uri().to_string(),
                query.request.headers().contains_key(AUTHORIZATION),
            ))
        };
        assert_eq!(keeps("https://a/x", "/y?z").unwrap(), ("https://a/y?z".to_owned(), true));
        assert_eq!(keeps("https://a/x", "https://b/y").unwrap(), ("https://b/y".to_owned(), false));
        assert!(!keeps("https://a/x", "https://a:1/y").unwrap().1, "another port is another server");
        assert!(matches!(keeps("https://a/x", "http://a/y"), Err(StoreError::InvalidAnswer { .. })));
    }

    #[test]
    fn each_status_has_its_reason() {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, HeaderValue::from_static("7"));
        for (status, reason, again) in [
            (401, "Unauthorized", false),
            (403, "AccessDenied", false),
            (404, "SourceNotFound", false),
            (429, "SourceBusy", true),
            (503, "SourceBusy", true),
            (500, "SourceFailed", true),
            (418, "SourceFailed", false),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let error = refusal(&query("https://a/x"), status, &headers, b"no\n  way");
            assert_eq!((error.reason(), error.is_retried_at_once()), (reason, again), "{error}");
            if let StoreError::Busy { retry_after, .. } = &error {
                assert_eq!(*retry_after, Some(Duration::from_secs(7)));
            }
        }
    }

    #[test]
    fn an_error_of_tls_is_found_within_errors_of_io() {
        let tls = rustls::Error::General("no certificate".to_owned());
        let wrapped = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, tls));
        assert!(tls_error(&wrapped).is_some_and(|why| why.contains("no certificate")));
        assert_eq!(tls_error(&io::Error::from(io::ErrorKind::ConnectionRefused)), None);
    }

    #[test]
    fn paths_are_encoded_as_signatures_want_it() {
        assert_eq!(encode_path("a b/\u{e9}+~.gguf"), "a%20b/%C3%A9%2B~.gguf");
        assert_eq!(encode_component("a/b"), "a%2Fb");
    }
}
