//! Signatures of AWS requests, version 4, of requests without a body.

use http::HeaderValue;
use jiff::Timestamp;
use ring::hmac;

use crate::digest::Digest;
use crate::http::Query;

/// The sha256 of no bytes, in place of that of a body.
const EMPTY_SHA256: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Keys of an AWS account, a role, or a server with the same API.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct AwsKeys {
    pub(super) access_key_id: String,
    pub(super) secret_access_key: String,
    pub(super) session_token: Option<String>,
}

impl std::fmt::Debug for AwsKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AwsKeys").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

/// When and where a signature counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct SigningScope<'a> {
    pub(super) region: &'a str,
    pub(super) service: &'a str,
    pub(super) now: Timestamp,
}

/// Signs the method, the address and all headers of a request. The address must be percent-encoded as AWS
/// wants it, its query sorted by name.
pub(super) fn sign(mut query: Query, keys: &AwsKeys, scope: &SigningScope<'_>) -> Query {
    let time = scope.now.strftime("%Y%m%dT%H%M%SZ").to_string();
    let day = scope.now.strftime("%Y%m%d").to_string();
    let host = query.host();
    let headers = query.request.headers_mut();
    let mut set = |name: &'static str, value: &str| {
        // Hosts, times and digests are ASCII; a session token that is not cannot be right, and is refused.
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    set("host", &host);
    set("x-amz-date", &time);
    set("x-amz-content-sha256", EMPTY_SHA256);
    if let Some(token) = &keys.session_token {
        set("x-amz-security-token", token);
    }
    let mut lines: Vec<String> = query
        .request
        .headers()
        .iter()
        .map(|(name, value)| format!("{name}:{}\n", value.to_str().unwrap_or_default().trim()))
        .collect();
    lines.sort_unstable();
    let names: Vec<&str> = lines.iter().filter_map(|line| line.split(':').next()).collect();
    let names = names.join(";");
    let uri = query.request.uri();
    let canonical = format!(
        "{}\n{}\n{}\n{}\n{names}\n{EMPTY_SHA256}",
        query.request.method(),
        uri.path(),
        uri.query().unwrap_or_default(),
        lines.concat(),
    );
    let credential_scope = format!("{day}/{}/{}/aws4_request", scope.region, scope.service);
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{credential_scope}\n{}", Digest::of_text(&canonical));
    let mut key = hmac_sha256(format!("AWS4{}", keys.secret_access_key).as_bytes(), &day);
    for next in [scope.region, scope.service, "aws4_request"] {
        key = hmac_sha256(&key, next);
    }
    let signature = hex(&hmac_sha256(&key, &text));
    let value = format!(
        "AWS4-HMAC-SHA256 Credential={}/{credential_scope}, SignedHeaders={names}, Signature={signature}",
        keys.access_key_id
    );
    if let Ok(mut value) = HeaderValue::from_str(&value) {
        value.set_sensitive(true);
        query.request.headers_mut().insert(http::header::AUTHORIZATION, value);
    }
    query
}

pub(super) fn hmac_sha256(key: &[u8], text: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two examples of a GET in Amazon's documentation of the signature.
    #[test]
    fn signatures_equal_those_of_the_documentation() {
        let keys = AwsKeys {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret_access_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_owned(),
            session_token: None,
        };
        let now = "2013-05-24T00:00:00Z".parse().unwrap();
        let scope = SigningScope { region: "us-east-1", service: "s3", now };
        let signature = |address: &str, range: Option<&str>| {
            let mut query = Query::get(address, "x", "").unwrap();
            if let Some(range) = range {
                query = query.header("range", range).unwrap();
            }
            let signed = sign(query, &keys, &scope);
            let value = signed.request.headers()[http::header::AUTHORIZATION].to_str().unwrap().to_owned();
            value.rsplit('=').next().unwrap().to_owned()
        };
        assert_eq!(
            signature("https://examplebucket.s3.amazonaws.com/test.txt", Some("bytes=0-9")),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        assert_eq!(
            signature("https://examplebucket.s3.amazonaws.com/?max-keys=2&prefix=J", None),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
        );
        assert_eq!(Digest::of_text("").as_str(), EMPTY_SHA256);
    }
}
